"""Prompt text of about a given number of tokens, different for every request unless a shared prefix is asked for.

A token is a common English word of three letters and the space after it: one token for byte-pair tokenizers, and
exactly one for the emulated engine's. Block keys of a workload become equal text for equal keys, so that prefix
caches find what the recorded ones found.
"""

from random import Random
from typing import Final

from block.workload.offered import Offered

_LIST: Final = """
    the and are but not you all any can had her was one our out day get has him his how man new now old
    see two way who boy did its let put say she too use dad mom act add age ago air arm art ask bad bag
    bar bed big bit box buy car cat cup cut die dog dry due ear eat end eye far few fit fly gas god got
    gun guy hit hot ice job key kid law lay leg lie lot low map mix net off oil pay per red run sea set
    sex sit six sky son sun tax tea ten top try war win yes yet
"""
WORDS: Final = tuple(f"{word} " for word in _LIST.split())
"""Each is one token with its space."""


def prompt_text(offered: Offered, seed: int) -> str:
    """The prompt of an offered request: its own text if it has one, else words. About 100 ns a token."""
    request = offered.request
    if request.prompt is not None:
        return request.prompt
    if offered.blocks is None:
        return "".join(Random(f"{seed}/{request.id}").choices(WORDS, k=request.prompt_tokens))
    parts, left = [], request.prompt_tokens
    for key in offered.blocks.keys:
        parts += Random(f"block {key}").choices(WORDS, k=offered.blocks.tokens)[:left]
        left = max(left - offered.blocks.tokens, 0)
    parts += Random(f"{seed}/{request.id}").choices(WORDS, k=left)
    return "".join(parts)
