"""What a text is about, roughly: the mean of its words' vectors, from a table that ships with the package.

The table is distilled from a sentence encoder (experiments/length_words.py; docs/length.md names its source and licence).
It costs some microseconds where the encoder itself costs milliseconds.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SHIPPED = Path(__file__).parents[1] / "models" / "words.npz"
DIMENSIONS = 64
TABLE = "minilm-1"
"""Names the table in the names of the features: another table, other features, other models."""


class Words(NamedTuple):
    """``row_of``: a word's row; ``vectors``: float32 (words, DIMENSIONS), longer for rarer words."""

    row_of: dict[str, int]
    vectors: NDArray[np.float32]


@functools.cache
def table() -> Words:
    """The shipped table, read once."""
    with np.load(SHIPPED, allow_pickle=False) as file:
        words = file["words"].tobytes().decode().split("\n")
        return Words({word: row for row, word in enumerate(words)}, file["table"] * file["scale"])


def meaning_of(words: Sequence[str]) -> NDArray[np.float32]:
    """The mean vector of lower-case words, at length 1; zeros where none is known. Shape (DIMENSIONS,)."""
    row_of, vectors = table()
    rows = [row for word in words if (row := row_of.get(word)) is not None]
    if not rows:
        return np.zeros(DIMENSIONS, dtype=np.float32)
    total: NDArray[np.float32] = vectors[rows].sum(axis=0)
    return total / max(float(np.sqrt(total @ total)), 1e-6)
