"""TTFT P99 at 90 % of the best heuristic's capacity: what prediction is worth before saturation.

    python experiments/policies_tail.py [--seeds 3-7]

Settings, lengths and the mooncake trace as in policies_capacity.py, whose results name the best heuristic of each setting and
its capacity. Writes results/policies-tail.csv.
"""

import argparse
import csv
from pathlib import Path

import msgspec
import numpy as np

from block.simulate import SimulationConfig, simulate
from block.simulate.sweep import varied
from policies_capacity import START, setting

RESULTS = Path(__file__).parent / "results"
OURS = ("block", "block-paper")
FRACTION = 0.9


def best_heuristic(name: str) -> tuple[str, float]:
    """The best policy of a setting that predicts nothing, and its capacity in requests/s."""
    with (RESULTS / f"policies-{name}.csv").open(newline="") as file:
        found = {row["policy"]: float(row["capacity_rps"]) for row in csv.DictReader(file)}
    rivals = {policy: rps for policy, rps in found.items() if policy not in OURS and not policy.startswith("(")}
    best = max(rivals, key=lambda policy: rivals[policy])
    return best, rivals[best]


def ttft_p99_s(config: SimulationConfig) -> float:
    rows = simulate(config)
    judged = rows[int(len(rows) * config.warmup_fraction) :]
    return float(np.percentile([row.ttft_s for row in judged if row.ttft_s is not None], 99))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="3-7")
    first, _, last = parser.parse_args().seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    with (RESULTS / "policies-tail.csv").open("w", newline="", buffering=1) as out:
        file = csv.writer(out)
        file.writerow(["setting", "rate_rps", "policy", "ttft_p99_s", "per_seed", "against_best_heuristic"])
        for name in START:
            best, capacity_rps = best_heuristic(name)
            rate_rps, base_s = FRACTION * capacity_rps, 0.0
            for policy in (best, *OURS):
                config = varied(setting(name), policy=policy)
                workload = msgspec.structs.replace(config.workload, rate_rps=rate_rps)
                runs = [msgspec.structs.replace(config, seed=seed, workload=workload) for seed in seeds]
                found = [ttft_p99_s(run) for run in runs]
                mean_s = float(np.mean(found))
                base_s = base_s or mean_s
                per_seed = " ".join(f"{seconds:.2f}" for seconds in found)
                row = [name, f"{rate_rps:.2f}", policy, f"{mean_s:.2f}", per_seed, f"{mean_s / base_s - 1:+.0%}"]
                file.writerow(row)
                print("  ".join(row), flush=True)


if __name__ == "__main__":
    main()
