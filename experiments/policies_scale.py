"""12, 100, 1,000 instances: what a decision costs, and whether looking at k of them at random is enough.

    python experiments/policies_scale.py [--per-instance 2.4] [--requests-per-instance 50] [--requests-max 20000] [--sizes ...]

The published setting with more instances, each offered the same load. Prints and writes results/policies-scale.csv: CPU time per
request of the whole simulation (an upper bound of the decision's), TTFT and E2E.
"""

import argparse
import csv
import time
from pathlib import Path

import msgspec

from block.metrics.summary import summarize
from block.simulate import load_config, simulate
from block.simulate.config import LengthModel

HERE = Path(__file__).parent
POLICIES = ["llumnix-minus", "block-k:k=2", "block-k:k=8", "block-paper", "block"]

HEAD = ["instances", "policy", "requests", "cpu_us_per_request", "ttft_p50_s", "ttft_p99_s", "e2e_mean_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-instance", type=float, default=2.4)
    parser.add_argument("--requests-per-instance", type=int, default=50)
    parser.add_argument("--policies", nargs="*", default=POLICIES)
    parser.add_argument("--append", action="store_true", help="add to the rows that are there")
    parser.add_argument("--requests-max", type=int, default=20_000)
    parser.add_argument("--sizes", default="12,100,1000")
    arguments = parser.parse_args()
    base = load_config(HERE / "paper-default.toml")
    with (HERE / "results" / "policies-scale.csv").open(
        "a" if arguments.append else "w", newline="", buffering=1
    ) as out:
        file = csv.writer(out)
        if not arguments.append:
            file.writerow(HEAD)
        for size in map(int, arguments.sizes.split(",")):
            for policy in arguments.policies:
                requests = min(size * arguments.requests_per_instance, arguments.requests_max)
                workload = msgspec.structs.replace(
                    base.workload, requests=requests, rate_rps=size * arguments.per_instance
                )
                group = msgspec.structs.replace(base.instances[0], count=size)
                config = msgspec.structs.replace(
                    base, workload=workload, instances=[group], policy=policy, seed=3,
                    lengths=LengthModel(options={"noise": 0.4}),
                )  # fmt: skip
                started_s = time.process_time()
                rows = simulate(config)
                cpu_us = (time.process_time() - started_s) / requests * 1e6
                found = summarize(rows, warmup_fraction=0.1)
                row = [size, policy, requests, f"{cpu_us:.0f}", f"{found.ttft_s_p50:.4f}", f"{found.ttft_s_p99:.3f}",
                       f"{found.e2e_s_mean:.3f}"]  # fmt: skip
                file.writerow(row)
                print(*row, sep="  ", flush=True)


if __name__ == "__main__":
    main()
