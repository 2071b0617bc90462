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

from block.length.text import clipped, split_chat

SEEN_CHARS = 4096
"""Characters of the last message that are looked at: head and tail of a longer one."""

ABSENT = -1.0
"""A feature that the request does not have (logarithms of counts are never negative)."""

WORDS_MAX = 400
HASH_BITS = 15
HASH_SIZE = 1 << HASH_BITS

UNITS = {
    "words": ("word",),
    "sentences": ("sentence",),
    "paragraphs": ("paragraph", "stanza", "verse"),
    "lines": ("line",),
    "pages": ("page", "chapter", "section", "scene"),
    "characters": ("character", "letter", "char"),
    "items": (
        "item", "idea", "example", "way", "step", "tip", "point", "bullet", "bullets", "reason", "question", "name",
        "fact", "thing", "suggestion", "benefit", "option", "title", "topic", "method", "type", "advantage", "synonym",
        "difference", "recipe", "book", "movie", "song", "place", "activity", "activities", "strategies", "strategy",
        "technique", "use", "quote", "tweet", "joke", "headline", "slogan", "factor", "cause", "feature", "hashtag",
        "famous", "different", "popular", "creative", "unique", "main", "key", "possible", "potential",
    ),
}  # fmt: skip
_UNIT_OF = {form: unit for unit, words in UNITS.items() for word in words for form in (word, word + "s")}
_TOKENS_OF_ONE = {"words": 1.3, "sentences": 22.0, "paragraphs": 85.0, "lines": 11.0, "pages": 400.0}
"""Tokens of one unit, roughly, in the public sets (experiments/ship_lengths.py names them)."""

_FORMS = {
    "haiku": 20, "slogan": 10, "headline": 14, "title": 10, "tweet": 40, "caption": 25, "limerick": 50, "quatrain": 40,
    "sonnet": 150, "poem": 170, "paragraph": 110, "summary": 90, "email": 190, "letter": 260, "essay": 550,
    "article": 550, "story": 450, "blog": 600, "speech": 450, "dialogue": 300, "recipe": 320, "outline": 300,
    "table": 150, "plan": 350, "itinerary": 400, "script": 400, "proposal": 550, "report": 550, "song": 280, "lyrics": 280,
}  # fmt: skip
"""Forms of text and roughly how many tokens one has."""

_PHRASES = {
    "terse": (
        " one word ", " single word ", " 1 word ", " two words ", " yes or no ", " yes no ", " true or false ",
        " only the ", " only a ",
        " only one ", " only with ", " just the ", " just a ", " just one ", " just with ", " no explanation", " no other ",
        " no additional ", " nothing else ", " without explanation", " without any expla", " which of the ", " which of these ",
    ),
    "expansive": (
        " step by step ", " in detail ", " in great detail ", " in more detail ", " as long as ", " as much ", " as many ",
        " as detailed as ", " at least ", " minimum ", " pros and cons ", " show your work", " show the work", " explain your ",
        " explain why ", " explain how ", " for each ", " with example",
    ),
    "bound": (
        " at most ", " no more than ", " not more than ", " up to ", " less than ", " fewer than ", " under ", " within ",
        " maximum ", " limit ",
    ),
    "structured": (" json ", " csv ", " xml ", " yaml ", " markdown ", " latex ", " html ", " table ", " tables ", " bullet"),
}  # fmt: skip
"""Ways to say how an answer shall look, in text without punctuation."""

_ASKING = {
    "a", "an", "about", "approximately", "around", "at", "exactly", "in", "least", "maximum", "minimum", "most", "of",
    "only", "over", "roughly", "than", "to", "under", "up", "using", "with", "within", "write",
}  # fmt: skip
"""Words before an amount that make it one of the answer ("in 200 words", "a ten line poem")."""

_HEAD_CHARS = 300
"""An instruction ends with a line or a colon within so many characters, where what it is about follows."""

_ASKING_ONE = {
    "in",
    "write",
    "with",
    "create",
    "compose",
    "generate",
    "as",
    "give",
    "using",
    "construct",
    "form",
    "into",
}
_WHOLE = {"sentence", "paragraph", "word", "line", "page", "stanza", "verse"}

_NUMBERS = {
    "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
    "dozen": 12, "twelve": 12, "fifteen": 15, "twenty": 20, "fifty": 50, "hundred": 100, "thousand": 1000,
    "single": 1, "couple": 2, "few": 3, "several": 5,
}  # fmt: skip

_CUE_WORDS = """
brief: brief briefly short concise concisely succinct shortly quick quickly tldr tl summary simple only just
long: detailed detail detailing comprehensive thorough thoroughly extensive elaborate depth long full complete
    explain
prose: essay story article blog post poem song lyrics script speech letter email report proposal novel chapter
    dialogue review
code: code function program script python java javascript c++ sql html css class algorithm api implement regex query
    bash react
list: list steps ways ideas examples tips table enumerate bullet itinerary outline plan guide
fact: who when where which whose year capital name date
how: how why explain describe discuss compare contrast analyze analyse evaluate
rework: rewrite edit correct fix paraphrase rephrase translate summarize summarise proofread convert reword change
    improve grammar replace
choose: classify identify categorize label choose select detect true false yes no sentiment option correct
compute: calculate compute solve equation sum probability find convert average integral derivative
create: write create generate compose design make develop draft build imagine roleplay pretend act
"""
CUES: dict[str, frozenset[str]] = {
    name: frozenset(words.split())
    for name, _, words in (line.partition(":") for line in _CUE_WORDS.replace("\n    ", " ").strip().splitlines())
}
"""Words that tell what kind of answer is asked for, by kind."""

_WIDE = "\u2e80-\U0003ffff"  # scripts without spaces: every character counts as a word
_WORD = re.compile(rf"[{_WIDE}]|[^\W_{_WIDE}]+(?:['\u2019+#][^\W_{_WIDE}]*)*")
_BULLET = re.compile(r"(?m)^\s*(?:[-*•]|\d+[.)])\s")
_OPTION = re.compile(r"(?m)(?:^|\s)\(?[A-Da-d][).:]\s")
_INDENTED = re.compile(r"(?m)^(?: {4}|\t)\S")

DENSE_NAMES: tuple[str, ...] = (
    "chars", "words", "lines", "mean_word", "unseen_chars", "questions", "ends_question", "fences", "symbols", "digits",
    "capitals", "foreign", "wide", "bullets", "options", "indented", "braces", "quotes", "colon_end", "pictures",
    "payload_chars", "payload_words", "instruction_words", "terse", "expansive", "bound", "structured", "form",
    "turns", "system_chars", "answer_chars", "last_answer_chars", "first_prompt_chars", "max_tokens",
    *(f"n_{unit}" for unit in UNITS), "number_max", "numbers", "asked", *(f"cue_{name}" for name in CUES),
    *(f"start_{name}" for name in CUES),
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
    words = _WORD.findall(seen.lower())
    values = _shape(last, seen, words) + _task(seen, words) + _conversation(spoken) + [_log(max_tokens)]
    values += _counts(words) + _cues(words)
    return Features(np.array(values, dtype=np.float32), _hashed(words))


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
        sum(1 for word in _WORD.findall(seen[:512]) if word[0].isupper()) / max(len(words), 1),
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
    ends = [at for at in (seen.find("\n", 3, _HEAD_CHARS), seen.find(": ", 3, _HEAD_CHARS)) if at > 0]
    payload = seen[min(ends) + 1 :].strip() if ends else ""
    payload_words = len(payload.split()) if payload else 0
    told = f" {' '.join(words if len(words) <= 150 else words[:110] + words[-40:])} "
    forms = [tokens for form, tokens in _FORMS.items() if form in told]
    return [
        _log(len(payload)) if payload else ABSENT,
        _log(payload_words) if payload else ABSENT,
        _log(max(len(words) - payload_words, 0)),
        *(float(sum(phrase in told for phrase in phrases)) for phrases in _PHRASES.values()),
        math.log(max(forms)) if forms else ABSENT,
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
    amounts = dict.fromkeys(UNITS, ABSENT)
    asked = 0.0
    numbers = [(place, number) for place, word in enumerate(words) if (number := _number(word)) is not None]
    if not _WHOLE.isdisjoint(words):
        numbers += [(place, 1.0) for place, word in enumerate(words) if word == "a" and _one_of(words, place)]
    for place, number in numbers[:16]:
        for word in words[place + 1 : place + 4]:
            unit = _UNIT_OF.get(word)
            if unit is not None:
                amounts[unit] = math.log1p(number)
                if place and (words[place - 1] in _ASKING or _number(words[place - 1]) is not None):
                    asked = max(asked, min(number, 20_000.0) * _TOKENS_OF_ONE.get(unit, 0.0))
                break
    largest = max((number for _, number in numbers), default=None)
    return [
        *amounts.values(),
        _log(min(largest, 1e6)) if largest is not None else ABSENT,
        float(len(numbers)),
        math.log(asked) if asked >= 1.0 else ABSENT,
    ]


def _one_of(words: list[str], place: int) -> bool:
    """Whether "a" at this place stands for one of the answer's units: "in a sentence", "write a short paragraph"."""
    before = words[place - 1] if place else ""
    return before in _ASKING_ONE and any(word in _WHOLE for word in words[place + 1 : place + 3])


def _number(word: str) -> float | None:
    if word.isascii() and word.isdigit() and len(word) <= 5:
        return float(word)
    return _NUMBERS.get(word)


def _cues(words: list[str]) -> list[float]:
    present, start = set(words), set(words[:3])
    return [float(len(cue & present)) for cue in CUES.values()] + [float(len(cue & start)) for cue in CUES.values()]


def _hashed(words: list[str]) -> NDArray[np.int32]:
    """Words, pairs of neighbours and the first and last words, hashed; the head and the tail of a long text."""
    kept = words if len(words) <= WORDS_MAX else words[: WORDS_MAX - 100] + words[-100:]
    terms = kept + [f"{a} {b}" for a, b in itertools.pairwise(kept)]
    terms += [f"{word[:5]}-" for word in kept if len(word) > 5]
    terms += [f"^{' '.join(kept[:n])}" for n in (1, 2, 3)] + [f"{' '.join(kept[-n:])}$" for n in (1, 2)]
    hashes = {zlib.crc32(term.encode("utf-8", "surrogatepass")) & (HASH_SIZE - 1) for term in terms}
    return np.fromiter(hashes, dtype=np.int32, count=len(hashes))
