"""Request smuggling: framing that two parsers could read in two ways is refused, and nothing hidden is ever answered."""

import asyncio
from typing import Final

from block.conformance.check import RFC9110, RFC9112, Check, FailedError, Run, expect
from block.conformance.target import CHAT, Target

_HIDDEN: Final = b"GET /health HTTP/1.1\r\nHost: hidden\r\n\r\n"


async def _must_refuse(target: Target, sent: bytes, *, may_close: bool = False) -> None:
    """Send and look: a 4xx, 501 or 505, or an end without an answer. ``may_close``: one ordinary answer is as good if the
    connection ends behind it (RFC 9112, 6.1), for then nothing hidden in it is read as a request.
    """
    async with target.wire() as wire:
        await wire.send(sent)
        await wire.read_until_quiet(target.quiet_s)
        statuses, closed = wire.statuses, wire.closed
    expect(statuses or closed, "neither an answer nor an end of the connection comes")
    expect(wire.broken is None, wire.broken or "")
    expect(
        len(statuses) < 2 or statuses[0] < 400 or statuses[1] >= 400,
        f"what is hidden behind it is answered: {statuses}",
    )
    if not statuses or 400 <= statuses[0] < 500 or statuses[0] in (501, 505):
        expect(
            len(statuses) < 2 and closed, "it is refused, but the connection stays open for what is hidden behind it"
        )
        return
    if len(statuses) > 1 or not may_close or not closed:
        raise FailedError(f"it is taken: {statuses}{'' if closed else ', and the connection stays open'}")


def _head(*lines: str, version: str = "1.1") -> Run:
    """A check that sends a chat request with these framing lines, a chunked end and a hidden request."""

    async def run(target: Target) -> None:
        head = target.head("POST", CHAT, "Content-Type: application/json", *lines, version=version)
        await _must_refuse(target, head + b"0\r\n\r\n" + _HIDDEN, may_close=_tells_coding(lines))

    return run


def _tells_coding(lines: tuple[str, ...]) -> bool:
    return "Transfer-Encoding: chunked" in lines


def _body(body: bytes) -> Run:
    """A check that sends a chunked chat request with this broken body."""

    async def run(target: Target) -> None:
        head = target.head("POST", CHAT, "Content-Type: application/json", "Transfer-Encoding: chunked")
        await _must_refuse(target, head + body + _HIDDEN)

    return run


def _get(*lines: str, host: bool = True) -> Run:
    """A check that sends a GET with these lines."""

    async def run(target: Target) -> None:
        await _must_refuse(target, target.head("GET", "/v1/models", *lines, host=host))

    return run


async def bare_lf(target: Target) -> None:
    await _must_refuse(target, target.head("GET", "/v1/models").replace(b"\r\n", b"\n"))


async def no_open_proxy(target: Target) -> None:
    came = asyncio.Event()

    async def take(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.set()
        writer.close()

    async with target.wire() as wire:
        listener = await asyncio.start_server(take, wire.local_address, 0)
        async with listener:
            elsewhere = f"{wire.local_address}:{listener.sockets[0].getsockname()[1]}"
            lines = f"GET http://{elsewhere}/secret HTTP/1.1\r\nHost: {elsewhere}\r\n"
            named = "".join(f"{name}: {elsewhere}\r\n" for name in _TARGET_HEADERS)
            await wire.send((lines + named + "\r\n").encode())
            await wire.read_until_quiet(target.quiet_s)
        async with target.wire() as second:
            await second.send(target.post(target.chat(), *(f"{name}: {elsewhere}" for name in _TARGET_HEADERS)))
            await second.read_until_quiet(target.quiet_s)
    expect(not came.is_set(), "it opens connections to an address that a client names")


_TARGET_HEADERS: Final = (
    "X-Forwarded-Host",
    "X-Gateway-Destination-Endpoint",
    "X-SMG-Target-Worker",
    "X-Prefiller-Host-Port",
)
_OVERFLOW: Final = b"1" + b"0" * 16 + b"\r\n"
CHECKS: Final = (
    Check("length-and-coding", "A content-length beside a transfer-encoding is refused, or the connection ends.", RFC9112 + "6.1",
          _head("Content-Length: 5", "Transfer-Encoding: chunked")),
    Check("two-lengths", "Two different content-lengths are refused.", RFC9112 + "6.3",
          _head("Content-Length: 5", "Content-Length: 0")),
    Check("length-list", "A content-length with two different values is refused.", RFC9110 + "8.6", _head("Content-Length: 5, 0")),
    Check("length-sign", "A content-length with a sign is refused.", RFC9110 + "8.6", _head("Content-Length: +5")),
    Check("length-not-a-number", "A content-length that is no number is refused.", RFC9110 + "8.6", _head("Content-Length: 0x5")),
    Check("length-overflow", "A content-length beyond 64 bits is refused.", RFC9110 + "8.6",
          _head("Content-Length: 18446744073709551621")),
    Check("coding-unknown", "A transfer coding that is not known is refused.", RFC9112 + "6.1",
          _head("Transfer-Encoding: xchunked")),
    Check("coding-not-last", "A transfer-encoding that does not end in chunked is refused.", RFC9112 + "6.3",
          _head("Transfer-Encoding: chunked, identity")),
    Check("coding-space", "A space before a header's colon is refused.", RFC9112 + "5.1",
          _head("Content-Length: 5", "Transfer-Encoding : chunked")),
    Check("coding-http-1.0", "A transfer-encoding in HTTP/1.0 is refused, or the connection ends.", RFC9112 + "6.1",
          _head("Content-Length: 5", "Transfer-Encoding: chunked", version="1.0")),
    Check("folded-header", "A folded framing header is refused.", RFC9112 + "5.2",
          _head("Content-Length: 5", "Transfer-Encoding:\r\n chunked"), required=False),
    Check("bare-cr", "A bare CR inside a header is refused.", RFC9112 + "2.2", _get("X-A: b\rX-C: d"), required=False),
    Check("bare-lf", "Lines that end in a bare LF are refused.", RFC9112 + "2.2", bare_lf, required=False),
    Check("nul", "A NUL inside a header is refused.", RFC9110 + "5.5", _get("X-A: b\0c"), required=False),
    Check("chunk-size", "A chunk size that is no hexadecimal number is refused.", RFC9112 + "7.1", _body(b"0x0\r\n\r\n")),
    Check("chunk-size-negative", "A negative chunk size is refused.", RFC9112 + "7.1", _body(b"-1\r\n\r\n")),
    Check("chunk-overflow", "A chunk size beyond 64 bits is refused.", RFC9112 + "7.1", _body(_OVERFLOW)),
    Check("chunk-end", "A chunk that is longer than its size is refused.", RFC9112 + "7.1", _body(b"2\r\n{}xx\r\n0\r\n\r\n")),
    Check("host-missing", "An HTTP/1.1 request without Host gets 400.", RFC9112 + "3.2", _get(host=False)),
    Check("host-twice", "A request with two Hosts gets 400.", RFC9112 + "3.2", _get("Host: hidden")),
    Check("no-open-proxy", "An address that a client names is never connected to.", RFC9110 + "7.6", no_open_proxy),
)  # fmt: skip
