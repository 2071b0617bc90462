"""How much of the way from its usual length to an asked one ("in 200 words") a served model goes: the prior of training.

Run: python experiments/length_pull.py --sets FOLDER --sharegpt FILE

Of every set the weight that its records speak for, with its standard error over prompts (`block.length.learn.belief`); then
mean and standard deviation between sets, by maximum likelihood of a normal distribution around them, of all sets and
leaving each one out. Sets with fewer than `ASKED_MIN` records that ask for a length tell nothing.
"""

import argparse
from pathlib import Path

import numpy as np

from block.length.data.records import Record
from block.length.data.sets import read_records
from block.length.learn.belief import Seen, seen
from block.length.learn.model import asked_pull
from block.length.learn.tabulate import tabulate
from block.length.learn.train import levels
from ship_lengths import sharegpt_records

ASKED_MIN = 20
WIDTHS = np.linspace(0.01, 0.8, 80)


def pull_of(records: list[Record]) -> tuple[int, Seen] | None:
    """How many records ask for a length, and how much of it is delivered."""
    table = tabulate(records)
    offset = levels(table.log_tokens, table.model)[0][table.model]
    pull = asked_pull(table.dense, offset)
    asked = pull != 0
    if asked.sum() < ASKED_MIN:
        return None
    return int(asked.sum()), seen((table.log_tokens - offset)[asked], pull[asked], table.prompt[asked])


def between(found: list[Seen]) -> tuple[float, float]:
    """Mean and width of the weights between sets."""
    weight, error = np.array([one.weight for one in found]), np.array([one.error for one in found])
    variance = error[:, None] ** 2 + WIDTHS[None, :] ** 2
    mean = (weight[:, None] / variance).sum(axis=0) / (1 / variance).sum(axis=0)
    loss = (np.log(variance) + (weight[:, None] - mean) ** 2 / variance).sum(axis=0) + np.log(
        (1 / variance).sum(axis=0)
    )
    best = int(np.argmin(loss))
    return float(mean[best]), float(WIDTHS[best])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=Path, required=True)
    parser.add_argument("--sharegpt", type=Path, required=True)
    options = parser.parse_args()
    records = read_records([options.sets]) + sharegpt_records(options.sharegpt)
    found = {}
    for name in sorted({record.dataset for record in records}):
        told = pull_of([record for record in records if record.dataset == name])
        if told is not None:
            found[name] = told[1]
            print(f"{name:44} {told[0]:4} ask, weight {told[1].weight:.2f} +- {told[1].error:.2f}", flush=True)
    print("between sets: mean {:.2f}, width {:.2f}".format(*between(list(found.values()))))
    for name in found:
        print(
            "without {}: mean {:.2f}, width {:.2f}".format(
                name, *between([one for n, one in found.items() if n != name])
            )
        )


if __name__ == "__main__":
    main()
