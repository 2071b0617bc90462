"""The emulator's tokenizer: four bytes of UTF-8 are one token, which is about what a real one makes of English.

A token sequence is a ``bytes`` object of four bytes a token, so counting and hashing blocks need no list of ids; a
token's id is its bytes as a little-endian integer. Each text is padded with NUL to whole tokens. A chat message costs
four tokens besides its content (start, role, end of header, end of message), and the header of the answer three. A
generated token is a word of three letters and a space, so an answer that a client sends back as part of a chat's
history becomes the same tokens again and its KV blocks are found by prefix caching.
"""

import zlib
from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Final

TOKEN_BYTES: Final = 4
_START, _END_HEADER, _END = b"\x01\0\0\0", b"\x02\0\0\0", b"\x03\0\0\0"
_ID_END: Final = 1 << 32

WORDS: Final = tuple(f"{a}{b}{c} ".encode() for a in "bdfklmst" for b in "aeio" for c in "gklmnprt")
"""256 words, each exactly one token."""

_WORD_MASK: Final = len(WORDS) - 1
_STRIDE: Final = 37  # odd, so that all words come before one repeats
_PLACE: Final = {word: place for place, word in enumerate(WORDS)}


def of_text(text: str) -> bytes:
    """The tokens of a text."""
    raw = text.encode("utf-8", "surrogatepass")
    return raw + b"\0" * (-len(raw) % TOKEN_BYTES)


def of_ids(ids: Iterable[int]) -> bytes:
    """The tokens of a list of ids.

    Raises:
        ValueError: an id is not an integer in [0, 2**32).
    """
    try:
        return array("I", ids).tobytes()
    except (TypeError, OverflowError) as error:
        raise ValueError("token ids must be integers from 0 to 2**32 - 1") from error


def of_chat(messages: Sequence[tuple[str, str]], *, prompt_for_answer: bool = True) -> bytes:
    """The tokens of (role, text) messages, with the header of the answer unless told otherwise."""
    parts = []
    for role, text in messages:
        parts += [_header(role), of_text(text), _END]
    if prompt_for_answer:
        parts.append(_header("assistant"))
    return b"".join(parts)


def _header(role: str) -> bytes:
    return _START + zlib.crc32(role.encode()).to_bytes(4, "little") + _END_HEADER


def count(tokens: bytes) -> int:
    """How many tokens."""
    return len(tokens) // TOKEN_BYTES


def ids(tokens: bytes) -> list[int]:
    """The ids of the tokens."""
    return array("I", tokens).tolist()


def text_of(token_ids: Iterable[int]) -> str:
    """The text that these ids stand for.

    Raises:
        ValueError: an id is not an integer in [0, 2**32).
    """
    return of_ids(token_ids).replace(b"\0", b"").decode("utf-8", "replace")


def answer_seed(prompt: bytes, seed: int = 0) -> int:
    """Where in the cycle of words the answer to a prompt begins: the same prompt (and seed) is always answered the same.

    After one of the words comes its successor, whatever the seed. So, as with a model, a prompt that ends with the first
    tokens of an answer is answered with the rest of it.
    """
    before = _PLACE.get(prompt[-TOKEN_BYTES:])
    return zlib.crc32(prompt, seed & 0xFFFFFFFF) if before is None else before + _STRIDE


def word(seed: int, i: int) -> bytes:
    """The ``i``-th token of an answer."""
    return WORDS[(seed + i * _STRIDE) & _WORD_MASK]


def answer(seed: int, start: int, end: int) -> bytes:
    """Tokens ``start`` to ``end`` of an answer."""
    return b"".join([WORDS[(seed + i * _STRIDE) & _WORD_MASK] for i in range(start, end)])


def answer_ids(seed: int, start: int, end: int) -> list[int]:
    """The ids of tokens ``start`` to ``end`` of an answer."""
    return ids(answer(seed, start, end))


def block_keys(tokens: bytes, block_size: int, salt: str = "") -> list[int]:
    """Content keys (64 bits) of the full blocks: equal where salt and everything up to the block's end are equal."""
    size = block_size * TOKEN_BYTES
    parent = salt.encode()
    keys = []
    for at in range(0, len(tokens) - size + 1, size):
        parent = blake2b(parent + tokens[at : at + size], digest_size=8).digest()
        keys.append(int.from_bytes(parent, "little"))
    return keys
