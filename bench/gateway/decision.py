"""What one decision costs without HTTP: 12 instances, snapshots of 24-48 running requests, by policy.

    python bench/gateway/decision.py [--instances 12] [--profile]

Every decision sees the state that --frames-per-decision new snapshots make (at 1,000 requests/s and 90 snapshots/s from each
of 12 instances that is one). Prints CPU microseconds per decision; --profile adds where they go.
"""

import argparse
import cProfile
import pstats
import time
from random import Random

from feed import PROFILE, capture, restamped

from block.core import Request
from block.gateway.config import GatewayConfig, InstanceConfig
from block.gateway.deciding.decider import Decider
from block.gateway.deciding.evidence import Evidence
from block.gateway.exchange import NOTHING
from block.gateway.members.pool import Pool, State
from block.gateway.records.metrics import Metrics
from block.length.table import make_estimator
from block.policy.table import policy_from
from block.steptime.profile import load_profile


class FakeExchange:
    """What the decider reads and writes of an exchange."""

    generating, estimate, expected_total, http, asked = True, None, 0, None, NOTHING

    def __init__(self, request: Request) -> None:
        self.request = request


def decider_of(policy: str, instances: int) -> tuple[Decider, Pool]:
    urls = [f"http://h:{9000 + n}" for n in range(instances)]
    config = GatewayConfig(instances=[InstanceConfig(url=url, predictor=url) for url in urls])
    pool = Pool(config)
    decider = Decider(config, pool, policy_from(policy), make_estimator("history"), Metrics(), Random(1))
    profile = load_profile(PROFILE)
    for instance in pool.instances.values():
        instance.state = State.READY
        evidence = Evidence(instance.id, decider.expectations, stale_after_s=60, unseen_after_s=5)
        evidence.take_profile(profile, 1.0)
        decider.evidence[instance.id] = evidence
    return decider, pool


def measure(policy: str, instances: int, frames: int, decisions: int, profiler: cProfile.Profile | None) -> float:
    decider, pool = decider_of(policy, instances)
    captured = [capture(seed=n) for n in range(1, instances + 1)]
    evidence = list(decider.evidence.values())
    sequence, spent_s = 0, 0.0

    def feed() -> None:
        nonlocal sequence
        which = sequence % instances
        raw = captured[which][sequence // instances % len(captured[which])]
        sequence += 1
        evidence[which].take_frame(restamped(raw, sequence)[4:], time.time())

    for _ in range(instances):
        feed()
    for n in range(decisions):
        for _ in range(frames):
            feed()
        exchange = FakeExchange(
            Request(id=f"r{n}", arrived_s=time.time(), prompt_tokens=50, max_tokens=16, model="bench")
        )
        started_s = time.process_time()
        if profiler is not None:
            profiler.enable()
        decision = decider.decide(exchange, decider.policy_for(exchange), pool.eligible("bench"))
        if profiler is not None:
            profiler.disable()
        spent_s += time.process_time() - started_s
        assert decision.fallback is None, decision.fallback
    return spent_s / decisions * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=12)
    parser.add_argument("--frames-per-decision", type=int, default=1)
    parser.add_argument("--decisions", type=int, default=1500)
    parser.add_argument("--policy", action="append")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    for policy in options.policy or ["round-robin", "least-outstanding", "nosim", "block-k", "block"]:
        profiler = cProfile.Profile() if options.profile else None
        us = measure(policy, options.instances, options.frames_per_decision, options.decisions, profiler)
        frames = options.frames_per_decision
        print(f"{policy:20s} {us:7.1f} us CPU a decision ({options.instances} instances, {frames} new snapshots each)")
        if profiler is not None:
            pstats.Stats(profiler).sort_stats("tottime").print_stats(18)


if __name__ == "__main__":
    main()
