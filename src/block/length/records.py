"""What an estimator learns from: (what was asked, of which model, how long the answer was)."""

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from block.errors import BadInputError
from block.length.features import DENSE_NAMES, HASH_SIZE, Features
from block.length.text import request_text

LAYOUT = zlib.crc32(" ".join(DENSE_NAMES).encode()) ^ HASH_SIZE
"""Tells the features of one version of Block from those of another."""

TOKENS_PER_WORD = 1.3
"""English text, today's tokenizers; used only where a record counts no tokens."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One finished request. ``truncated``: it ended because it reached ``max_tokens``. Where the prompt itself was not kept,
    ``text`` is empty and ``features`` and ``prompt_hash`` stand for it, or nothing does."""

    text: str
    output_tokens: int
    model: str = ""
    max_tokens: int | None = None
    client: str | None = None
    dataset: str = ""
    features: Features | None = None
    prompt_hash: str | None = None

    @property
    def key(self) -> str:
        """What tells its prompt from others."""
        return prompt_key(self.text) if self.prompt_hash is None else self.prompt_hash

    @property
    def has_prompt(self) -> bool:
        return bool(self.text) or self.features is not None

    @property
    def truncated(self) -> bool:
        return self.max_tokens is not None and self.output_tokens >= self.max_tokens


def prompt_key(text: str) -> str:
    """The normalised prompt, by which records are split: letters and digits alone, in lower case."""
    return re.sub(r"[\W_]+", " ", text[:20_000].lower()).strip()


def answer_tokens(answer: str) -> int:
    """Tokens of an answer that is only known as text (words times 1.3; scripts without spaces by the character)."""
    wide = sum(1 for char in answer if ord(char) >= 0x2E80)
    return max(1, round(TOKENS_PER_WORD * len(answer.split()) + wide * 0.7))


def read_log(path: Path) -> Iterator[Record]:
    """Records of a JSONL log (or the gateway's rows), gzipped or not.

    A line is {"model", "messages" or "prompt", "max_tokens", "output_tokens"}; ``output_tokens`` may instead be the
    answer's text (``response``). Lines without either are passed over; a row whose prompt was not logged has only
    its model and length.

    Raises:
        BadInputError: the file cannot be read, a line is no JSON object, or no line is a record.
    """
    found = 0
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = msgspec.json.decode(line)
        except msgspec.DecodeError as error:
            raise BadInputError(f"{path}, line {number} is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise BadInputError(f"{path}, line {number} is not a JSON object.")
        try:
            record = _of_row(row, dataset=path.name.split(".")[0])
        except (TypeError, ValueError, KeyError) as error:
            raise BadInputError(f"{path}, line {number} cannot be understood: {error}.") from error
        if record is not None:
            found += 1
            yield record
    if not found:
        raise BadInputError(f"{path} has no record: a line needs output_tokens, and prompt or messages.")


def _of_row(row: dict[str, Any], dataset: str) -> Record | None:
    tokens, answer = row.get("output_tokens"), row.get("response")
    if not isinstance(tokens, int | float) and isinstance(answer, str):
        tokens = answer_tokens(answer)
    if isinstance(tokens, bool) or not isinstance(tokens, int | float) or not 1 <= tokens < float("inf"):
        return None
    cap = row.get("max_tokens", row.get("max_completion_tokens"))
    return Record(
        text=request_text(row),
        output_tokens=int(tokens),
        model=str(row.get("model") or ""),
        max_tokens=int(cap) if isinstance(cap, int | float) and not isinstance(cap, bool) and cap >= 1 else None,
        client=str(row["client"]) if row.get("client") else None,
        dataset=dataset,
        features=_features(row["features"]) if row.get("features") else None,
        prompt_hash=str(row["prompt_hash"]) if row.get("prompt_hash") else None,
    )


def _features(row: Any) -> Features:
    if row.get("layout") != LAYOUT:
        raise ValueError("its features are of another version of Block")
    dense, words = np.array(row["dense"], dtype=np.float32), np.array(row["words"], dtype=np.int32)
    if dense.shape != (len(DENSE_NAMES),) or words.ndim != 1 or not np.isfinite(dense).all():
        raise ValueError("its features are damaged")
    if len(words) and not 0 <= words.min() <= words.max() < HASH_SIZE:
        raise ValueError("its features are damaged")
    return Features(dense, words)


def features_row(features: Features) -> dict[str, Any]:
    """Features as a log keeps them."""
    dense = [round(float(one), 4) for one in features.dense]
    return {"layout": LAYOUT, "dense": dense, "words": features.words.tolist()}


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from file
    except (OSError, EOFError) as error:
        raise BadInputError(f"{path} cannot be read: {error}.") from error
