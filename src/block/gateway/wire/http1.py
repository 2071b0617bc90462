"""HTTP/1.1 as bytes: reading requests strictly (llhttp), writing heads and answers of one's own.

llhttp (through httptools) refuses what request smuggling lives on: content-length beside transfer-encoding, duplicate
or odd lengths, bare LF or CR, folded headers, spaces before the colon. On top of that this module refuses codings
other than plain ``chunked``, missing or double ``Host``, targets that are neither a path nor a whole URL, upgrades, and everything
beyond the limits. Request bodies are read whole (the policy needs the prompt, a retry needs the body) and leave with a
content-length.
"""

import re
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Final

import httptools

HOP_BY_HOP: Final = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
        b"trailer", b"transfer-encoding", b"upgrade", b"expect", b"content-length", b"host",
    }
)  # fmt: skip
"""Request headers that end here: those of one hop, and those that are written anew."""

PIPELINED_MAX: Final = 32
_ABSOLUTE: Final = re.compile(rb"https?://[^/?#@]+((?:[/?].*)?)", re.IGNORECASE)
REASONS: Final[Mapping[int, bytes]] = {status.value: status.phrase.encode() for status in HTTPStatus}
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK: Final = b"0\r\n\r\n"


class ProtocolError(Exception):
    """The client's bytes are not a request that this gateway takes; it is answered once and the connection closed."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class HttpRequest:
    """One request as read. ``fields`` has lower-case names; ``lines`` are the header lines to send on, as they came."""

    __slots__ = ("body", "fields", "keep_alive", "lines", "method", "target", "version")

    def __init__(self) -> None:
        self.method = b""
        self.target = b""
        self.version = "1.1"
        self.fields: dict[bytes, bytes] = {}
        self.lines: list[bytes] = []
        self.body = b""
        self.keep_alive = True

    @property
    def path(self) -> str:
        return self.target.partition(b"?")[0].decode("ascii", "replace")

    def header(self, name: bytes) -> str | None:
        value = self.fields.get(name)
        return None if value is None else value.decode("latin-1").strip()


class RequestReader:
    """Feeds on a client's bytes, calls ``on_request`` for every whole request and ``on_expect`` where one waits for 100.

    ``feed`` raises ProtocolError; the connection is then of no further use. Memory is bounded by the two limits and
    by ``PIPELINED_MAX`` requests of one feed.
    """

    __slots__ = (
        "_body", "_body_bytes", "_error", "_head_bytes", "_header_bytes_max", "_in_head", "_message", "_on_expect",
        "_on_request", "_parser", "_request_bytes_max", "_since_feed", "between",
    )  # fmt: skip

    def __init__(
        self,
        on_request: Callable[[HttpRequest], None],
        on_expect: Callable[[], None],
        *,
        header_bytes_max: int,
        request_bytes_max: int,
    ) -> None:
        self._on_request, self._on_expect = on_request, on_expect
        self._header_bytes_max, self._request_bytes_max = header_bytes_max, request_bytes_max
        self._parser = httptools.HttpRequestParser(self)
        self._error: ProtocolError | None = None
        self._message = HttpRequest()
        self._body: list[bytes] = []
        self._body_bytes = self._head_bytes = self._since_feed = 0
        self._in_head = True
        self.between = True
        """No byte of the next request has come."""

    @property
    def in_head(self) -> bool:
        """A request's head has begun and is not whole."""
        return self._in_head and not self.between

    def feed(self, chunk: bytes) -> None:
        """Take bytes as they came.

        Raises:
            ProtocolError: with the status to answer.
        """
        self._since_feed = 0
        if self._in_head:
            self._head_bytes += len(chunk)
        try:
            self._parser.feed_data(chunk)
        except httptools.HttpParserUpgrade:
            raise ProtocolError(400, "Upgrades and CONNECT are not supported here.") from None
        except httptools.HttpParserError as error:
            raise self._error or ProtocolError(400, f"This is not a valid HTTP/1.1 request: {error}.") from None
        if self._in_head and not self.between and self._head_bytes > self._header_bytes_max + 65536:
            raise self._too_large()

    # Callbacks of httptools. An exception in one ends in HttpParserCallbackError, so what is to be said is kept.

    def on_message_begin(self) -> None:
        self._message = HttpRequest()
        self._body = []
        self._body_bytes = 0
        self._in_head, self.between = True, False
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._message.target += url
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer: nobody may smuggle headers behind the body
        self._count_head(len(name) + len(value) + 4)
        low = name.lower()
        fields = self._message.fields
        if low in fields and low in (b"host", b"content-length", b"transfer-encoding", b"x-request-id"):
            self._fail(400, f"There is more than one {name.decode('latin-1')} header.")
        fields[low] = value
        if low not in HOP_BY_HOP:
            self._message.lines.append(b"%b: %b\r\n" % (name, value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        message, fields = self._message, self._message.fields
        message.method = self._parser.get_method()
        message.version = self._parser.get_http_version()
        message.keep_alive = message.version == "1.1" and self._parser.should_keep_alive()
        if message.version not in ("1.1", "1.0"):
            self._fail(505, "This gateway speaks HTTP/1.1 and HTTP/1.0.")
        if message.version == "1.1" and b"host" not in fields:
            self._fail(400, "The Host header is missing.")
        if not message.target.startswith(b"/"):
            message.target = self._path_of(message)
        coding = fields.get(b"transfer-encoding")
        if coding is not None and (coding.strip().lower() != b"chunked" or message.version == "1.0"):
            self._fail(501, "The only transfer coding that is taken is chunked.")
        length = fields.get(b"content-length")
        if length is not None and (len(length) > 18 or int(length) > self._request_bytes_max):
            self._fail(413, f"The request body is larger than {self._request_bytes_max} bytes.")
        connection = fields.get(b"connection")
        if connection is not None and connection.lower() not in (b"keep-alive", b"close"):
            self._drop_nominated(connection)
        expect = fields.get(b"expect")
        if expect is not None:
            if expect.lower() != b"100-continue":
                self._fail(417, "The only expectation that is met is 100-continue.")
            if message.version == "1.1":
                self._on_expect()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > self._request_bytes_max:
            self._fail(413, f"The request body is larger than {self._request_bytes_max} bytes.")
        self._body.append(body)

    def on_message_complete(self) -> None:
        message, self.between, self._in_head = self._message, True, True
        self._head_bytes = 0
        message.body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body = []
        self._since_feed += 1
        if self._since_feed > PIPELINED_MAX:
            self._fail(400, f"More than {PIPELINED_MAX} requests were sent without waiting for an answer.")
        self._on_request(message)

    def _path_of(self, message: HttpRequest) -> bytes:
        """The path of an absolute target (RFC 9112, 3.2.2), whose authority counts as little as ``Host`` does; or ``*``."""
        absolute = _ABSOLUTE.fullmatch(message.target)
        if absolute is not None:
            return absolute[1] if absolute[1].startswith(b"/") else b"/" + absolute[1]
        if message.target != b"*" or message.method != b"OPTIONS":
            self._fail(400, "The request target must be a path.")
        return message.target

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._header_bytes_max:
            self._fail_with(self._too_large())

    def _too_large(self) -> ProtocolError:
        return ProtocolError(431, f"The request's headers are larger than {self._header_bytes_max} bytes.")

    def _drop_nominated(self, connection: bytes) -> None:
        """Headers that ``Connection`` names belong to this hop only (RFC 9110, 7.6.1)."""
        nominated = tuple(name.strip().lower() + b":" for name in connection.split(b",") if name.strip())
        self._message.lines = [line for line in self._message.lines if not line.lower().startswith(nominated)]

    def _fail(self, status: int, message: str) -> None:
        self._fail_with(ProtocolError(status, message))

    def _fail_with(self, error: ProtocolError) -> None:
        self._error = error
        raise error


def request_head(
    message: HttpRequest, host: bytes, extra: bytes, prefix: bytes = b"", body: bytes | None = None,
    target: bytes | None = None,
) -> bytes:  # fmt: skip
    """The head to send to an instance: the client's lines, the instance's ``Host``, a content-length, ``extra`` lines.

    ``prefix``: the path of the instance's base URL; ``body``, ``target``: what is sent, the client's where none is given.
    """
    body = message.body if body is None else body
    if body or message.method in (b"POST", b"PUT", b"PATCH"):
        extra += b"content-length: %d\r\n" % len(body)
    lines = b"".join(message.lines)
    target = message.target if target is None else target
    return b"%b %b%b HTTP/1.1\r\nhost: %b\r\n%b%b\r\n" % (message.method, prefix, target, host, lines, extra)


def answer_head(status: int, lines: bytes) -> bytes:
    """Status line, ``lines`` (each with its CRLF) and the empty line."""
    return b"HTTP/1.1 %d %b\r\n%b\r\n" % (status, REASONS.get(status, b""), lines)


def whole_answer(status: int, body: bytes, content_type: bytes, extra: bytes = b"", *, keep_alive: bool) -> bytes:
    """A whole answer with a body that is at hand."""
    lines = b"content-type: %b\r\ncontent-length: %d\r\n%b%b" % (
        content_type, len(body), extra, b"" if keep_alive else b"connection: close\r\n",
    )  # fmt: skip
    return answer_head(status, lines) + body


def chunk(body: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(body), body)


class Unchunked:
    """For a client of HTTP/1.0: called with the bytes of a chunked answer, writes what is in the chunks."""

    __slots__ = ("_parser", "_write")

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._parser = httptools.HttpResponseParser(self)
        self._parser.feed_data(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")

    def __call__(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._write(body)
