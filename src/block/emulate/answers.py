"""Answers on their way out: one object a request, told of every token by the player.

A stream's event differs from the one before it in one word of four bytes only, so what stands before and after the
word is made once and a token costs a concatenation and a write. Where a client does not read, tokens wait and are
merged into one event later, as in vLLM.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final, Protocol

import msgspec

from block.emulate import tokens
from block.emulate.openai import Job

BACKLOG_MAX: Final = 256 * 1024  # bytes a client may leave unread before its tokens are merged
_json = msgspec.json.encode


class Answer(Protocol):
    """Where a request's tokens go. ``done`` ends with the finish reason, or the error that broke it off."""

    done: "asyncio.Future[str]"

    def token(self, reason: str | None) -> None:
        """One more output token; ``reason`` with the last one: "stop" or "length"."""
        ...


class WholeAnswer:
    """A request that wants its answer in one piece."""

    def __init__(self, done: "asyncio.Future[str]") -> None:
        self.done = done

    def token(self, reason: str | None) -> None:
        if reason is not None and not self.done.done():
            self.done.set_result(reason)


class StreamedAnswer:
    """Server-sent events. ``send`` takes bytes for the socket, ``backlog`` says how many of them wait there.

    ``head`` holds the fields that all events share (id, object, created, model); ``chunked``: frame the events for
    HTTP/1.1.
    """

    def __init__(
        self,
        job: Job,
        *,
        head: dict[str, Any],
        send: Callable[[bytes], None],
        backlog: Callable[[], int],
        done: "asyncio.Future[str]",
        chunked: bool = True,
    ) -> None:
        self.done = done
        self._job, self._send, self._backlog, self._chunked = job, send, backlog, chunked
        self._seed = job.answer_seed
        self._made = self._sent = 0
        self._open = b"data: " + _json(head)[:-1] + b',"choices":['
        self._plain = not (job.continuous_usage or job.token_ids)
        before, after = self._around(None)
        framed = self._framed(before + b" " * tokens.TOKEN_BYTES + after)
        at = framed.index(before) + len(before)
        self._before, self._after = framed[:at], framed[at + tokens.TOKEN_BYTES :]

    def token(self, reason: str | None) -> None:
        self._made += 1
        if reason is None and self._backlog() > BACKLOG_MAX:
            return
        if reason is None and self._made - self._sent == 1 and self._sent and self._plain:
            self._sent = self._made
            self._send(self._before + tokens.word(self._seed, self._made - 1) + self._after)
            return
        role = b""
        if self._sent == 0 and self._job.chat:
            choice = b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
            role = self._framed(self._open + choice + self._close(0, b"]" + self._prompt_ids()))
        before, after = self._around(reason)
        text = tokens.answer(self._seed, self._sent, self._made)
        self._sent = self._made
        self._send(role + self._framed(before + text + after))
        if reason is not None:
            self._end(reason)

    def _end(self, reason: str) -> None:
        if self._job.include_usage:
            self._send(self._framed(self._open + b'],"usage":' + self._usage(self._made) + b"}\n\n"))
        self._send(self._framed(b"data: [DONE]\n\n"))
        if not self.done.done():
            self.done.set_result(reason)

    def _around(self, reason: str | None) -> tuple[bytes, bytes]:
        """The bytes of an event before and after its text."""
        why = b"null" if reason is None else _json(reason)
        stop_reason = b"" if self._job.chat and reason is None else b',"stop_reason":null'
        text_open, text_close = (b'"delta":{"content":"', b'"}') if self._job.chat else (b'"text":"', b'"')
        after = text_close + b',"logprobs":null,"finish_reason":' + why + stop_reason + self._ids()
        after += b"}" + self._close(self._made)
        return self._open + b'{"index":0,' + text_open, after

    def _ids(self) -> bytes:
        """The members that tell the ids of an event's tokens, and with the first of a completion those of the prompt."""
        if not self._job.token_ids:
            return b""
        first = b"" if self._job.chat or self._sent else self._prompt_ids()
        return first + b',"token_ids":' + _json(tokens.answer_ids(self._seed, self._sent, self._made))

    def _prompt_ids(self) -> bytes:
        return b',"prompt_token_ids":' + _json(tokens.ids(self._job.prompt)) if self._job.token_ids else b""

    def _close(self, output_tokens: int, close: bytes = b"]") -> bytes:
        if self._job.continuous_usage:
            return close + b',"usage":' + self._usage(output_tokens) + b"}\n\n"
        return close + b',"usage":null}\n\n' if self._job.include_usage else close + b"}\n\n"

    def _usage(self, output_tokens: int) -> bytes:
        return _json(usage(self._job.prompt_tokens, output_tokens))

    def _framed(self, event: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(event), event) if self._chunked else event


def usage(prompt_tokens: int, output_tokens: int, cached_tokens: int | None = None) -> dict[str, Any]:
    """A usage object; ``cached_tokens`` where prompt tokens details are wanted."""
    found: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "completion_tokens": output_tokens,
    }
    if cached_tokens is not None:
        found["prompt_tokens_details"] = {"cached_tokens": cached_tokens}
    return found


def head(job: Job, answer_id: str, created: int, model: str) -> dict[str, Any]:
    """The fields that identify an answer, in a stream's events or in one piece."""
    kind = ("chat.completion.chunk" if job.stream else "chat.completion") if job.chat else "text_completion"
    return {"id": answer_id, "object": kind, "created": created, "model": model}


def whole(job: Job, head: dict[str, Any], output_tokens: int, reason: str, cached_tokens: int | None = None) -> bytes:
    """The JSON of an answer in one piece."""
    text = tokens.answer(job.answer_seed, 0, output_tokens).decode()
    choice: dict[str, Any] = {"index": 0}
    if job.chat:
        choice["message"] = {"role": "assistant", "content": text, "refusal": None, "tool_calls": []}
    else:
        choice["text"] = text
    choice |= {"logprobs": None, "finish_reason": reason, "stop_reason": None}
    if job.token_ids:
        choice["token_ids"] = tokens.answer_ids(job.answer_seed, 0, output_tokens)
        (head if job.chat else choice)["prompt_token_ids"] = tokens.ids(job.prompt)
    return _json(head | {"choices": [choice], "usage": usage(job.prompt_tokens, output_tokens, cached_tokens)})
