"""Several gateways that share nothing: as even, and good for as many requests, as one?

    python bench/gateway/several.py [--counts 1,2,4] [--requests 4000] [--seeds 1,2] [--no-real | --only-real]
        [--seconds 60] [--json]

Simulated: the published cluster (12 instances, policy block), snapshots every 20 ms that are 5-15 ms old when they are there,
0.5 ms a decision; capacity is the highest rate with a TTFT P99 of at most 3 s, and unevenness the most that one instance got
over what each should have, at 26 requests/s. Real: four emulated engines with predictors, 16 requests at a time each, behind one
`block serve`, as many of its own (clients take them in turn) and one with as many workers (the kernel spreads their connections).
Requests are offered for --seconds at about 90 % of what the engines can do, where times are looked at, then as long at 115 %,
where the requests answered a second are. Target: within 3 % of one.
"""

import argparse
import asyncio
import json
import statistics
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "chaos"))

import msgspec
from fleet import Member
from load import drive
from rig import heading
from routers import block

from block.simulate import load_config, simulate
from block.simulate.capacity import find_capacity, parse_criterion
from block.simulate.config import GatewayModel, SimulationConfig
from block.simulate.sweep import runner, varied

CONFIG = Path(__file__).parents[2] / "experiments" / "paper-default.toml"
EVEN_AT_RPS = 26.0
SLOW = ("--speed", "0.25", "--max-num-seqs", "16")
REAL_RPS, OVERLOAD_RPS, SETTLE_S = 25.0, 33.0, 5.0


class Simulated(NamedTuple):
    gateways: int
    capacity_rps: float
    against_one: float
    unevenness: float
    ttft_p99_s: float
    e2e_mean_s: float


class Real(NamedTuple):
    gateways: int
    how: str
    requests: int
    failed: int
    e2e_mean_s: float
    e2e_p99_s: float
    unevenness: float
    answered_rps: float
    against_one: float


def cluster(count: int, requests: int) -> SimulationConfig:
    config = load_config(CONFIG)
    seen = GatewayModel(
        count=count,
        snapshot_interval_s=0.02,
        snapshot_delay_s=0.005,
        snapshot_jitter_s=0.01,
        decision_s=0.0005,
        network_s=0.0005,
    )
    workload = msgspec.structs.replace(config.workload, requests=requests)
    return msgspec.structs.replace(config, gateways=seen, workload=workload, policy="block")


def simulated(counts: list[int], requests: int, seeds: list[int], jobs: int) -> list[Simulated]:
    rows: list[Simulated] = []
    with runner(jobs) as run_all:
        for count in counts:
            config = cluster(count, requests)
            capacity = find_capacity(
                config, parse_criterion("ttft_p99<=3"), seeds, run_all, start_rps=30.0
            ).capacity_rps
            at_rate = varied(config, rate_rps=EVEN_AT_RPS)
            summary = run_all([at_rate])[0]
            got = Counter(row.instance for row in simulate(at_rate))
            one = rows[0].capacity_rps if rows else capacity
            assert summary.ttft_s_p99 is not None
            assert summary.e2e_s_mean is not None
            rows.append(
                Simulated(
                    count, capacity, capacity / one, uneven(got.values(), 12), summary.ttft_s_p99, summary.e2e_s_mean
                )
            )
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def uneven(got: Any, instances: int) -> float:
    """The most that one got over the mean."""
    return float(max(got) / (sum(got) / instances))


async def real(count: int, how: str, seconds: float, one_rps: float | None) -> Real:
    fleet = [Member(*SLOW) for _ in range(4)]
    try:
        await asyncio.gather(*(member.start() for member in fleet))
        with ExitStack() as stack:
            workers = ("--workers", str(count)) if how == "workers" else ()
            start = block("--policy", "block", *workers)
            urls = [(await asyncio.to_thread(start, stack, fleet)).url for _ in range(1 if how == "workers" else count)]
            await asyncio.sleep(2.0)
            outcomes = await drive(urls, rate=REAL_RPS, seconds=seconds)
            times = sorted(o.ended_s - o.sent_s for o in outcomes if o.whole)
            got = [len(member.link.requests) for member in fleet]
            more = await drive(urls, rate=OVERLOAD_RPS, seconds=seconds)
        began_s = more[0].sent_s
        answered = sum(o.whole and SETTLE_S < o.ended_s - began_s < seconds for o in more) / (seconds - SETTLE_S)
        whole = len(times) + sum(o.whole for o in more)
        return Real(
            count, how, len(outcomes) + len(more), len(outcomes) + len(more) - whole, statistics.mean(times),
            times[int(len(times) * 0.99)], uneven(got, 4), answered, answered / (one_rps or answered),
        )  # fmt: skip
    finally:
        await asyncio.gather(*(member.close() for member in fleet))


async def all_real(counts: list[int], seconds: float) -> list[Real]:
    rows: list[Real] = []
    for count in counts:
        for how in ("apart", "workers") if count > 1 else ("apart",):
            rows.append(await real(count, how, seconds, rows[0].answered_rps if rows else None))
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def table(rows: list[Any]) -> None:
    if not rows:
        return
    print("| " + " | ".join(rows[0]._fields) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row) + " |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="1,2,4")
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--no-real", action="store_true")
    parser.add_argument("--only-real", action="store_true")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="how long each real load lasts; short ones are uneven by chance"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    counts, seeds = ([int(part) for part in text.split(",")] for text in (options.counts, options.seeds))
    top = heading()
    virtual = [] if options.only_real else simulated(counts, options.requests, seeds, options.jobs)
    actual = [] if options.no_real else asyncio.run(all_real(counts, options.seconds))
    if options.json:
        rows = {"simulated": [row._asdict() for row in virtual], "real": [row._asdict() for row in actual]}
        print(json.dumps({"heading": top} | rows, indent=1))
        return
    print(f"{top}, seeds {seeds}\n")
    table(virtual)
    table(actual)


if __name__ == "__main__":
    main()
