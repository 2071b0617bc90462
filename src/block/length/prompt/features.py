"""What a prompt's text tells of the answer's length: a row of plain features and a bag of hashed words.

All of it is a few regular expressions and counts over at most `SEEN_CHARS` of the text, so its cost has a bound.
"""

import itertools
import math
import re
import zlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from block.length.prompt import cues
from block.length.prompt.meaning import DIMENSIONS, TABLE, meaning_of
from block.length.prompt.text import clipped, split_chat

SEEN_CHARS = 4096
"""Characters of the last message that are looked at: head and tail of a longer one."""

ABSENT = -1.0
"""A feature that the request does not have (logarithms of counts are never negative)."""

WORDS_MAX = 400
"""Words that are hashed and looked up: the head and the tail of a long text."""

HASH_BITS = 15
HASH_SIZE = 1 << HASH_BITS

HEAD_CHARS = 300
"""An instruction ends with a line or a colon within so many characters, where what it is about follows."""

_WIDE = "\u2e80-\U0003ffff"  # scripts without spaces: every character counts as a word
WORD = re.compile(rf"[{_WIDE}]|[^\W_{_WIDE}]+(?:['\u2019+#][^\W_{_WIDE}]*)*")
_BULLET = re.compile(r"(?m)^\s*(?:[-*•]|\d+[.)])\s")
_OPTION = re.compile(r"(?m)(?:^|\s)\(?[A-Da-d][).:]\s")
_INDENTED = re.compile(r"(?m)^(?: {4}|\t)\S")
_QUOTED = re.compile(r"[\"“”]([^\"“”\n]{8,2000})[\"“”]")
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")

DENSE_NAMES: tuple[str, ...] = (
    "chars", "words", "lines", "mean_word", "unseen_chars", "questions", "ends_question", "fences", "symbols", "digits",
    "capitals", "foreign", "wide", "bullets", "options", "indented", "braces", "quotes", "colon_end", "pictures",
    "payload_chars", "payload_words", "instruction_words", "terse", "expansive", "bound", "structured", "form",
    "source_words", "quoted_words", *(f"source_{name}" for name in cues.TASKS), "verbs", "sentences", "commas", "ands", "variety",
    "turns", "system_chars", "answer_chars", "last_answer_chars", "first_prompt_chars", "max_tokens",
    *(f"n_{unit}" for unit in cues.UNITS), "number_max", "numbers", "asked", *(f"cue_{name}" for name in cues.CUES),
    *(f"start_{name}" for name in cues.CUES), *(f"{TABLE}_{place}" for place in range(DIMENSIONS)),
)  # fmt: skip


ASKED = DENSE_NAMES.index("asked")
"""The feature that is the log of the tokens that the prompt itself asks for ("in 200 words"), or `ABSENT`."""


class Features(NamedTuple):
    """``dense``: float32 (dense features,), ``DENSE_NAMES`` in order; ``words``: hashed words, int32 (m,), distinct."""

    dense: NDArray[np.float32]
    words: NDArray[np.int32]


def features_of(text: str, max_tokens: int | None = None) -> Features:
    """Features of a request's text (`text.request_text`). Never raises, whatever the text."""
    spoken = split_chat(text)
    last = next((content for role, content in reversed(spoken) if role not in ("assistant", "system")), spoken[-1][1])
    seen = clipped(last, SEEN_CHARS)
    words = WORD.findall(seen.lower())
    values = _shape(last, seen, words) + _task(seen, words) + _conversation(spoken) + [_log(max_tokens)]
    values += _counts(words) + _cues(words)
    kept = words if len(words) <= WORDS_MAX else words[: WORDS_MAX - 100] + words[-100:]
    dense = np.concatenate([np.array(values, dtype=np.float32), meaning_of(kept)])
    return Features(dense, _hashed(kept))


def _log(count: float | None) -> float:
    return ABSENT if count is None else math.log1p(count)


def _shape(last: str, seen: str, words: list[str]) -> list[float]:
    size = max(len(seen), 1)
    ascii_chars = len(seen.encode("ascii", "ignore"))
    foreign = len(seen) - ascii_chars
    wide = sum(1 for char in seen if char >= "⺀") if foreign else 0
    plain = seen.rstrip()
    return [
        _log(len(seen)),
        _log(len(words)),
        _log(seen.count("\n")),
        sum(map(len, words)) / max(len(words), 1),
        _log(len(last) - len(seen)),
        float(seen.count("?")),
        float(plain.endswith("?")),
        float(seen.count("```")),
        sum(map(seen.count, "{}[]()<>=;/\\|&%$@^~`")) / size,
        sum(map(seen.count, "0123456789")) / size,
        sum(1 for word in WORD.findall(seen[:512]) if word[0].isupper()) / max(len(words), 1),
        foreign / size,
        wide / size,
        float(len(_BULLET.findall(seen))),
        float(len(_OPTION.findall(seen))),
        float(len(_INDENTED.findall(seen))),
        float(seen.count("{") + seen.count(";")),
        float(seen.count('"') + seen.count("“")),
        float(plain.endswith((":", ",", "..."))),
        float(seen.count("<image>") + seen.count("<audio>")),
    ]


def _task(seen: str, words: list[str]) -> list[float]:
    """What kind of task it is: how much there is to work on, how tersely or at what length it is to be answered."""
    ends = [at for at in (seen.find("\n", 3, HEAD_CHARS), seen.find(": ", 3, HEAD_CHARS)) if at > 0]
    payload = seen[min(ends) + 1 :].strip() if ends else ""
    payload_words = len(payload.split()) if payload else 0
    told = f" {' '.join(words if len(words) <= 150 else words[:110] + words[-40:])} "
    forms = [tokens for form, tokens in cues.FORMS.items() if form in told]
    return [
        _log(len(payload)) if payload else ABSENT,
        _log(payload_words) if payload else ABSENT,
        _log(max(len(words) - payload_words, 0)),
        *(float(sum(phrase in told for phrase in phrases)) for phrases in cues.PHRASES.values()),
        math.log(max(forms)) if forms else ABSENT,
        *_source(seen, words, payload_words),
    ]


def _source(seen: str, words: list[str], payload_words: int) -> list[float]:
    """How much text is given, what is to be done with it, and of how many parts the task seems to be."""
    quoted = sum(len(part.split()) for part in _QUOTED.findall(seen))
    source = max(payload_words, quoted)
    told = set(words[:40])
    few = words[:200]
    return [
        _log(source) if source else ABSENT,
        _log(quoted) if quoted else ABSENT,
        *(_log(source) if source and not task.isdisjoint(told) else ABSENT for task in cues.TASKS.values()),
        float(sum(word in cues.VERBS for word in few)),
        float(len(_SENTENCE_END.findall(seen))),
        float(seen.count(",")),
        float(sum(word in ("and", "or") for word in few)),
        len(set(words)) / max(len(words), 1),
    ]


def _conversation(spoken: list[tuple[str, str]]) -> list[float]:
    answers = [len(content) for role, content in spoken if role == "assistant"]
    asked = [len(content) for role, content in spoken if role == "user"]
    system = sum(len(content) for role, content in spoken if role in ("system", "developer"))
    return [
        float(len(asked)),
        _log(system),
        _log(sum(answers) / len(answers)) if answers else ABSENT,
        _log(answers[-1]) if answers else ABSENT,
        _log(asked[0]) if asked else ABSENT,
    ]


def _counts(words: list[str]) -> list[float]:
    """Explicit amounts: "in 200 words", "two short paragraphs", "top 10 ideas" -> the number by unit."""
    amounts = dict.fromkeys(cues.UNITS, ABSENT)
    asked = 0.0
    numbers = [(place, number) for place, word in enumerate(words) if (number := _number(word)) is not None]
    if not cues.WHOLE.isdisjoint(words):
        numbers += [(place, 1.0) for place, word in enumerate(words) if word == "a" and _one_of(words, place)]
    for place, number in numbers[:16]:
        for after, word in enumerate(words[place + 1 : place + 4], place + 2):
            unit = cues.UNIT_OF.get(word)
            if unit is not None:
                amounts[unit] = math.log1p(number)
                if _asks(words, place, after):
                    asked = max(asked, min(number, 20_000.0) * cues.TOKENS_OF_ONE.get(unit, 0.0))
                break
    largest = max((number for _, number in numbers), default=None)
    return [
        *amounts.values(),
        _log(min(largest, 1e6)) if largest is not None else ABSENT,
        float(len(numbers)),
        math.log(asked) if asked >= 1.0 else ABSENT,
    ]


def _asks(words: list[str], place: int, after: int) -> bool:
    """Whether the amount at ``place`` is one of the answer: "in 200 words", "100-150 words", "an 800 word essay"."""
    before = words[place - 1] if place else ""
    form = not cues.FORMS.keys().isdisjoint(words[after : after + 2])
    return form or before in cues.ASKING or _number(before) is not None


def _one_of(words: list[str], place: int) -> bool:
    """Whether "a" at this place stands for one of the answer's units: "in a sentence", "write a short paragraph"."""
    before = words[place - 1] if place else ""
    return before in cues.ASKING_ONE and any(word in cues.WHOLE for word in words[place + 1 : place + 3])


def _number(word: str) -> float | None:
    if word.isascii() and word.isdigit() and len(word) <= 5:
        return float(word)
    return cues.NUMBERS.get(word)


def _cues(words: list[str]) -> list[float]:
    present, start = set(words), set(words[:3])
    return [float(len(cue & present)) for cue in cues.CUES.values()] + [
        float(len(cue & start)) for cue in cues.CUES.values()
    ]


def _hashed(kept: list[str]) -> NDArray[np.int32]:
    """Words, pairs of neighbours and the first and last words, hashed."""
    terms = kept + [f"{a} {b}" for a, b in itertools.pairwise(kept)]
    terms += [f"{word[:5]}-" for word in kept if len(word) > 5]
    terms += [f"^{' '.join(kept[:n])}" for n in (1, 2, 3)] + [f"{' '.join(kept[-n:])}$" for n in (1, 2)]
    hashes = {zlib.crc32(term.encode("utf-8", "surrogatepass")) & (HASH_SIZE - 1) for term in terms}
    return np.fromiter(hashes, dtype=np.int32, count=len(hashes))
