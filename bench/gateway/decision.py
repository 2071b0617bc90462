"""What one decision costs without HTTP: 12 instances, snapshots of 24-48 running requests, by policy.

    python bench/gateway/decision.py [--instances 12] [--profile]

Every decision sees the state that --frames-per-decision new snapshots make (at 1,000 requests/s and 90 snapshots/s from each
of 12 instances that is one). Prints CPU microseconds per decision; --profile adds where they go.
"""

import argparse
import asyncio
import cProfile
import pstats
import time
from random import Random

from feed import capture, restamped, PROFILE

from block.core import Request
from block.gateway.config import GatewayConfig, InstanceConfig
from block.gateway.dispatch import Dispatcher
from block.gateway.evidence import Evidence
from block.gateway.metrics import Metrics
from block.gateway.pool import Pool, State
from block.length.table import make_estimator
from block.policy.choose import decide
from block.policy.table import policy_from
from block.steptime.profile import load_profile


class FakeExchange:
    """What the dispatcher's decision reads and writes of an exchange."""

    def __init__(self, request: Request) -> None:
        self.request, self.expected_total, self.estimate, self.http = request, 0, None, None


def dispatcher_of(policy: str, instances: int) -> Dispatcher:
    config = GatewayConfig(
        instances=[InstanceConfig(url=f"http://h:{9000 + n}", predictor="http://h:1") for n in range(instances)]
    )
    pool = Pool(config)
    dispatcher = Dispatcher(
        config, pool, policy_from(policy), make_estimator("history"), Metrics(), Random(1), asyncio.new_event_loop()
    )
    profile = load_profile(PROFILE)
    for instance in pool.instances.values():
        instance.state = State.READY
        evidence = Evidence(instance.id, dispatcher.expectations, stale_after_s=60, unseen_after_s=5)
        evidence.take_curve(profile.curve(), profile.input_s, profile.output_s)
        dispatcher.evidence[instance.id] = evidence
    return dispatcher


def measure(policy: str, instances: int, frames: int, decisions: int, profiler: cProfile.Profile | None) -> float:
    dispatcher = dispatcher_of(policy, instances)
    captured = [capture(seed=n) for n in range(1, instances + 1)]
    ids = list(dispatcher.pool.instances)
    sequence, spent_s = 0, 0.0
    for n in range(instances):
        sequence += 1
        dispatcher.evidence[ids[n]].take_frame(restamped(captured[n][0], sequence)[4:], time.time())
    for n in range(decisions):
        for k in range(frames):
            sequence += 1
            which = (n * frames + k) % instances
            frame = restamped(captured[which][sequence % len(captured[which])], sequence)[4:]
            dispatcher.evidence[ids[which]].take_frame(frame, time.time())
        request = Request(id=f"r{n}", arrived_s=time.time(), prompt_tokens=50, max_tokens=16, model="bench")
        started_s = time.process_time()
        if profiler is not None:
            profiler.enable()
        exchange = FakeExchange(request)
        eligible = dispatcher.pool.eligible("bench")
        candidates = dispatcher._candidates(
            exchange, dispatcher.policy, dispatcher.policy.shortlist.choose(eligible, dispatcher.rng)
        )
        decision = decide(dispatcher.policy, request, candidates, dispatcher.rng)
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
        print(
            f"{policy:20s} {us:7.1f} us CPU a decision, {options.instances} instances, {options.frames_per_decision} new snapshots each"
        )
        if profiler is not None:
            pstats.Stats(profiler).sort_stats("tottime").print_stats(18)


if __name__ == "__main__":
    main()
