"""Clients as they come: HTTP/1.0, whole URLs, browsers' pages, slashes, other ids."""

import asyncio
import json

import pytest

from gateway.conftest import Start, until
from gateway.fakes import STREAM_HEAD, FakeEngine, Heard, answer, chunk, event

BODY = b'{"model":"fake","messages":[]}'
STREAM = b'{"model":"fake","stream":true}'
PAGE = "https://chat.example"


def request(line: bytes, body: bytes = b"", headers: bytes = b"") -> bytes:
    return b"%b\r\nHost: x\r\nContent-Length: %d\r\n%b\r\n%b" % (line, len(body), headers, body)


async def test_a_client_of_http_1_0_gets_a_stream_without_chunks(start: Start) -> None:
    client = await start(FakeEngine())
    got = await client.raw(request(b"POST /v1/chat/completions HTTP/1.0", STREAM))
    head, _, body = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head
    assert body == b"".join(event(f" t{n}") for n in range(4)) + b"data: [DONE]\n\n"


async def test_a_client_of_http_1_0_is_told_when_its_stream_breaks(start: Start) -> None:
    async def breaks(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + chunk(event(" t0")))
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.transport.abort()

    client = await start(FakeEngine(breaks))
    got = await client.raw(request(b"POST /v1/chat/completions HTTP/1.0", STREAM))
    body = got.partition(b"\r\n\r\n")[2]
    assert body.startswith(event(" t0") + b'data: {"error":')
    assert b"[DONE]" not in body


async def test_a_retried_stream_of_http_1_0_may_end_as_a_plain_answer(start: Start) -> None:
    async def head_only(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD)
        await writer.drain()
        writer.transport.abort()

    async def plain(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b'{"id":"x"}'))

    client = await start(FakeEngine(head_only), FakeEngine(plain))
    for _ in range(2):
        got = await client.raw(request(b"POST /v1/chat/completions HTTP/1.0", STREAM))
        assert got.endswith(b'\r\n\r\n{"id":"x"}')


async def test_a_target_may_be_a_whole_url_and_leads_nowhere_else(start: Start) -> None:
    engine = FakeEngine()
    client = await start(engine)
    got = await client.raw(
        request(b"POST http://evil.example/v1/chat/completions HTTP/1.1", BODY, b"Connection: close\r\n")
    )
    assert got.startswith(b"HTTP/1.1 200 OK")
    assert (engine.heard[0].path, engine.heard[0].headers["host"]) == (
        "/v1/chat/completions",
        f"127.0.0.1:{engine.port}",
    )


@pytest.mark.parametrize("path", ["/health/", "/ready/", "/metrics/", "/v1/models/"])
async def test_a_slash_behind_a_route_is_taken_off(start: Start, path: str) -> None:
    assert (await (await start(FakeEngine())).get(path))[0] == 200


async def test_a_slash_behind_a_generating_route_does_not_reach_the_engine(start: Start) -> None:
    engine = FakeEngine()
    client = await start(engine)
    status, _, headers = await client.post("/v1/chat/completions/?a=b")
    assert (status, engine.heard[0].path) == (200, "/v1/chat/completions?a=b")
    assert headers["x-gateway-destination-endpoint"] == headers["x-gateway-destination-endpoint-served"] == "e0"


async def test_a_method_that_is_not_allowed_is_told_which_are(start: Start) -> None:
    client = await start(FakeEngine())
    for method, path, allowed in (
        ("GET", "/v1/chat/completions", "POST, OPTIONS"),
        ("POST", "/health", "GET, HEAD, OPTIONS"),
        ("DELETE", "/v1/models", "GET, HEAD, OPTIONS"),
    ):
        async with client.session.request(method, client.url + path) as got:
            assert (got.status, got.headers["allow"]) == (405, allowed)
    async with client.session.options(client.url + "/v1/completions") as got:
        assert (got.status, got.headers["allow"]) == (204, "POST, OPTIONS")


async def test_every_error_has_a_request_id(start: Start) -> None:
    client = await start(FakeEngine())
    for body, status in ((b"{", 400), (b'{"model":"other"}', 404)):
        async with client.session.post(client.url + "/v1/chat/completions", data=body) as got:
            assert got.status == status
            assert len(got.headers["x-request-id"]) == 32


async def test_a_compressed_body_is_refused_by_name(start: Start) -> None:
    client = await start(FakeEngine())
    status, body, _ = await client.post(headers={"content-encoding": "gzip"})
    assert (status, json.loads(body)["error"]["code"]) == (415, "unsupported_content_encoding")


async def test_the_id_comes_from_the_header_that_is_configured(start: Start) -> None:
    engine = FakeEngine()
    client = await start(engine, request_id_headers=("x-trace-id", "x-request-id"))
    _, _, headers = await client.post(headers={"x-trace-id": "t", "x-request-id": "r"})
    assert headers["x-request-id"] == engine.heard[0].headers["x-request-id"] == "t"
    _, _, headers = await client.post(headers={"x-request-id": "r"})
    assert headers["x-request-id"] == engine.heard[1].headers["x-request-id"] == "r"
    assert (await client.get("/v1/decisions/t"))[0] == 200


# Pages in browsers


async def test_no_page_is_allowed_anything_by_default(start: Start) -> None:
    client = await start(FakeEngine())
    preflight = {"origin": PAGE, "access-control-request-method": "POST"}
    async with client.session.options(client.url + "/v1/chat/completions", headers=preflight) as got:
        assert not [name for name in got.headers if name.lower().startswith("access-control")]
    _, _, headers = await client.post(headers={"origin": PAGE})
    assert "access-control-allow-origin" not in headers


async def test_a_page_that_is_allowed_may_ask_without_a_key_whether_it_may_ask(start: Start) -> None:
    client = await start(FakeEngine(), cors_allowed_origins=[PAGE], api_keys=["k"])
    preflight = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    async with client.session.options(client.url + "/v1/chat/completions", headers=preflight) as got:
        assert (got.status, got.headers["access-control-allow-origin"]) == (204, PAGE)
        assert got.headers["access-control-allow-headers"] == "authorization,content-type"
    async with client.session.options(
        client.url + "/v1/chat/completions", headers=preflight | {"origin": "https://evil.example"}
    ) as got:
        assert "access-control-allow-origin" not in got.headers


@pytest.mark.parametrize(("allowed", "told"), [([PAGE], PAGE), (["*"], "*")])
async def test_answers_and_errors_tell_a_page_that_it_may_read_them(
    start: Start, allowed: list[str], told: str
) -> None:
    async def of_its_own(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"{}", extra="Access-Control-Allow-Origin: https://engine.example\r\n"))

    client = await start(FakeEngine(of_its_own), cors_allowed_origins=allowed)
    _, _, headers = await client.post(headers={"origin": PAGE})
    assert headers.getall("access-control-allow-origin") == [told]
    status, _, headers = await client.post(body={"model": "other"}, headers={"origin": PAGE})
    assert (status, headers["access-control-allow-origin"]) == (404, told)


async def test_what_an_engine_says_of_origins_goes_through_where_nothing_is_configured(start: Start) -> None:
    async def open_to_all(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"{}", extra="access-control-allow-origin: *\r\n"))

    client = await start(FakeEngine(open_to_all))
    _, _, headers = await client.post(headers={"origin": PAGE})
    assert headers["access-control-allow-origin"] == "*"


async def test_the_metrics_port_has_metrics_and_health_and_nothing_else(start: Start) -> None:
    client = await start(FakeEngine(), prometheus_port=0, admin_key="k")
    await until(lambda: client.gateway.prometheus_port > 0)
    url = f"http://127.0.0.1:{client.gateway.prometheus_port}"
    for path, status in (("/metrics", 200), ("/ready", 200), ("/v1/models", 404), ("/admin/instances", 404)):
        async with client.session.get(url + path, headers={"authorization": "Bearer k"}) as got:
            assert got.status == status, path
    async with client.session.post(url + "/v1/chat/completions", data=BODY) as got:
        assert got.status == 404


@pytest.mark.parametrize("framing", ["content-length: 33", "transfer-encoding: chunked"])
async def test_an_engines_answer_to_head_has_no_body_and_ends(start: Start, framing: str) -> None:
    async def tells_of_a_body(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n{framing}\r\n\r\n".encode())

    client = await start(FakeEngine(tells_of_a_body))
    got = await client.raw(b"HEAD /version HTTP/1.1\r\nHost: x\r\n\r\n" * 2 + request(b"GET /health HTTP/1.1"), 1.0)
    answers = got.split(b"HTTP/1.1 ")[1:]
    assert [one[:3] for one in answers] == [b"200"] * 3
    assert framing.encode() in answers[0]
    assert answers[0].endswith(b"\r\n\r\n")
    assert answers[2].endswith(b'{"status":"ok"}')
