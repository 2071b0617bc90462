"""What a model of other prompts is worth on a set that it never saw: as it is, corrected in service, as a base to train from.

Run: python experiments/length_transfer.py --sets FOLDER --sharegpt FILE [--only NAME ...] [--records 50 200 1000] [--seeds 3]
     [--bases FOLDER] [--whole]

For every public set a base is trained on ShareGPT and all other sets (prompts that occur in both left out), as
`ship_lengths.py` trains the shipped model on all. Then, on at most `TESTED` records of other prompts than those learned from:

as it is     the base, which does not know the served model's level
corrected    the base after it served the N records, as a gateway does
alone        a model trained on the N records from nothing
from base    a model trained on the N records from the base

With --whole, last, five folds of all records, alone and from the base. --bases keeps the bases, which take minutes each.

Beside the scores: how much of the base and of what the records taught a training believed, and how much of it the
other prompts then bore out, from which the priors of `block.length.learn.train` come.

Gains are against constants of the N records: MAE against the median and the mean, pinball against the 10, 50 and 90 % quantiles.
"""

import argparse
import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from block.length.data.records import Record
from block.length.data.sets import read_records
from block.length.evaluation.scores import TELLERS, Told, cross_validate, score, tell_corrected, tell_learned
from block.length.learn.belief import seen
from block.length.learn.model import LengthModel, asked_pull, load_model
from block.length.learn.tabulate import tabulate
from block.length.learn.train import fit
from ship_lengths import sharegpt_records, trained, training_records

TESTED = 2000
HEAD = ("set", "records", "estimator", "mae", "mae_vs_mean", "mae_vs_median", "pinball_vs_constant", "coverage", "rank")


def split(records: Sequence[Record], count: int, seed: int) -> tuple[list[Record], list[Record]]:
    """About ``count`` records of some prompts, and at most `TESTED` of the others."""
    rng = np.random.default_rng(seed)
    size = Counter(record.group for record in records)
    groups = sorted(size)
    rng.shuffle(groups)
    learned = set(groups[: int(np.searchsorted(np.cumsum([size[g] for g in groups]), count)) + 1])
    test = [record for record in records if record.group not in learned]
    kept = rng.permutation(len(test))[:TESTED]
    return [record for record in records if record.group in learned], [test[int(i)] for i in kept]


def figures(told: dict[str, Told], true: np.ndarray) -> dict[str, list[float]]:
    constant, mean = (score(told[name], true) for name in ("constant", "constant mean"))
    rows = {}
    for name, quantiles in told.items():
        own = score(quantiles, true)
        rows[name] = [
            own.mae_tokens, own.mae_tokens / mean.mae_tokens - 1, own.mae_tokens / constant.mae_tokens - 1,
            own.pinball_tokens / constant.pinball_tokens - 1, own.coverage_80_fraction, own.rank_correlation or 0.0,
        ]  # fmt: skip
    return rows


def few(
    records: Sequence[Record], base: LengthModel, count: int, seed: int
) -> tuple[dict[str, list[float]], list[float]]:
    train, test = split(records, count, seed)
    based = fit(train, base=base)
    tellers = {
        "constant": TELLERS["constant"](train), "constant mean": TELLERS["constant mean"](train),
        "as it is": tell_learned(base), "corrected": tell_corrected(base, train),
        "alone": tell_learned(fit(train)), "from base": tell_learned(based),
    }  # fmt: skip
    told = figures({name: tell(test) for name, tell in tellers.items()}, _true(test))
    return told, [len({r.key for r in train}), *borne_out(based, base, test)]


def borne_out(model: LengthModel, base: LengthModel, test: Sequence[Record]) -> list[float]:
    """Of the base, then of what the records taught: the weight that was believed, and the one of least error on the test."""
    table = tabulate(test)
    offset = np.array([model.served.get(r.model, model.unknown).offset for r in test])
    told = base.effects(table.dense, table.words)[0] - model.base_center
    plain = msgspec.structs.replace(model.unknown, slope=1.0)
    alone = msgspec.structs.replace(model, unknown=plain, own_weight=1.0, base_weight=0.0, own_low=-9.0, own_high=9.0)
    own, _ = alone.effects(table.dense, table.words)
    left = table.log_tokens - offset - model.pull_weight * asked_pull(table.dense, offset)
    rest = left - model.base_weight * told
    return [
        model.base_weight, seen(left - np.median(left), told, table.prompt).weight,
        model.own_weight, seen(rest - np.median(rest), own, table.prompt).weight,
    ]  # fmt: skip


def whole(records: Sequence[Record], base: LengthModel) -> dict[str, list[float]]:
    tellers = {
        "constant": TELLERS["constant"], "constant mean": TELLERS["constant mean"], "alone": TELLERS["learned"],
        "from base": lambda train: tell_learned(fit(train, base=base)),
    }  # fmt: skip
    return figures(cross_validate(records, tellers), _true(records))


def base_without(name: str, every: Sequence[Record], folder: Path | None) -> LengthModel:
    """A base of all sets but one, from the folder if it has it."""
    file = None if folder is None else folder / f"base-{name}.npz"
    if file is not None and file.exists():
        return load_model(file)
    known = {record.key for record in every if record.dataset == name}
    base = trained([r for r in training_records(every) if r.dataset != name and not {r.key, r.group} & known])
    if file is not None:
        base.save(file)
    return base


def _true(records: Sequence[Record]) -> np.ndarray:
    return np.array([float(record.output_tokens) for record in records])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=Path, required=True)
    parser.add_argument("--sharegpt", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--records", nargs="*", type=int, default=[50, 200, 1000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--bases", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    sets = read_records([options.sets])
    every = sets + sharegpt_records(options.sharegpt)
    for name in options.only or sorted({record.dataset for record in sets}):
        own = [record for record in every if record.dataset == name]
        base = base_without(name, every, options.bases)
        with (options.out / f"length-transfer-{name}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(HEAD)
            for count in options.records:
                runs, weights = zip(*(few(own, base, count, seed) for seed in range(1, options.seeds + 1)), strict=True)
                write(table, name, count, {who: np.mean([run[who] for run in runs], axis=0) for who in runs[0]})
                for prompts, *four in weights:
                    print(
                        f"{prompts} prompts: base {four[0]:.2f}, held {four[1]:.2f}; own {four[2]:.2f}, held {four[3]:.2f}"
                    )
            if options.whole:
                write(table, name, len(own), whole(own, base))


def write(table: object, name: str, count: int, rows: dict[str, Sequence[float]]) -> None:
    for who, numbers in rows.items():
        cells = [name, count, who, f"{numbers[0]:.4g}", *(f"{number:.3f}" for number in numbers[1:])]
        table.writerow(cells)  # type: ignore[attr-defined]
        print("  ".join(f"{cell:>16}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
