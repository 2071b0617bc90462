"""TTFT P99 at 90 % of the best heuristic's capacity: what prediction is worth before saturation.

    python experiments/policies_tail.py [--seeds 3-7]

Also (idle): block at a tenth of that rate, which is what the longest prompts take by themselves. Settings, lengths and the
mooncake trace as in policies_capacity.py, whose results name the best heuristic of each setting and its capacity. Writes
results/policies-tail.csv, keeping the rows of settings that it does not measure.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from block.simulate import SimulationConfig, simulate
from block.simulate.sweep import varied
from policies_capacity import START, setting

RESULTS = Path(__file__).parent / "results"
OURS = ("block", "block-paper")
FRACTION = 0.9
IDLE = "(idle)"
HEAD = ["setting", "rate_rps", "policy", "ttft_p99_s", "per_seed", "against_best_heuristic"]


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
    parser.add_argument("--again", help="measure this policy only and keep the other rows")
    parser.add_argument("--settings", default=",".join(START))
    arguments = parser.parse_args()
    first, _, last = arguments.seeds.partition("-")
    seeds, path = range(int(first), int(last or first) + 1), RESULTS / "policies-tail.csv"
    names, rows = arguments.settings.split(","), dict[tuple[str, str], list[str]]()
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows = {
                (row[0], row[2]): row for row in list(csv.reader(file))[1:] if arguments.again or row[0] not in names
            }
    for name in names:
        best, capacity_rps = best_heuristic(name)
        rate_rps = FRACTION * capacity_rps
        base_s = float(rows[name, best][3]) if arguments.again else 0.0
        for policy in [arguments.again] if arguments.again else (best, *OURS, IDLE):
            offered_rps = 0.1 * rate_rps if policy == IDLE else rate_rps
            config = varied(setting(name), policy="block" if policy == IDLE else policy, rate_rps=offered_rps)
            found = [ttft_p99_s(varied(config, seed=seed)) for seed in seeds]
            mean_s = float(np.mean(found))
            base_s = base_s or mean_s
            per_seed = " ".join(f"{seconds:.2f}" for seconds in found)
            row = [name, f"{offered_rps:.2f}", policy, f"{mean_s:.2f}", per_seed, f"{mean_s / base_s - 1:+.0%}"]
            rows[name, policy] = row
            print("  ".join(row), flush=True)
            with path.open("w", newline="", encoding="utf-8") as out:
                csv.writer(out).writerows([HEAD, *rows.values()])


if __name__ == "__main__":
    main()
