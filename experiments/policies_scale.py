"""12, 100, 1,000 instances: what a decision costs, and whether looking at k of them at random is enough.

    python experiments/policies_scale.py [--per-instance 2.4] [--requests-per-instance 50] [--requests-max 20000] [--sizes ...]
    python experiments/policies_scale.py --capacity --policies block-k:k=8 block --sizes 12,100 --seeds 3-7

The published setting with more instances, each offered the same load. Prints and writes results/policies-scale.csv: CPU time per
request of the whole simulation (an upper bound of the decision's), TTFT and E2E. With --capacity instead: requests/s an instance
at TTFT P99 <= 3 s, `CAPACITY_REQUESTS` requests an instance, into results/policies-scale-capacity.csv, whose other rows it keeps.
"""

import argparse
import csv
import time
from pathlib import Path

import msgspec

from block.metrics.summary import summarize
from block.simulate import SimulationConfig, load_config, simulate
from block.simulate.capacity import find_capacity, parse_criterion
from block.simulate.config import LengthModel
from block.simulate.sweep import run_one

HERE = Path(__file__).parent
POLICIES = ["llumnix-minus", "block-k:k=2", "block-k:k=8", "block-paper", "block"]

CAPACITY_REQUESTS = 150
"""An instance: a minute of load. Fewer than the 833 of the capacity tables, so that a thousand instances can be measured."""
START_RPS = {"block": 2.75, "block-k:k=8": 2.7}
"""An instance, where the search begins."""
CAPACITY_HEAD = ["instances", "policy", "per_instance_rps", "ci_low", "ci_high", "seeds", "per_seed"]
HEAD = ["instances", "policy", "requests", "cpu_us_per_request", "ttft_p50_s", "ttft_p99_s", "e2e_mean_s"]


def of_size(base: SimulationConfig, size: int, policy: str, requests: int, rate_rps: float) -> SimulationConfig:
    """The published setting with ``size`` instances."""
    workload = msgspec.structs.replace(base.workload, requests=requests, rate_rps=rate_rps)
    group = msgspec.structs.replace(base.instances[0], count=size)
    return msgspec.structs.replace(
        base, workload=workload, instances=[group], policy=policy, seed=3, lengths=LengthModel(options={"noise": 0.4})
    )


def capacities(base: SimulationConfig, sizes: list[int], policies: list[str], seeds: list[int]) -> None:
    """What an instance carries among so many."""
    path, rows = HERE / "results" / "policies-scale-capacity.csv", dict[tuple[str, str], list[str]]()
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows = {(row[0], row[1]): row for row in list(csv.reader(file))[1:]}
    for size in sizes:
        for policy in policies:
            config = of_size(base, size, policy, size * CAPACITY_REQUESTS, size * START_RPS.get(policy, 2.6))
            found = find_capacity(
                config, parse_criterion("ttft_p99<=3"), seeds, lambda configs: [run_one(one) for one in configs],
                first_step=1.02, tolerance=0.05,
            )  # fmt: skip
            each = [found.capacity_rps, found.ci_low, found.ci_high]
            row = [str(size), policy, *(f"{rps / size:.3f}" for rps in each), " ".join(map(str, seeds)),
                   " ".join(f"{rps / size:.3f}" for rps in found.per_seed)]  # fmt: skip
            rows[row[0], row[1]] = row
            print("  ".join(row), flush=True)
            with path.open("w", newline="", encoding="utf-8") as out:
                csv.writer(out).writerows([CAPACITY_HEAD, *rows.values()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-instance", type=float, default=2.4)
    parser.add_argument("--requests-per-instance", type=int, default=50)
    parser.add_argument("--policies", nargs="*", default=POLICIES)
    parser.add_argument("--append", action="store_true", help="add to the rows that are there")
    parser.add_argument("--requests-max", type=int, default=20_000)
    parser.add_argument("--sizes", default="12,100,1000")
    parser.add_argument("--capacity", action="store_true", help="search for the capacity instead")
    parser.add_argument("--seeds", default="3-7", help="of the capacity")
    arguments = parser.parse_args()
    base = load_config(HERE / "paper-default.toml")
    sizes = [int(size) for size in arguments.sizes.split(",")]
    if arguments.capacity:
        first, _, last = arguments.seeds.partition("-")
        capacities(base, sizes, arguments.policies, list(range(int(first), int(last or first) + 1)))
        return
    with (HERE / "results" / "policies-scale.csv").open(
        "a" if arguments.append else "w", newline="", buffering=1
    ) as out:
        file = csv.writer(out)
        if not arguments.append:
            file.writerow(HEAD)
        for size in sizes:
            for policy in arguments.policies:
                requests = min(size * arguments.requests_per_instance, arguments.requests_max)
                config = of_size(base, size, policy, requests, size * arguments.per_instance)
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
