"""Records as arrays, to train on: features, log-lengths, who answered, and folds that no prompt is split over."""

import zlib
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from block.length.data.records import Record, prompt_key
from block.length.distribution import Floats
from block.length.learn.model import TextEncoder, Vector
from block.length.prompt.features import HASH_SIZE, Features, features_of
from block.length.prompt.meaning import DIMENSIONS

FOLDS = 5


class Table(msgspec.Struct, frozen=True):
    """Records as arrays. ``words``: sparse (n, HASH_SIZE) of ones; ``vectors``: (n, dimensions), of none without an
    encoder; ``prompt``: index of the normalised prompt."""

    dense: Vector
    vectors: Vector
    words: Any
    log_tokens: Floats
    truncated: NDArray[np.bool_]
    model: NDArray[np.int64]
    models: list[str]
    prompt: NDArray[np.int64]
    fold: NDArray[np.int64]

    @property
    def prompts(self) -> int:
        """How many different ones."""
        return int(self.prompt.max()) + 1

    def without_meaning(self) -> "Table":
        """The same with nothing said of what the texts are about."""
        dense = self.dense.copy()
        dense[:, -DIMENSIONS:] = 0.0
        return msgspec.structs.replace(self, dense=dense)


def fold_of(text: str, folds: int = FOLDS, salt: str = "") -> int:
    """The fold of a prompt: the same for all its normal forms, in every run."""
    return zlib.crc32((salt + prompt_key(text)).encode()) % folds


def tabulate(records: Sequence[Record], encoder: TextEncoder | None = None) -> Table:
    """Features of all records (those of a distinct prompt once)."""
    from scipy import sparse

    seen: dict[tuple[str, int | None], Features] = {}
    for r in records:
        if r.features is None and (r.text, r.max_tokens) not in seen:
            seen[r.text, r.max_tokens] = features_of(r.text, r.max_tokens)
    rows = [seen[r.text, r.max_tokens] if r.features is None else r.features for r in records]
    by_text = {text: prompt_key(text) for text in {r.text for r in records}}
    keys = [by_text[r.text] if r.prompt_hash is None else r.prompt_hash for r in records]
    prompts = {key: place for place, key in enumerate(sorted(set(keys)))}
    models = {name: place for place, name in enumerate(sorted({r.model for r in records}))}
    starts = np.cumsum([0] + [len(row.words) for row in rows])
    ones = np.ones(starts[-1], dtype=np.float32)
    return Table(
        dense=np.array([row.dense for row in rows]),
        vectors=_vectors(records, encoder),
        words=sparse.csr_matrix((ones, np.concatenate([row.words for row in rows]), starts), (len(rows), HASH_SIZE)),
        log_tokens=np.log([max(r.output_tokens, 1) for r in records]),
        truncated=np.array([r.truncated for r in records]),
        model=np.array([models[r.model] for r in records]),
        models=list(models),
        prompt=np.array([prompts[key] for key in keys]),
        fold=_balanced_folds([r.group for r in records]),
    )


def _balanced_folds(groups: Sequence[str]) -> NDArray[np.int64]:
    """A fold for each record, all of a group in one and none empty where there are as many groups. Shape (n,)."""
    order = sorted(set(groups), key=lambda group: (zlib.crc32(group.encode("utf-8", "surrogatepass")), group))
    fold = {group: place % FOLDS for place, group in enumerate(order)}
    return np.array([fold[group] for group in groups])


def _vectors(records: Sequence[Record], encoder: TextEncoder | None) -> Vector:
    if encoder is None:
        return np.zeros((len(records), 0), dtype=np.float32)
    texts = sorted({r.text for r in records})
    row_of = dict(zip(texts, encoder.encode(texts), strict=True))
    return np.array([row_of[r.text] for r in records])
