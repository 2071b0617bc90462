"""The demo's cluster in the simulator: unequal instances, answers of 0.7 s, lengths known only as history tells them.

    python experiments/policies_demo.py [--rates 66,80] [--seeds 0-2]

The workload of `block demo` (14 seconds of Poisson arrivals a run), snapshots of 20 ms, the history estimator; means over the
seeds. Writes results/policies-demo.csv.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from block.demo.scenario import simulated, workload
from block.metrics.summary import summarize
from block.simulate import simulate

POLICIES = ["round-robin", "least-outstanding", "llumnix-minus", "infaas++", "nosim", "lmetric", "token-load", "block-paper",
            "block:ttft_weight=0", "block:ttft_weight=1", "block:ttft_weight=10", "block"]  # fmt: skip
FIGURES = ("ttft_s_mean", "ttft_s_p50", "ttft_s_p99", "e2e_s_mean", "e2e_s_p99", "requests_rps", "preemptions")
SECONDS = 14.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="66,80")
    parser.add_argument("--seeds", default="0-2")
    arguments = parser.parse_args()
    first, _, last = arguments.seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    path = Path(__file__).parent / "results" / "policies-demo.csv"
    with path.open("w", newline="", buffering=1, encoding="utf-8") as out:
        file = csv.writer(out)
        file.writerow(["rate_rps", "policy", *FIGURES])
        for rate_rps in map(float, arguments.rates.split(",")):
            for policy in POLICIES:
                runs = [summarize(simulate(simulated(policy), workload(rate_rps, SECONDS, seed))) for seed in seeds]
                means = [np.mean([getattr(run, figure) for run in runs]) for figure in FIGURES]
                row = [f"{rate_rps:g}", policy, *(f"{mean:.3f}" for mean in means)]
                file.writerow(row)
                print("  ".join(row), flush=True)


if __name__ == "__main__":
    main()
