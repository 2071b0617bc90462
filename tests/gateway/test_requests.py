"""A request's way through: what goes to the engine, what comes back."""

import asyncio
import json

from openai import AsyncOpenAI

from gateway.conftest import Start, until
from gateway.fakes import (
    STREAM_HEAD,
    FakeEngine,
    Heard,
    answer,
    chunk,
    encoded,
    event,
    hangs_in_stream,
    never_answers,
    slowly,
)  # fmt: skip

POST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b\r\n%b"
)
BODY = b'{"model":"fake","messages":[]}'


async def test_a_body_and_unknown_headers_reach_the_engine_untouched(start: Start) -> None:
    engine = FakeEngine()
    client = await start(engine)
    body = b'{ "model":"fake",  "messages":[], "unknown_field": [1, {"a": null}], "\xc3\xa4": 1e3 }'
    raw = POST % (len(body), b"X-Custom-Thing: a b\r\nAuthorization: Bearer k\r\nConnection: close\r\n", body)
    got = await client.raw(raw)
    assert got.startswith(b"HTTP/1.1 200 OK\r\n")
    heard = engine.heard[0]
    assert heard.body == body
    assert heard.headers["x-custom-thing"] == "a b"
    assert heard.headers["authorization"] == "Bearer k"
    assert heard.headers["host"] == f"127.0.0.1:{engine.port}"
    assert "connection" not in heard.headers


async def test_a_stream_arrives_byte_by_byte_as_the_engine_sent_it(start: Start) -> None:
    client = await start(FakeEngine())
    got = await client.raw(POST % (len(BODY) + 16, b"Connection: close\r\n", BODY[:-1] + b', "stream": true}'))
    head, _, body = got.partition(b"\r\n\r\n")
    assert body == b"".join(chunk(event(f" t{n}")) for n in range(4)) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
    assert b"x-accel-buffering: no" in head
    assert b"cache-control: no-cache" in head


async def test_the_first_event_arrives_before_the_second_is_sent(start: Start) -> None:
    client = await start(FakeEngine(hangs_in_stream), hang_after_s=0)
    async with client.session.post(client.url + "/v1/chat/completions", json={"model": "fake", "stream": True}) as got:
        assert await got.content.readline() + await got.content.readline() == event(" t0")


async def test_the_openai_client_works_unchanged(start: Start) -> None:
    client = await start(FakeEngine(), FakeEngine())
    async with AsyncOpenAI(base_url=client.url + "/v1", api_key="none", max_retries=0) as openai:
        assert [m.id async for m in openai.models.list()] == ["fake"]
        messages = [{"role": "user", "content": "hi"}]
        whole = await openai.chat.completions.create(model="fake", messages=messages)  # type: ignore[arg-type]
        assert whole.choices[0].message.content == " t0 t1 t2 t3"
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 4
        stream = await openai.chat.completions.create(model="fake", messages=messages, stream=True)  # type: ignore[call-overload]
        assert [part.choices[0].delta.content async for part in stream] == [" t0", " t1", " t2", " t3"]
        text = await openai.completions.create(model="fake", prompt="hi")
        assert text.choices[0].text == " t0 t1 t2 t3"


async def test_a_request_id_is_echoed_or_made_and_reaches_the_engine(start: Start) -> None:
    engine = FakeEngine()
    client = await start(engine)
    _, _, given = await client.post(headers={"x-request-id": "mine-1"})
    assert given["x-request-id"] == engine.heard[0].headers["x-request-id"] == "mine-1"
    _, _, made = await client.post()
    assert made["x-request-id"] == engine.heard[1].headers["x-request-id"]
    assert len(made["x-request-id"]) == 32


async def test_answers_name_the_instance_and_the_gateways_own_time(start: Start) -> None:
    client = await start(FakeEngine(), FakeEngine())
    seen = [(await client.post())[2] for _ in range(4)]
    assert [h["x-gateway-destination-endpoint"] for h in seen] == ["e0", "e1", "e0", "e1"]
    assert all(float(h["x-block-overhead-ms"]) >= 0 for h in seen)
    assert all(h["x-engine"] == "yes" for h in seen)


async def test_pipelined_requests_are_answered_in_order(start: Start) -> None:
    engine = FakeEngine(slowly(0.01))
    client = await start(engine)
    one = [POST % (len(BODY), b"X-Request-Id: p%d\r\n" % n, BODY) for n in range(3)]
    last = POST % (len(BODY), b"X-Request-Id: p3\r\nConnection: close\r\n", BODY)
    got = await client.raw(b"".join(one) + last)
    assert [line for line in got.split(b"\r\n") if line.startswith(b"x-request-id")] == [
        b"x-request-id: p%d" % n for n in range(4)
    ]


async def test_a_client_that_leaves_frees_the_engine(start: Start) -> None:
    engine = FakeEngine(hangs_in_stream)
    client = await start(engine, hang_after_s=0)
    reader, writer = await asyncio.open_connection("127.0.0.1", client.gateway.port)
    writer.write(POST % (len(BODY), b"", BODY))
    await reader.readuntil(b" t0")
    writer.close()
    await until(lambda: engine.left == 1)
    assert await client.metric("block_client_disconnect_total") == 1


async def test_a_client_that_leaves_before_any_answer_frees_the_engine(start: Start) -> None:
    engine = FakeEngine(never_answers)
    client = await start(engine)
    _, writer = await asyncio.open_connection("127.0.0.1", client.gateway.port)
    writer.write(POST % (len(BODY), b"", BODY))
    await until(lambda: len(engine.heard) == 1)
    writer.close()
    await until(lambda: engine.left == 1)


async def test_a_slow_reader_slows_the_engine_instead_of_filling_memory(start: Start) -> None:
    sent = 0

    async def floods(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(STREAM_HEAD)
        while sent < 64_000_000:
            writer.write(chunk(b"data: " + b"x" * 16000 + b"\n\n"))
            await writer.drain()
            sent += 16000
        writer.write(b"0\r\n\r\n")

    client = await start(FakeEngine(floods), hang_after_s=0)
    reader, writer = await asyncio.open_connection("127.0.0.1", client.gateway.port)
    writer.write(POST % (len(BODY), b"", BODY))
    await reader.readuntil(b"data:")
    await asyncio.sleep(0.3)
    stalled = sent
    await asyncio.sleep(0.2)
    assert sent == stalled < 32_000_000
    total = 0
    while total < sent - 1_000_000 or sent < 64_000_000:
        total += len(await reader.read(1 << 20))
    writer.close()


async def test_a_large_body_with_expect_continue_goes_through(start: Start) -> None:
    engine = FakeEngine()
    client = await start(engine)
    body = encoded({"model": "fake", "messages": [{"role": "user", "content": "x" * 1_000_000}]})
    reader, writer = await asyncio.open_connection("127.0.0.1", client.gateway.port)
    writer.write(POST % (len(body), b"Expect: 100-continue\r\n", b""))
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(body)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    assert engine.heard[0].body == body
    assert "expect" not in engine.heard[0].headers
    writer.close()


async def test_other_routes_of_the_engine_pass_through(start: Start) -> None:
    async def tokenize(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(encoded({"path": heard.path, "tokens": [1, 2]})))

    client = await start(FakeEngine(tokenize))
    status, body, _ = await client.post("/tokenize?x=1", {"prompt": "hi"})
    assert (status, json.loads(body)["path"]) == (200, "/tokenize?x=1")
    status, _, _ = await client.post("/v1/embeddings", {"input": "hi"})
    assert status == 200
    for path in ("/v1/load_lora_adapter", "/sleep", "/v1/../sleep", "/v1/%2e%2e/sleep", "/v1//sleep"):
        got = await client.raw(
            b"POST %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}" % path.encode()
        )
        assert got.startswith(b"HTTP/1.1 404"), path


async def test_a_base_url_with_a_path_is_kept(start: Start) -> None:
    engine = await FakeEngine().start()
    client = await start(engine, wait=False)
    instance = next(iter(client.gateway.pool.instances.values()))
    instance.prefix = b"/serving/a"
    await until(lambda: instance.state == "ready")
    await client.post()
    assert engine.heard[0].path == "/serving/a/v1/chat/completions"


async def test_a_model_goes_only_where_it_is_served(start: Start) -> None:
    a, b = FakeEngine(models=("a",)), FakeEngine(models=("b",))
    client = await start(a, b)
    for _ in range(3):
        await client.post(body={"model": "b"})
    assert (len(a.heard), len(b.heard)) == (0, 3)
    assert json.loads((await client.get("/v1/models"))[1])["data"] == [
        {"id": "a", "object": "model"},
        {"id": "b", "object": "model"},
    ]
    assert (await client.get("/v1/models/a"))[0] == 200
    assert (await client.get("/v1/models/c"))[0] == 404
