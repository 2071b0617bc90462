"""Sentence embeddings from an encoder on disk, for the embedding estimator (the extra ``block-llm[length-neural]``).

Any BERT-like encoder in Hugging Face's layout serves (all-MiniLM-L6-v2, a folder or one that a package carries).
Nothing is downloaded.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from block.errors import ConfigError
from block.length.learn.model import Vector
from block.length.prompt.features import SEEN_CHARS
from block.length.prompt.text import clipped, split_chat

TOKENS_MAX = 256
_BATCH = 32
_KEPT = 1024


class SentenceEncoder:
    """Mean of the last layer over a text's tokens, at length 1. Remembers the last ``_KEPT`` texts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tokenizer, self._model = load_encoder(path)
        self._kept: OrderedDict[str, Vector] = OrderedDict()

    @property
    def about(self) -> dict[str, str]:
        return {"kind": "sentence", "path": str(self.path)}

    def encode(self, texts: list[str]) -> Vector:
        """Vectors of texts, (n, dimensions); of a long one the head and the tail of its last message are seen."""
        if len(texts) == 1 and texts[0] in self._kept:
            return self._kept[texts[0]][None, :]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # equal lengths together: less padding
        vectors: list[Any] = [None] * len(texts)
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            for i, vector in zip(batch, self._batch([texts[i] for i in batch]), strict=True):
                vectors[i] = vector
        if len(texts) == 1:
            self._kept[texts[0]] = vectors[0]
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return np.array(vectors, dtype=np.float32)

    def _batch(self, texts: list[str]) -> Vector:
        import torch

        tokens = self._tokenizer(
            [seen_text(text) for text in texts],
            padding=True,
            truncation=True,
            max_length=TOKENS_MAX,
            return_tensors="pt",
        )
        with torch.inference_mode():
            hidden = self._model(**tokens).last_hidden_state
            mask = tokens["attention_mask"][..., None].to(hidden.dtype)
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)
            vectors: Vector = torch.nn.functional.normalize(mean, dim=1).numpy()
        return vectors


def seen_text(text: str) -> str:
    """What an encoder reads of a request: the last message, head and tail; "?" when it is empty."""
    seen = clipped(split_chat(text)[-1][1], SEEN_CHARS // 2).strip()
    return seen.encode("utf-8", "replace").decode() or "?"


def encoder_of(about: dict[str, str]) -> SentenceEncoder:
    """The encoder that a saved model was trained with.

    Raises:
        ConfigError: its weights are no longer at that path, or the library is not installed.
    """
    return SentenceEncoder(Path(about["path"]))


def load_encoder(path: Path) -> tuple[Any, Any]:
    """(tokenizer, encoder) from a folder in Hugging Face's layout, never from the network.

    Raises:
        ConfigError: transformers or torch are not installed, or the folder holds no encoder.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ConfigError("This needs torch and transformers: pip install 'block-llm[length-neural]'.") from error
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} holds no encoder (a folder with config.json, weights and a tokenizer).")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        return tokenizer, AutoModel.from_pretrained(path, local_files_only=True).eval()
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"The encoder in {path} cannot be loaded: {error}.") from error
