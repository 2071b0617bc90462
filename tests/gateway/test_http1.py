"""The parser's gate: what smuggling lives on is refused, whatever comes ends in an answer or a closed connection."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from block.gateway.wire.answers import AnswerReader, end_of_whole_chunks
from block.gateway.wire.http1 import HttpRequest, ProtocolError, RequestReader, chunk, request_head
from gateway.conftest import Start
from gateway.fakes import FakeEngine

GOOD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"


def read(
    data: bytes, *, header_bytes_max: int = 8192, request_bytes_max: int = 100_000, step: int = 0
) -> list[HttpRequest]:
    requests: list[HttpRequest] = []
    reader = RequestReader(
        requests.append, lambda: None, header_bytes_max=header_bytes_max, request_bytes_max=request_bytes_max
    )
    for at in range(0, len(data), step or len(data)):
        reader.feed(data[at : at + (step or len(data))])
    return requests


REFUSED = {
    "length and chunked": (400, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "chunked and length": (400, b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"),
    "two lengths": (400, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n{}"),
    "length list": (400, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2, 2\r\n\r\n{}"),
    "negative length": (400, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -2\r\n\r\n{}"),
    "plus length": (400, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +2\r\n\r\n{}"),
    "hex length": (400, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0x2\r\n\r\n{}"),
    "huge length": (400, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\n{}"),
    "bare LF": (400, b"POST / HTTP/1.1\nHost: x\nContent-Length: 2\n\n{}"),
    "bare LF in head": (400, b"POST / HTTP/1.1\r\nHost: x\nContent-Length: 2\r\n\r\n{}"),
    "bare CR in head": (400, b"POST / HTTP/1.1\r\nHost: x\rContent-Length: 2\r\n\r\n{}"),
    "folded header": (400, b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n"),
    "space before colon": (400, b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length : 2\r\n\r\n"),
    "NUL in value": (400, b"GET / HTTP/1.1\r\nHost: x\x00\r\n\r\n"),
    "empty name": (400, b"GET / HTTP/1.1\r\nHost: x\r\n: y\r\n\r\n"),
    "xchunked": (501, b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
    "chunked twice": (400, b"POST / HTTP/1.1\r\nHost: x\r\n" + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n0\r\n\r\n"),
    "gzip, chunked": (501, b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    "chunked in 1.0": (501, b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "LF chunk size": (400, b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\nx\r\n0\r\n\r\n"),
    "bad chunk size": (400, b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\nx\r\n0\r\n\r\n"),
    "no host": (400, b"GET / HTTP/1.1\r\n\r\n"),
    "two hosts": (400, b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n"),
    "absolute target of another scheme": (400, b"GET ftp://evil/ HTTP/1.1\r\nHost: x\r\n\r\n"),
    "absolute target with a user": (400, b"GET http://me@evil/ HTTP/1.1\r\nHost: x\r\n\r\n"),
    "star for another method": (400, b"GET * HTTP/1.1\r\nHost: x\r\n\r\n"),
    "authority target": (400, b"CONNECT evil:80 HTTP/1.1\r\nHost: x\r\n\r\n"),
    "upgrade": (400, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"),
    "HTTP/2 preface": (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/0.9": (505, b"GET /\r\n\r\n"),
    "TLS hello": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    "odd expectation": (417, b"POST / HTTP/1.1\r\nHost: x\r\nExpect: miracle\r\nContent-Length: 2\r\n\r\n{}"),
    "body too large": (413, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100001\r\n\r\n"),
    "chunked body too large": (413, b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"x" * 60_000) * 2),
    "head too large": (431, b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 9000 + b"\r\n\r\n"),
    "target too long": (431, b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"),
    "too many at once": (400, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 40),
}  # fmt: skip


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"http://x/v1/a?b=c", b"/v1/a?b=c"),
        (b"HTTPS://x:8000", b"/"),
        (b"http://x?b=/", b"/?b=/"),
        (b"http://evil//a", b"//a"),
    ],
)
def test_of_an_absolute_target_the_path_is_taken(target: bytes, path: bytes) -> None:
    (request,) = read(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % target)
    assert request.target == path


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("step", [0, 1])
def test_refused(case: str, step: int) -> None:
    status, data = REFUSED[case]
    if case == "too many at once" and step:
        pytest.skip("one at a time they are fine")
    with pytest.raises(ProtocolError) as caught:
        read(data, step=step)
    assert caught.value.status == status


def test_a_head_without_end_is_refused_before_it_fills_memory() -> None:
    with pytest.raises(ProtocolError) as caught:
        read(b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 200_000, step=4096)
    assert caught.value.status == 431


def test_headers_behind_a_chunked_body_are_dropped() -> None:
    (request,) = read(
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX-Evil: 1\r\n\r\n"
    )
    assert (request.body, request.lines) == (b"{}", [])
    assert b"x-evil" not in request.fields


def test_headers_of_this_hop_are_not_sent_on() -> None:
    (request,) = read(
        b"POST / HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: 5\r\nTE: trailers\r\n"
        b"Proxy-Authorization: s\r\nX-Mine: 2\r\nContent-Length: 2\r\n\r\n{}"
    )
    assert request_head(request, b"engine:1", b"") == (
        b"POST / HTTP/1.1\r\nhost: engine:1\r\nX-Mine: 2\r\ncontent-length: 2\r\n\r\n"
    )


@given(st.binary(max_size=300), st.integers(1, 40))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_requests_or_refused(data: bytes, step: int) -> None:
    with contextlib.suppress(ProtocolError):
        read(data or b" ", step=step)


SPLICES = st.sampled_from(
    [
        b"\r\n",
        b"\n",
        b"\r",
        b":",
        b" ",
        b"0",
        b"Content-Length: 3\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"\x00",
        b";",
        b"GET / ",
    ]
)


@given(st.integers(0, len(GOOD)), SPLICES, st.integers(0, 5), st.integers(1, 80))
@settings(max_examples=500, deadline=None)
def test_mutated_requests_mean_the_same_to_the_engine_or_are_refused(
    at: int, splice: bytes, cut: int, step: int
) -> None:
    """What is sent on is read back as exactly one request with the same body: nothing can hide in it."""
    data = GOOD[:at] + splice + GOOD[at + cut :]
    try:
        requests = read(data, step=step)
    except ProtocolError:
        return
    for request in requests:
        head = request_head(request, b"engine:1", b"")
        again = read(head + request.body)
        assert len(again) == 1
        assert (again[0].body, again[0].method, again[0].target) == (request.body, request.method, request.target)


@given(st.binary(min_size=1, max_size=400), st.integers(1, 50))
@settings(max_examples=300, deadline=None)
def test_any_bytes_from_an_instance_are_an_answer_or_refused(data: bytes, step: int) -> None:
    reader = AnswerReader()
    with contextlib.suppress(ValueError):
        for at in range(0, len(data), step):
            part: bytes | None = data[at : at + step]
            if reader.head is None:
                part = reader.feed_head(part or b"")
            if part and reader.head is not None and not reader.whole:
                reader.feed_body(part)


@given(st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=6), st.data())
@settings(max_examples=200, deadline=None)
def test_an_answers_end_is_found_wherever_it_is_cut(bodies: list[bytes], data: st.DataObject) -> None:
    coded = b"".join(map(chunk, bodies)) + b"0\r\n\r\n"
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + coded
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=5)))
    reader, body, whole = AnswerReader(), b"", False
    for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        part: bytes | None = raw[start:end]
        if part and reader.head is None:
            part = reader.feed_head(part)
        if part:
            assert not whole
            whole = reader.feed_body(part)
            body += part
            if reader.aligned and not whole:
                assert end_of_whole_chunks(body) == len(body)
    assert whole
    assert body == coded


@pytest.mark.parametrize("extra", [b"X", b"\r\n", b"HTTP/1.1 200 OK\r\n\r\n"])
@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    ],
)
def test_bytes_after_an_answer_are_an_error(raw: bytes, extra: bytes) -> None:
    reader = AnswerReader()
    rest = reader.feed_head(raw + extra)
    assert rest is not None
    with pytest.raises(ValueError, match=r"bytes|broken"):
        reader.feed_body(rest)


def test_an_interim_answer_is_skipped() -> None:
    reader = AnswerReader()
    assert (
        reader.feed_head(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        == b"{}"
    )
    assert reader.head is not None
    assert (reader.head.status, reader.head.length, b"link" in reader.head.fields) == (200, 2, False)


@pytest.mark.parametrize("case", ["length and chunked", "bare LF", "body too large", "TLS hello"])
async def test_on_a_socket_the_refusal_is_an_openai_error_and_the_connection_closes(start: Start, case: str) -> None:
    engine = FakeEngine()
    client = await start(engine, request_bytes_max=100_000)
    got = await client.raw(REFUSED[case][1])
    assert got.startswith(b"HTTP/1.1 %d " % REFUSED[case][0])
    assert b"connection: close" in got
    assert b'{"error":{"message":"' in got
    assert engine.heard == []


async def test_slow_clients_are_cut_off(start: Start) -> None:
    client = await start(FakeEngine(), header_timeout_s=0.2, body_timeout_s=0.2, idle_timeout_s=0.2)
    assert (await client.raw(b"GET / HTTP/1.1\r\nHost: x\r\n", 3)).startswith(b"HTTP/1.1 408")
    assert (await client.raw(GOOD[:-1], 3)).startswith(b"HTTP/1.1 408")
    assert await client.raw(b"", 3) == b""


async def test_connections_are_limited(start: Start) -> None:
    client = await start(FakeEngine(), connections_max=1)
    await client.get("/health")  # the session keeps this one open
    assert (await client.raw(GOOD)).startswith(b"HTTP/1.1 503")


@given(data=st.binary(min_size=1, max_size=200))
@settings(max_examples=30, deadline=None)
def test_fuzz_is_repeatable(data: bytes) -> None:
    """The parser keeps no state between connections."""

    def outcome() -> object:
        try:
            return [(r.method, r.target, r.body) for r in read(data)]
        except ProtocolError as error:
            return error.status

    assert outcome() == outcome()
