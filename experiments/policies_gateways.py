"""Several gateways with snapshots of some age: how much they herd, and what cures it.

    python experiments/policies_gateways.py [--rate 29] [--seeds 2] [--jobs N]

The published setting at a rate near its capacity: gateways that share nothing, each with snapshots of some age. Policies: block,
block without what each gateway knows of its own dispatches (blind), among k = 4 at random, the published rule, the best
counter. Herding: the mean over seconds of the largest share of a second's requests that one instance got, times the number
of instances (1: even). Writes results/policies-gateways.csv.
"""

import argparse
import csv
from collections import Counter, defaultdict
from pathlib import Path

import msgspec
import numpy as np

from block.metrics.row import Row
from block.metrics.summary import summarize
from block.simulate import SimulationConfig, load_config, simulate
from block.simulate.config import GatewayModel, LengthModel
from block.simulate.sweep import varied

HERE = Path(__file__).parent
CURES = {"block": ("block", True), "block, blind": ("block", False), "block-k, k = 4": ("block-k:k=4", True),
         "block-paper": ("block-paper", True), "llumnix-minus": ("llumnix-minus", True)}  # fmt: skip


def herding(rows: list[Row], instances: int) -> float:
    """1 where every second's requests are spread evenly; the number of instances where all go to one."""
    seconds: dict[int, Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row.instance is not None:
            seconds[int(row.intended_s)][row.instance] += 1
    shares = [max(count.values()) / sum(count.values()) for count in seconds.values()]
    return float(np.mean(shares)) * instances


def one(config: SimulationConfig, gateways: int, interval_s: float, seed: int, *, accounting: bool) -> dict[str, str]:
    """Figures of one run."""
    model = GatewayModel(
        count=gateways, snapshot_interval_s=interval_s, snapshot_delay_s=0.002, in_flight_accounting=accounting
    )
    config = msgspec.structs.replace(config, gateways=model, seed=seed)
    rows = simulate(config)
    found = summarize(rows, config.slo, warmup_fraction=0.1)
    return {
        "ttft_p50_s": f"{found.ttft_s_p50:.4f}", "ttft_p99_s": f"{found.ttft_s_p99:.3f}",
        "e2e_mean_s": f"{found.e2e_s_mean:.3f}", "preemptions": str(found.preemptions),
        "herding": f"{herding(rows, config.instance_count):.3f}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=29.0)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seeds", default="3")
    parser.add_argument("--gateways", default="1,2,4,8")
    parser.add_argument("--intervals-ms", default="10,100,500")
    arguments = parser.parse_args()
    base = load_config(HERE / "paper-default.toml")
    workload = msgspec.structs.replace(base.workload, requests=arguments.requests)
    base = msgspec.structs.replace(base, workload=workload, lengths=LengthModel(options={"noise": 0.4}))
    with (HERE / "results" / "policies-gateways.csv").open("w", newline="", buffering=1) as out:
        file = None
        for gateways in map(int, arguments.gateways.split(",")):
            for interval_ms in map(float, arguments.intervals_ms.split(",")):
                for name, (policy, accounting) in CURES.items():
                    config = varied(base, policy=policy, rate_rps=arguments.rate)
                    for seed in map(int, arguments.seeds.split(",")):
                        row = {
                            "gateways": str(gateways),
                            "snapshot_ms": f"{interval_ms:g}",
                            "policy": name,
                            "seed": str(seed),
                        }
                        row |= one(config, gateways, interval_ms / 1e3, seed, accounting=accounting)
                        if file is None:
                            file = csv.DictWriter(out, list(row))
                            file.writeheader()
                        file.writerow(row)
                        print("  ".join(row.values()), flush=True)


if __name__ == "__main__":
    main()
