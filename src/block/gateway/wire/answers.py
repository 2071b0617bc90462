"""Reading an instance's answer: the head as a value, the body as the very bytes that came, and where it ends."""

from typing import Final, NamedTuple

import httptools

RESPONSE_DROPPED: Final = frozenset(
    {b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-connection", b"trailer", b"upgrade", b"x-request-id"}
)


def end_of_whole_chunks(data: bytes) -> int:
    """Where the last whole chunk ends in bytes that begin with a chunk (and were found valid by llhttp)."""
    at = 0
    while (line_end := data.find(b"\r\n", at)) >= 0:
        size = int(data[at:line_end].partition(b";")[0], 16)
        after = line_end + 2 + size + 2
        if not size or after > len(data):  # the last chunk is whole only with its trailers: let it wait for them
            break
        at = after
    return at


class AnswerHead(NamedTuple):
    """The head of an instance's answer. ``length``: of its body, ``None`` where it is chunked or ends with the connection."""

    status: int
    fields: dict[bytes, bytes]
    lines: list[bytes]
    length: int | None
    chunked: bool
    keep_alive: bool


class AnswerReader:
    """Reads one answer of an instance: the head as a value, the body as the very bytes that came.

    ``feed_head`` takes bytes until the head is whole and returns it with the body bytes behind it; ``feed_body`` returns
    whether the body is whole. ``aligned``: what was fed ends where a chunk ends, so something of one's own can follow.
    Both raise ValueError on bytes that are no HTTP answer, or that go beyond its end: those must not reach a client,
    who would take them for the next answer.
    """

    __slots__ = (
        "_buffer",
        "_complete",
        "_fields",
        "_in_chunk",
        "_lines",
        "_parser",
        "_remaining",
        "aligned",
        "bodiless",
        "head",
    )

    HEAD_BYTES_MAX: Final = 65536

    def __init__(self) -> None:
        self.bodiless = False
        """It answers HEAD: whatever its head says of a body, none follows."""
        self._begin()

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._buffer = b""
        self._fields: dict[bytes, bytes] = {}
        self._lines: list[bytes] = []
        self._complete = self._in_chunk = False
        self._remaining: int | None = None
        self.head: AnswerHead | None = None
        self.aligned = True

    def feed_head(self, data: bytes) -> bytes | None:
        """The bytes behind the head once it is whole (``head`` is then set), ``None`` before."""
        data = self._buffer + data if self._buffer else data
        end = data.find(b"\r\n\r\n")
        if not b"HTTP/1.".startswith(data[:7]) or (end < 0 and len(data) > self.HEAD_BYTES_MAX):
            raise ValueError("not an HTTP/1.1 answer")
        if end < 0:
            self._buffer = data
            return None
        self._buffer = b""
        try:
            self._parser.feed_data(data[: end + 4])
        except httptools.HttpParserError as error:
            raise ValueError(f"not a valid HTTP answer: {error}") from None
        status = self._parser.get_status_code()
        if status < 200:  # an interim answer: the real one follows
            self._begin()
            return self.feed_head(data[end + 4 :])
        self._take_head(status)
        return data[end + 4 :]

    def _take_head(self, status: int) -> None:
        fields = self._fields
        coding, length = fields.get(b"transfer-encoding"), fields.get(b"content-length")
        if coding is not None and coding.strip().lower() != b"chunked":
            raise ValueError(f"transfer coding {coding.decode('latin-1')!r}")
        if status in (204, 304) or self.bodiless:
            self._remaining = 0
        elif length is not None:
            self._remaining = int(length)
        keep_alive = self._parser.should_keep_alive() if coding is not None or self._remaining is not None else False
        chunked = coding is not None and self._remaining is None
        self.head = AnswerHead(status, fields, self._lines, self._remaining, chunked, keep_alive)

    @property
    def chunked(self) -> bool:
        return self.head is not None and self.head.chunked

    @property
    def whole(self) -> bool:
        """The body is complete (a body without framing never is before the connection ends)."""
        return self._complete or self._remaining == 0

    def feed_body(self, data: bytes) -> bool:
        """Note body bytes; whether the body is whole now."""
        if self._remaining is not None:
            self._remaining -= len(data)
            if self._remaining < 0:
                raise ValueError("more bytes than its content-length")
            return self._remaining == 0
        if self.head is None or not self.head.chunked:
            return False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise ValueError(f"broken chunked coding: {error}") from None
        if self._complete and (data.endswith(b"\r\n\r\n\r\n") or not data.endswith(b"\n")):
            raise ValueError("bytes after the last chunk")
        self.aligned = not self._in_chunk and data.endswith(b"\n")
        return self._complete

    # Callbacks of httptools

    def on_message_begin(self) -> None:
        if self._complete:
            raise ValueError("a second answer that nobody asked for")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.head is not None:
            return  # trailers go through as bytes
        low = name.lower()
        self._fields[low] = value
        if low not in RESPONSE_DROPPED:
            self._lines.append(b"%b: %b\r\n" % (name, value))

    def on_chunk_header(self) -> None:
        self._in_chunk = True

    def on_chunk_complete(self) -> None:
        self._in_chunk = False

    def on_message_complete(self) -> None:
        self._complete = True
