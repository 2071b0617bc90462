"""What a streamed answer says, read with little work: JSON is parsed until the first token, for usage and errors."""

import json
from typing import Any


class AnswerReader:
    """Fed with raw chunks of an OpenAI event stream. ``events`` counts those that carried text.

    ``first_token_in_chunk``: the last chunk fed held the first generated text. ``output_tokens`` is the usage's count
    where the server told one, else the number of events.
    """

    def __init__(self) -> None:
        self.first_token_in_chunk = False
        self.done = False
        self.error: str | None = None
        self._rest = b""
        self._started = False
        self._events = 0
        self._usage_tokens: int | None = None

    @property
    def output_tokens(self) -> int:
        return self._events if self._usage_tokens is None else self._usage_tokens

    def feed(self, chunk: bytes) -> None:
        """Take in a chunk; any number of events, cut anywhere."""
        self.first_token_in_chunk = False
        text = self._rest + chunk if self._rest else chunk
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n")
        end = text.rfind(b"\n\n")
        if end < 0:
            self._rest = text
            return
        self._rest = text[end + 2 :]
        for event in text[:end].split(b"\n\n"):
            self._take(event)

    def _take(self, event: bytes) -> None:
        # Between the first token and the end every event is another token: no need to look inside.
        if self._started and b'"usage":{' not in event and b'"usage": {' not in event and b'"error"' not in event:
            if event.startswith(b"data: [DONE]") or event.startswith(b"data:[DONE]"):
                self.done = True
            elif event.startswith(b"data"):
                self._events += 1
            return
        for line in event.split(b"\n"):
            if line.startswith(b"data:"):
                self._parse(line[5:].strip())

    def _parse(self, payload: bytes) -> None:
        if payload == b"[DONE]":
            self.done = True
            return
        try:
            fields = json.loads(payload)
        except ValueError:
            self.error = f"an event is not JSON: {payload[:80]!r}"
            return
        if not isinstance(fields, dict):
            return
        if fields.get("error"):
            self.error = message_of(fields)
        usage = fields.get("usage")
        if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
            self._usage_tokens = usage["completion_tokens"]
        if _has_text(fields):
            self._events += 1
            if not self._started:
                self._started = self.first_token_in_chunk = True


def _has_text(fields: dict[str, Any]) -> bool:
    choices = fields.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return False
    choice = choices[0]
    delta = choice.get("delta")
    if isinstance(delta, dict):
        return bool(delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls"))
    return "text" in choice  # a completion's event is a token, even one whose text is empty


def message_of(fields: dict[str, Any]) -> str:
    """The sentence of an OpenAI error object, or of what comes instead."""
    error = fields.get("error", fields)
    if isinstance(error, dict):
        return str(error.get("message") or error)[:500]
    return str(error)[:500]
