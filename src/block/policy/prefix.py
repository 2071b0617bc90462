"""Which instance probably holds which beginning of a prompt? What a gateway remembers of what it sent where.

A prompt's identity is a chain of keys, one for every so many tokens, each key standing for all text up to its end. An index
remembers the keys sent to one instance, the most recently used ones; it is a guess (the engine evicts by its own rules),
bounded, and lost on a restart without harm.
"""

from collections import OrderedDict
from typing import Final

from block.core import PromptBlocks

CHUNK_BYTES: Final = 1024
"""Of a prompt's text, per key: some 256 tokens."""
CHUNKS_MAX: Final = 512
"""Keys of one prompt; what lies beyond does not count as found."""


class PrefixIndex:
    """The keys sent to one instance, at most ``most``: the longest unused are forgotten first. One writer: its gateway."""

    __slots__ = ("_keys", "most")

    def __init__(self, most: int) -> None:
        self.most = max(most, 1)
        self._keys: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def note(self, blocks: PromptBlocks) -> None:
        """A prompt was sent there. As in an engine, its end will be forgotten before its beginning."""
        keys = self._keys
        for key in reversed(blocks.keys):
            keys[key] = None
            keys.move_to_end(key)
        while len(keys) > self.most:
            keys.popitem(last=False)

    def match_tokens(self, blocks: PromptBlocks, prompt_tokens: int) -> int:
        """Tokens of the prompt's beginning that were sent there before (never all of it: the last one is computed)."""
        count, keys = 0, self._keys
        for key in blocks.keys[: (prompt_tokens - 1) // blocks.tokens]:
            if key not in keys:
                break
            count += 1
        return count * blocks.tokens

    def clear(self) -> None:
        """The instance was restarted: its cache is empty."""
        self._keys.clear()


def blocks_of(text: bytes, prompt_tokens: int, salt: str = "") -> PromptBlocks | None:
    """The chain of a prompt given as the bytes of its text (raw JSON will do); ``None`` where it is shorter than a chunk.

    ``salt``: what else must be equal, the model's name. Keys are of this process: Python salts its hashes anew in each.
    """
    if len(text) < CHUNK_BYTES:
        return None
    keys: list[int] = []
    key = hash(salt)
    for start in range(0, min(len(text) - CHUNK_BYTES + 1, CHUNKS_MAX * CHUNK_BYTES), CHUNK_BYTES):
        key = hash((key, text[start : start + CHUNK_BYTES]))
        keys.append(key)
    return PromptBlocks(max(1, round(CHUNK_BYTES * prompt_tokens / len(text))), tuple(keys))
