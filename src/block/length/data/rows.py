"""One row of a log, or of a public set of prompts and answers -> records, whatever the fields are called.

A row is known by its fields: a gateway's or an API's log, instructions with inputs (Alpaca, Dolly), questions with
answers, conversations (ShareGPT, LMSYS, UltraChat), chat messages that end with the answer, requests with responses.
Where a row does not count the answer's tokens, they follow from its text (`records.answer_tokens`).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from block.length.data.records import LAYOUT, Record, answer_tokens
from block.length.prompt.features import DENSE_NAMES, HASH_SIZE, Features
from block.length.prompt.text import content_text, request_text

TOKENS = (
    "output_tokens", "completion_tokens", "output_len", "output_length", "Output Length", "num_output_tokens", "generated_tokens",
)  # fmt: skip
ANSWERS = ("response", "output", "completion", "answer", "chatgpt_response", "generated_text", "targets", "target")
PROMPTS = ("instruction", "prompt", "question", "query", "user_query", "inputs")
INPUTS = ("input", "context")
TURNS = ("conversations", "conversation", "data")
MODELS = ("model", "model_id", "model_name", "generator")
ROW = {*TOKENS, *ANSWERS, *PROMPTS, *TURNS[:2], "messages", "requests", "features"}
"""A row has one of these; what has none may hold rows in a field."""

ASKED = ("request", "body")
PAIRED = ("_a", "_b")
"""Names under which a field is looked for, the first that is there counts."""

_BEYOND_BELIEF = 10_000_000  # no answer has so many tokens: the field means something else
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}


def records_of(row: Mapping[str, Any], dataset: str) -> Iterator[Record]:
    """The records of one row: none if it lacks a length, several of a conversation.

    Raises:
        TypeError, ValueError, KeyError: a field is not what its name says.
    """
    nested = row.get("requests")
    if isinstance(nested, list):
        for one in nested:
            if isinstance(one, Mapping):
                yield from records_of(one, dataset)
        return
    if isinstance(row.get(f"{TURNS[1]}{PAIRED[0]}"), list):  # two models side by side
        for side in PAIRED:
            one = {TURNS[1]: row[f"{TURNS[1]}{side}"], MODELS[0]: row.get(f"{MODELS[0]}{side}")}
            yield from records_of(one, dataset)
        return
    asked = _first(row, ASKED)
    if isinstance(asked, Mapping):  # a request and its response
        row = {**row, **asked}
    turns = _first(row, TURNS)
    if isinstance(turns, list):
        yield from _conversation(row, [_message(turn, place) for place, turn in enumerate(turns)], dataset)
        return
    body, answer = _asked(row)
    tokens = _tokens(row)
    if tokens is None and answer is not None and answer.strip():
        tokens = answer_tokens(answer)
    if tokens is not None:
        yield _record(row, request_text(body), tokens, dataset)


def _record(row: Mapping[str, Any], text: str, tokens: int, dataset: str, conversation: str | None = None) -> Record:
    cap = row.get("max_tokens", row.get("max_completion_tokens"))
    return Record(
        text=text,
        output_tokens=tokens,
        model=str(_first(row, MODELS) or ""),
        max_tokens=int(cap) if isinstance(cap, int | float) and not isinstance(cap, bool) and cap >= 1 else None,
        client=str(row["client"]) if row.get("client") else None,
        dataset=dataset,
        features=_features(row["features"]) if row.get("features") else None,
        prompt_hash=str(row["prompt_hash"]) if row.get("prompt_hash") else None,
        conversation=conversation,
    )


def _conversation(row: Mapping[str, Any], messages: list[dict[str, Any]], dataset: str) -> Iterator[Record]:
    """Every answer of a conversation, asked with what was said before it."""
    began = next((content_text(m["content"])[:2000] for m in messages if m["role"] == "user"), "")
    for place, message in enumerate(messages):
        answer = content_text(message["content"])
        if message["role"] == "assistant" and place and answer.strip():
            text = request_text({"messages": messages[:place]})
            yield _record(row, text, answer_tokens(answer), dataset, conversation=began)


def _asked(row: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The request's body ({"messages"} or {"prompt"}), and the answer's text where the row has it."""
    answer = _first(row, ANSWERS)
    prompt = _first(row, PROMPTS)
    messages = row.get("messages")
    if messages is None and isinstance(prompt, list) and prompt and isinstance(prompt[0], Mapping):
        messages = prompt
    if isinstance(messages, list):
        last = messages[-1] if messages else None
        if isinstance(last, Mapping) and last.get("role") == "assistant":  # the answer, not something asked
            answer = last.get("content") if answer is None else answer
            messages = messages[:-1]
        return {"messages": messages}, _text_of(answer)
    given = _first(row, INPUTS)
    if isinstance(given, str) and (prompt is None or isinstance(prompt, str)):
        prompt = "\n".join(part for part in (prompt, given) if part)
    return {"prompt": prompt}, _text_of(answer)


def _text_of(answer: Any) -> str | None:
    """An answer's text: a string, a list of strings (the first), messages (the last), or an API's response."""
    if isinstance(answer, list) and answer:
        answer = answer[-1 if isinstance(answer[0], Mapping) and "role" in answer[0] else 0]
    if isinstance(answer, Mapping):
        choices = answer.get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], Mapping):
            answer = choices[0].get("message") or choices[0]
        answer = answer.get("content", answer.get("text")) if isinstance(answer, Mapping) else None
    return answer if isinstance(answer, str) else None


def _tokens(row: Mapping[str, Any]) -> int | None:
    """The answer's counted tokens: a field, or an API's ``usage``."""
    told = _first(row, TOKENS)
    answered = row.get("response")
    inner = answered.get("body") if isinstance(answered, Mapping) else None
    for holder in (row, answered, inner):
        if told is None and isinstance(holder, Mapping) and isinstance(holder.get("usage"), Mapping):
            told = _first(holder["usage"], TOKENS)
    if isinstance(told, str) and told.strip().isdecimal():  # a table knows no numbers
        told = int(told)
    if isinstance(told, bool) or not isinstance(told, int | float) or not 1 <= told <= _BEYOND_BELIEF:
        return None
    return int(told)


def _message(turn: Any, place: int) -> dict[str, Any]:
    """A turn of a conversation; bare strings are said by turns, the user's first."""
    if not isinstance(turn, Mapping):
        return {"role": "assistant" if place % 2 else "user", "content": turn if isinstance(turn, str) else ""}
    role = str(turn.get("role", turn.get("from", "user")))
    return {"role": _ROLES.get(role, role), "content": turn.get("content", turn.get("value", ""))}


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _features(row: Any) -> Features:
    if row.get("layout") != LAYOUT:
        raise ValueError("its features are of another version of Block")
    dense, words = np.array(row["dense"], dtype=np.float32), np.array(row["words"], dtype=np.int32)
    if dense.shape != (len(DENSE_NAMES),) or words.ndim != 1 or not np.isfinite(dense).all():
        raise ValueError("its features are damaged")
    if len(words) and not 0 <= words.min() <= words.max() < HASH_SIZE:
        raise ValueError("its features are damaged")
    return Features(dense, words)
