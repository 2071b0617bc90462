"""Whatever a client sends, the gateway neither breaks nor lets an engine hear what was not asked of it."""

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from block.gateway.config import GatewayConfig, InstanceConfig
from block.gateway.serve import Gateway
from gateway.conftest import QUICK
from gateway.fakes import FakeEngine, Heard, answer, well

FAST = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
SMUGGLED = b"/v1/embeddings?smuggled"


async def takes_anything(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
    """Answers as asked where it understands, and anyway."""
    try:
        understood = isinstance(heard.json, dict)
    except (ValueError, RecursionError):
        understood = False
    if understood:
        await well(engine, heard, writer)
    else:
        writer.write(answer(b'{"error":{"message":"?","type":"x","param":null,"code":null}}', "400 Bad Request"))


class Running:
    """A gateway with the whole machinery behind it (a modelled engine, predictions, continuation), in a thread of its own."""

    def __init__(self) -> None:
        self.engine = FakeEngine(takes_anything)
        self.port = 0
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: uvloop.run(self._run()))
        self._thread.start()
        assert self._ready.wait(10)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self.engine.start()
        instance = InstanceConfig(url=self.engine.url, name="e0", profile="h200-llama3.1-8b", num_gpu_blocks=4096)
        options = QUICK | {
            "instances": [instance],
            "policy": "block",
            "continue_streams": 2,
            "request_bytes_max": 1 << 20,
        }
        gateway = Gateway(GatewayConfig(**options))
        await gateway.start()
        while any(i.state == "starting" for i in gateway.pool.instances.values()):  # noqa: ASYNC110  no event for it
            await asyncio.sleep(0.01)
        self.gateway, self.port = gateway, gateway.port
        self._ready.set()
        await self._stop.wait()
        await gateway.close()
        await self.engine.stop()

    def stop(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def raw(self, data: bytes, step: int = 0) -> bytes:
        """What comes back for these bytes before the gateway closes, or falls silent for long enough."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=0.05) as connection:
            got = b""
            try:
                for at in range(0, len(data), step or max(len(data), 1)):
                    connection.sendall(data[at : at + (step or len(data))])
                while part := connection.recv(65536):
                    got += part
            except (TimeoutError, ConnectionError):
                pass
        return got

    def post(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("POST", path, body, {"content-type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    gateway = Running()
    yield gateway
    dispatcher = gateway.gateway.dispatcher
    gateway.stop()
    assert not dispatcher.active
    assert all((i.in_flight, i.streaming) == (0, 0) for i in gateway.gateway.pool.instances.values())


def statuses(got: bytes) -> list[int]:
    return [int(part[:3]) for part in got.split(b"HTTP/1.1 ")[1:] if part[:3].isdigit()]


PIECES = st.sampled_from(
    [
        b"POST /v1/completions HTTP/1.1\r\n",
        b"GET /health HTTP/1.1\r\n",
        b"Host: x\r\n",
        b"Content-Length: 2\r\n",
        b"\r\n",
        b"{}",
        b"Content-Length: 0\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding:\x0bchunked\r\n",
        b"0\r\n\r\n",
        b"2\r\n{}\r\n",
        b"POST " + SMUGGLED + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
        b"\n",
        b"\r",
        b"Content-Length: 99\r\n",
        b"X: y\n",
        b"Expect: 100-continue\r\n",
        b"Connection: close\r\n",
        b"Connection: content-length\r\n",
        b"\x00",
        b"\xff\xfe",
        b"%2e%2e/",
        b" ",
    ],
)
WIRE = st.one_of(st.binary(max_size=200), st.lists(PIECES, max_size=12).map(b"".join))


@given(data=WIRE, step=st.sampled_from([0, 1, 7]))
@FAST
def test_any_bytes_on_a_connection_end_in_no_server_error(running: Running, data: bytes, step: int) -> None:
    got = running.raw(data, step)
    assert not [status for status in statuses(got) if status >= 500 and status not in (501, 505)], got


BODY = b"0\r\n\r\nPOST " + SMUGGLED + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
FRAMINGS = st.lists(
    st.sampled_from(
        [
            b"Content-Length: %d\r\n" % len(BODY),
            b"Content-Length: 5\r\n",
            b"Content-Length:5\r\n",
            b"content-length : 5\r\n",
            b"Transfer-Encoding: chunked\r\n",
            b"Transfer-Encoding: identity\r\n",
            b"Transfer-Encoding: chunked, identity\r\n",
            b"Transfer-Encoding : chunked\r\n",
            b"Transfer-encoding: cow\r\n",
            b" Transfer-Encoding: chunked\r\n",
            b"X: a\nTransfer-Encoding: chunked\r\n",
            b"Content-Length: 5, 5\r\n",
            b"Content-Length: +5\r\n",
            b"Content-Length: 0x5\r\n",
            b"Foo: bar\r\nTransfer-Encoding:\tchunked\r\n",
            b'Transfer-Encoding: "chunked"\r\n',
            b"Content-Length: 5\r\n\tfolded: 1\r\n",
            b"Connection: Transfer-Encoding\r\n",
        ]
    ),
    min_size=1,
    max_size=3,
)


@given(framing=FRAMINGS, version=st.sampled_from([b"1.1", b"1.0"]))
@FAST
def test_an_engine_hears_one_request_where_the_client_sent_one(
    running: Running, framing: list[bytes], version: bytes
) -> None:
    """The body looks like a second request to whoever takes another length for the right one."""
    running.engine.heard.clear()
    running.raw(b"POST /v1/completions HTTP/" + version + b"\r\nHost: x\r\n" + b"".join(framing) + b"\r\n" + BODY)
    inner = any(f"{heard.path}".endswith("smuggled") for heard in running.engine.heard)
    lengths = [line for line in framing if line.lower().startswith((b"content-length", b"transfer-encoding"))]
    if len(lengths) == 1 and lengths[0] in (
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\n",
        b"Content-Length:5\r\n",
    ):
        return  # then the second one really is one: pipelined by the client itself
    if framing == [b"Foo: bar\r\nTransfer-Encoding:\tchunked\r\n"] or not lengths:
        return
    assert not inner or _pipelined(framing), framing


def _pipelined(framing: list[bytes]) -> bool:
    """By RFC 9112 the body ends before what looks like a second request."""
    text = b"".join(framing)
    codings = [line for line in text.split(b"\r\n") if line.lower().startswith(b"transfer-encoding:")]
    if codings:
        return (
            len(codings) == 1 and codings[0].partition(b":")[2].strip() == b"chunked" and b"ontent-Length" not in text
        )
    return all(
        line.partition(b":")[2].strip() == b"5"
        for line in text.split(b"\r\n")
        if line.lower().startswith(b"content-length")
    )


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 3), st.sampled_from([2**31, 2**63, 10**30, -(10**30), 1 << 24]),
    st.floats(), st.text(max_size=8), st.sampled_from(["fake", "", "\x00", "\ud800", "9" * 400]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["model", "prompt", "messages", "input", "stream", "max_tokens", "max_completion_tokens", "max_output_tokens", "ignore_eos",
     "priority", "n", "seed", "stream_options", "temperature", "min_tokens", "stop", "return_token_ids",
     "user", "tools", "logit_bias"]
)  # fmt: skip
PATHS = st.sampled_from(
    ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings", "/tokenize"]
)


@given(path=PATHS, fields=st.dictionaries(FIELDS, VALUES, max_size=6), named=st.booleans(), stream=st.booleans())
@FAST
def test_any_json_gets_an_answer_or_is_the_clients_mistake(
    running: Running, path: str, fields: dict[str, Any], named: bool, stream: bool
) -> None:
    body = ({"model": "fake"} if named else {}) | ({"stream": True} if stream else {}) | fields
    status, answer = running.post(path, json.dumps(body).encode("utf-8", "surrogatepass"))
    assert status < 500, answer
    if status >= 400 and status != 404:
        assert set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}


HOSTILE = {
    "deep": b'{"prompt":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "deep messages": b'{"messages":[' + b'{"a":' * 20_000 + b"1" + b"}" * 20_000 + b"]}",
    "not json": b"\xff\xfe\x00",
    "two objects": b"{}{}",
    "an array": b"[]",
    "duplicate keys": b'{"model":"fake","model":"nobody","stream":false,"stream":true}',
    "a huge number": b'{"max_tokens":' + b"9" * 5000 + b"}",
    "an exponent": b'{"max_tokens":1e400}',
    "NaN": b'{"max_tokens":NaN}',
    "a lone surrogate": b'{"prompt":"\\ud800","model":"fake"}',
    "raw control bytes": b'{"prompt":"\x01\x02"}',
    "nothing": b"",
    "blanks": b" " * 1000,
    "large ids": b'{"prompt":[' + b"4294967295," * 1000 + b'1],"stream":true}',
    "a BOM": b"\xef\xbb\xbf{}",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
def test_hostile_bodies(running: Running, name: str, path: str) -> None:
    status, answer = running.post(path, HOSTILE[name])
    assert status < 500, answer


VALUE = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40),
)
HEADERS = st.dictionaries(
    st.sampled_from(
        ["x-request-id", "x-slo-ttft-ms", "x-slo-tpot-ms", "x-slo-e2e-ms", "x-session-id", "authorization", "x-priority",
         "traceparent", "x-llm-d-slo-ttft-ms", "accept-encoding", "x-smg-target-worker", "x-gateway-destination-endpoint-subset",
         "x-llm-d-inference-objective", "x-block-continued-tokens", "x-data-parallel-host-port", "connection", "te", "cookie"]
    ),
    VALUE, max_size=4,
)  # fmt: skip


@given(headers=HEADERS)
@FAST
def test_any_header_values_get_an_answer_or_are_the_clients_mistake(running: Running, headers: dict[str, str]) -> None:
    status, answer = running.post("/v1/chat/completions", b'{"model":"fake","messages":[]}', headers)
    nobody = status == 503 and "x-gateway-destination-endpoint-subset" in headers  # those that it names are not here
    assert status < 500 or nobody, answer


def test_the_api_keeps_what_its_openapi_document_says(running: Running) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{running.port}/openapi.json")
    seen = 0
    for operation in schema.get_all_operations():

        @given(case=operation.ok().as_strategy())
        @settings(FAST, max_examples=8)
        def check(case: Any) -> None:
            case.call_and_validate(timeout=5)

        check()
        seen += 1
    assert seen >= 10
