"""How many requests/s does a saturated cluster complete? A capacity at a TTFT of seconds cannot lie much above that.

    python experiments/policies_saturation.py [--seeds 3-7] [--over 1.2] [--settings a,b] [--policies a,b]

Settings and lengths as in policies_capacity.py. Offered is ``over`` times the best capacity known; counted are the answers that
end between a minute after the start and the last arrival, by when as many are in flight as fit. Also the same hardware as
one engine, first come and smallest first (`block.simulate.bound`), and `block` with true lengths. Writes
results/policies-saturation.csv, keeping the rows that it does not measure.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from block.simulate import SimulationConfig, simulate
from block.simulate.capacity import bootstrap_interval
from block.simulate.sweep import varied
from policies_capacity import KNOWING, PACKED, POOLED, START, of_policy, setting

RESULTS = Path(__file__).parent / "results"
SETTINGS = {
    "default": ["llumnix-minus", "block", KNOWING, POOLED, PACKED],
    "batch-24": ["nosim", "block", KNOWING, POOLED, PACKED],
    "heterogeneous": ["llumnix-minus", "block", KNOWING],
}
FILLED_S = 60.0
HEAD = ["setting", "policy", "offered_rps", "completed_rps", "ci_low", "ci_high", "per_seed"]


def completed_rps(config: SimulationConfig) -> float:
    rows = simulate(config)
    last_s = max(row.intended_s for row in rows)
    ended = sum(row.finished_s is not None and FILLED_S < row.finished_s < last_s for row in rows)
    return ended / (last_s - FILLED_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="3-7")
    parser.add_argument("--over", type=float, default=1.2)
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--policies", help="only these of each setting")
    arguments = parser.parse_args()
    only = arguments.policies.split(",") if arguments.policies else None
    first, _, last = arguments.seeds.partition("-")
    path, names = RESULTS / "policies-saturation.csv", arguments.settings.split(",")
    rows: list[list[str]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in list(csv.reader(file))[1:] if row[0] not in names or (only and row[1] not in only)]
    for name in names:
        offered_rps = arguments.over * START[name]
        for policy in only or SETTINGS[name]:
            config = of_policy(setting(name), policy)
            found = [
                completed_rps(varied(config, rate_rps=offered_rps, seed=seed))
                for seed in range(int(first), int(last or first) + 1)
            ]
            low, high = bootstrap_interval(found)
            per_seed = " ".join(f"{rps:.2f}" for rps in found)
            rows.append(
                [name, policy, f"{offered_rps:.1f}", f"{np.mean(found):.2f}", f"{low:.2f}", f"{high:.2f}", per_seed]
            )
            print("  ".join(rows[-1]), flush=True)
            with path.open("w", newline="", encoding="utf-8") as out:
                csv.writer(out).writerows([HEAD, *rows])


if __name__ == "__main__":
    main()
