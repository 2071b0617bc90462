"""How many prompts does it take? Gains over the constants by the number of prompts learned from.

Run: python experiments/length_curve.py FILE [--prompts 300 1000 3000 8000 14000]

FILE: ShareGPT, as for ship_lengths.py; of each conversation the first answer, one record a prompt. Trained from nothing; always the
same `TESTED` other prompts are told. Writes results/length-curve.csv.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from block.length.evaluation.scores import TELLERS, tell_learned
from block.length.learn.train import fit
from length_transfer import figures
from ship_lengths import sharegpt_records

TESTED = 3000
OUT = Path(__file__).parent / "results" / "length-curve.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--prompts", nargs="*", type=int, default=[300, 1000, 3000, 8000, 14000])
    options = parser.parse_args()
    first = {record.key: record for record in reversed(sharegpt_records(options.file))}
    seen: set[str] = set()
    records = [r for r in reversed(first.values()) if not (r.group in seen or seen.add(r.group))]  # type: ignore[func-returns-value]
    order = np.random.default_rng(0).permutation(len(records))
    test, rest = [records[int(i)] for i in order[:TESTED]], [records[int(i)] for i in order[TESTED:]]
    true = np.array([float(r.output_tokens) for r in test])
    with OUT.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("prompts", "mae", "mae_vs_mean", "mae_vs_median", "pinball_vs_constant", "coverage", "rank"))
        for count in options.prompts:
            train = rest[:count]
            told = {name: TELLERS[name](train)(test) for name in ("constant", "constant mean")}
            told["learned"] = tell_learned(fit(train))(test)
            row = figures(told, true)["learned"]
            cells = [len(train), f"{row[0]:.4g}", *(f"{number:.3f}" for number in row[1:])]
            table.writerow(cells)
            print("  ".join(f"{cell:>8}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
