"""Reading the tables: CSV files, plain or gzip, and a model's ``config.json``."""

import csv
import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from block.errors import BadInputError


def find(directory: Path, stem: str) -> Path:
    """``STEM.csv`` or ``STEM.csv.gz`` in a directory.

    Raises:
        BadInputError: neither is there.
    """
    for name in (f"{stem}.csv", f"{stem}.csv.gz"):
        if (directory / name).exists():
            return directory / name
    raise BadInputError(f"{directory} holds no {stem}.csv (or .csv.gz).")


def read_csv(file: Path, needed: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a CSV file, plain or gzip, that must have the columns ``needed``.

    Raises:
        BadInputError: unreadable, empty or without these columns.
    """
    try:
        with gzip.open(file, "rt", newline="") if file.suffix == ".gz" else file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise BadInputError(f"{file} is not a CSV file: {error}.") from error
    missing = [c for c in needed if not rows or c not in rows[0]]
    if missing:
        raise BadInputError(f"{file} has no rows with the columns {', '.join(missing)}.")
    return rows


def read_config(file: Path) -> dict[str, Any]:
    """A model's ``config.json``.

    Raises:
        BadInputError: not one of a dense Llama-like model.
    """
    try:
        config = json.loads(file.read_text())
        for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
            config[field] = int(config[field])
    except (OSError, ValueError) as error:
        raise BadInputError(f"{file} is not a model's config.json: {error}.") from error
    except (KeyError, TypeError) as error:
        raise BadInputError(f"{file} lacks the field {error}: only dense Llama-like models can be imported.") from error
    if config.get("num_experts") or config.get("num_local_experts"):
        raise BadInputError(f"{file} is of a mixture of experts: only dense models can be imported.")
    return dict(config)
