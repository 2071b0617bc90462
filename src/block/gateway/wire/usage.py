"""Tokens counted by the instance: asks for usage in every event of a stream, and takes it out again for the client.

Used for instances without a predictor under ``count_tokens = "usage"`` alone, where the client asked for no usage itself.
Of the request one field is added, of the answer the ``usage`` members and the last event that holds nothing else are
left out; every other byte of the events is the instance's.
"""

import re
from typing import Final

import httptools
import msgspec

from block.gateway.wire.http1 import LAST_CHUNK, chunk

PATHS: Final = (b"/v1/chat/completions", b"/v1/completions")
ASKED: Final = b'"stream_options":{"include_usage":true,"continuous_usage_stats":true}'
HELD_BYTES_MAX: Final = 1 << 20
_MEMBER: Final = re.compile(rb',\s*"usage"\s*:\s*')
_NOTHING: Final = msgspec.Raw(b"")


class _Asking(msgspec.Struct):
    stream: bool | None = False
    stream_options: msgspec.Raw = _NOTHING


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Event(msgspec.Struct):
    choices: msgspec.Raw = _NOTHING
    usage: msgspec.Raw = _NOTHING


_asking: Final = msgspec.json.Decoder(_Asking)
_event: Final = msgspec.json.Decoder(_Event)
_usage: Final = msgspec.json.Decoder(_Usage)


def asking_for_usage(target: bytes, body: bytes) -> bytes | None:
    """The body with usage asked for in every event; ``None``: not streamed, not that API, or the client chose itself."""
    if target.partition(b"?")[0] not in PATHS:
        return None
    asking = _asking.decode(body)
    if not asking.stream or asking.stream_options is not _NOTHING:
        return None
    end = body.rindex(b"}")
    return b"%b,%b%b" % (body[:end], ASKED, body[end:])


class UsageStrip:
    """Takes the bytes of one streamed answer, gives those for the client. ``chunked``: how both are framed."""

    __slots__ = ("_held", "_parser", "_text", "_whole", "chunked", "prompt_tokens", "tokens")

    def __init__(self, *, chunked: bool) -> None:
        self.chunked = chunked
        self.tokens: int | None = None
        self.prompt_tokens: int | None = None
        self._held = b""
        self._text: list[bytes] = []
        self._whole = False
        self._parser = httptools.HttpResponseParser(self)
        if chunked:
            self._parser.feed_data(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")

    def feed(self, data: bytes) -> bytes:
        """What of this goes to the client now; events that are not whole wait. ``data`` was found valid before."""
        if not self.chunked:
            return self._strip(data)
        self._text = []
        self._parser.feed_data(data)
        text = self._strip(b"".join(self._text))
        if self._whole:
            text += self.rest()
        return (chunk(text) if text else b"") + (LAST_CHUNK if self._whole else b"")

    def rest(self) -> bytes:
        """Bytes after the last whole event."""
        held, self._held = self._held, b""
        return held

    def _strip(self, text: bytes) -> bytes:
        *events, self._held = (self._held + text).split(b"\n\n")
        kept = [e for e in map(self._without_usage, events) if e is not None]
        out = b"".join(event + b"\n\n" for event in kept)
        return out + self.rest() if len(self._held) > HELD_BYTES_MAX else out

    def _without_usage(self, event: bytes) -> bytes | None:
        if b'"usage"' not in event or not event.startswith(b"data:"):
            return event
        try:
            found = _event.decode(event[5:])
            if found.usage is _NOTHING:
                return event
            raw = bytes(found.usage)
            if raw != b"null":
                usage = _usage.decode(raw)
                self.tokens = usage.completion_tokens if usage.completion_tokens is not None else self.tokens
                self.prompt_tokens = usage.prompt_tokens or self.prompt_tokens
                if bytes(found.choices).replace(b" ", b"") == b"[]":
                    return None
            return _cut(event, raw)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return event  # not what it was asked for: the client's to understand

    # Callbacks of httptools

    def on_body(self, body: bytes) -> None:
        self._text.append(body)

    def on_message_complete(self) -> None:
        self._whole = True


def _cut(event: bytes, raw: bytes) -> bytes:
    """The event without its ``usage`` member, whose value is ``raw``; written anew only where it is not found as bytes."""
    for match in reversed(list(_MEMBER.finditer(event))):
        if event.startswith(raw, match.end()):
            cut = event[: match.start()] + event[match.end() + len(raw) :]
            if _event.decode(cut[5:]).usage is _NOTHING:
                return cut
    members = msgspec.json.decode(event[5:])
    members.pop("usage", None)
    return b"data: " + msgspec.json.encode(members)
