"""What an estimator learns from: (what was asked, of which model, how long the answer was)."""

import re
import zlib
from typing import Any

import msgspec

from block.length.prompt.features import DENSE_NAMES, HASH_SIZE, Features

LAYOUT = zlib.crc32(" ".join(DENSE_NAMES).encode()) ^ HASH_SIZE
"""Tells the features of one version of Block from those of another."""

TOKENS_PER_WORD = 1.3
"""English text, today's tokenizers; used only where a record counts no tokens."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One finished request. ``truncated``: it ended because it reached ``max_tokens``. Where the prompt itself was not kept,
    ``text`` is empty and ``features`` and ``prompt_hash`` stand for it, or nothing does. ``conversation``: how the
    conversation began that it is one turn of, where a set tells."""

    text: str
    output_tokens: int
    model: str = ""
    max_tokens: int | None = None
    client: str | None = None
    dataset: str = ""
    features: Features | None = None
    prompt_hash: str | None = None
    conversation: str | None = None

    @property
    def key(self) -> str:
        """What tells its prompt from others."""
        return prompt_key(self.text) if self.prompt_hash is None else self.prompt_hash

    @property
    def group(self) -> str:
        """What is never split between training and test: a prompt, or all turns of a conversation."""
        return self.key if self.conversation is None else prompt_key(self.conversation)

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


def features_row(features: Features) -> dict[str, Any]:
    """Features as a log keeps them."""
    dense = [round(float(one), 4) for one in features.dense]
    return {"layout": LAYOUT, "dense": dense, "words": features.words.tolist()}
