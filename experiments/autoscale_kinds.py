"""Two kinds of instances with prices under `replay`: the cheapest mix against pools of one kind, on one day of conversation.

usage: autoscale_kinds.py TRACES [--pools a30,h200,a30+h200] [--peak RPS] [--seed N] [--price P] [--out FOLDER]

A kind is a Qwen2-7B on an A30 (price 1) or on an H200 (price P, 6 by default: about what clouds ask). Both start in 120 s. The
day before is history and is not judged. A row a pool is added to FOLDER/autoscale-kinds.csv.
"""

import argparse
from pathlib import Path

import numpy as np

from autoscale_days import INTERVAL_S, LIMITS, SLOS
from autoscale_report import HERE, append, line
from autoscale_traffic import DAY_S, days
from block.autoscale.controllers import controller_from, guard_for
from block.autoscale.terms import Kind
from block.simulate.provision import Setting, provision

WORKLOAD = "conv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path)
    parser.add_argument("--pools", default="a30,h200,a30+h200")
    parser.add_argument("--peak", type=float, default=16.0)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--price", type=float, default=6.0)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    small = Kind(name="a30", profile="a30-qwen2-7b", limits=LIMITS, price=1.0, most=20, cold_start_s=120.0)
    large = Kind(name="h200", profile="h200-qwen2-7b", limits=LIMITS, price=arguments.price, most=4, cold_start_s=120.0)
    traffic = days(arguments.traces, WORKLOAD, peak_rps=arguments.peak, seed=arguments.seed, count=2)
    results = arguments.out / "autoscale-kinds.csv"
    results.parent.mkdir(parents=True, exist_ok=True)
    for pool in arguments.pools.split(","):
        kinds = tuple(kind for kind in (small, large) if kind.name in pool.split("+"))
        setting = Setting(kinds=kinds, start={kinds[0].name: 3}, guard=guard_for("replay"), interval_s=INTERVAL_S)
        done = provision(traffic, controller_from("replay", kinds, SLOS[WORKLOAD]), setting)
        judged = traffic.at_s >= DAY_S
        steps = [step for step in done.steps if DAY_S < step.at_s <= 2 * DAY_S]
        hours = {kind.name: sum(step.want[kind.name] for step in steps) * INTERVAL_S / 3600 for kind in kinds}
        row = {
            "kinds": pool, "seed": arguments.seed, "h200_price": arguments.price, "requests": int(judged.sum()),
            "missed_percent": 100 * float(1 - done.within(SLOS[WORKLOAD])[judged].mean()),
            "ttft_s_p99": float(np.nanpercentile(done.ttft_s[judged], 99)),
            "a30_hours": hours.get("a30", 0.0), "h200_hours": hours.get("h200", 0.0),
            "price": sum(kind.price * hours[kind.name] for kind in kinds),
        }  # fmt: skip
        print(line(row), flush=True)
        append(results, row)


if __name__ == "__main__":
    main()
