"""Instances that die, refuse, fail, hang or speak nonsense: who is served, by whom, and with which words."""

import asyncio
import json

import openai
import pytest
from openai import AsyncOpenAI

from block.gateway.exchange import Asked
from gateway.conftest import Client, Start, until
from gateway.fakes import (
    FakeEngine,
    chunk,
    dies_after_head,
    dies_in_body,
    dies_in_chunk,
    dies_in_stream,
    dies_unanswered,
    event,
    fails,
    hangs_in_stream,
    never_answers,
    overloaded,
    slowly,
    speaks_garbage,
    well,
)  # fmt: skip

STREAM = {"stream": True}


def error_of(body: bytes) -> dict[str, object]:
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


@pytest.mark.parametrize("behave", [dies_unanswered, speaks_garbage, fails, overloaded])
async def test_a_request_not_yet_answered_is_served_elsewhere(start: Start, behave: object) -> None:
    bad, good = FakeEngine(behave), FakeEngine()  # type: ignore[arg-type]
    client = await start(bad, good)
    for _ in range(6):
        status, _, headers = await client.post()
        assert (status, headers["x-gateway-destination-endpoint"]) == (200, "e1")
    assert len(bad.heard) >= 1
    assert await client.metric("block_worker_retries_total") >= 1


async def test_a_stream_of_which_only_the_head_came_is_served_elsewhere(start: Start) -> None:
    """vLLM sends the head before the first token: an instance that dies in between has answered nothing yet."""
    bad, good = FakeEngine(dies_after_head), FakeEngine()
    client = await start(bad, good)
    for _ in range(6):
        status, body, headers = await client.post(body=STREAM)
        assert (status, headers["x-gateway-destination-endpoint"]) == (200, "e1")
        assert body.endswith(b"data: [DONE]\n\n")
    assert len(bad.heard) >= 1
    assert [i.streaming for i in client.gateway.pool.instances.values()] == [0, 0]
    assert await client.metric("block_stream_broken_total") == 0


async def test_a_killed_instance_costs_no_request_and_comes_back(start: Start) -> None:
    a, b = FakeEngine(), FakeEngine()
    client = await start(a, b)
    await client.post()
    await a.stop()
    assert [(await client.post())[0] for _ in range(10)] == [200] * 10
    await until(lambda: client.gateway.pool.instances["e0"].state == "down")  # type: ignore[index]
    heard = len(a.heard)
    await a.start()
    await until(lambda: client.gateway.pool.instances["e0"].state == "ready")  # type: ignore[index]
    for _ in range(10):
        assert (await client.post())[0] == 200
    assert len(a.heard) > heard


async def test_requests_in_flight_on_a_killed_instance_are_served_elsewhere(start: Start) -> None:
    a, b = FakeEngine(never_answers), FakeEngine()
    client = await start(a, b, policy="round-robin")
    answers = [asyncio.create_task(client.post()) for _ in range(20)]
    await until(lambda: len(a.heard) == 10)
    await a.stop()
    assert [(await answer)[0] for answer in answers] == [200] * 20


async def test_the_death_of_a_busy_instance_is_no_matter_of_the_retry_budget(start: Start) -> None:
    a, b = FakeEngine(never_answers), FakeEngine()
    client = await start(a, b, policy="round-robin", retry_budget_fraction=0.0)
    client.gateway.dispatcher.budget.left = 10.0
    answers = [asyncio.create_task(client.post()) for _ in range(300)]
    await until(lambda: len(a.heard) == 150)
    await a.stop()
    assert [(await answer)[0] for answer in answers] == [200] * 300


@pytest.mark.parametrize("behave", [dies_in_stream, dies_in_chunk])
async def test_a_broken_stream_ends_with_an_error_event_and_no_done(start: Start, behave: object) -> None:
    client = await start(FakeEngine(behave))  # type: ignore[arg-type]
    status, body, _ = await client.post(body=STREAM)
    assert status == 200
    *events, last, empty = body.split(b"\n\n")
    assert empty == b""
    assert events[0] + b"\n\n" == event(" t0")
    assert error_of(last.removeprefix(b"data: "))["code"] == "instance_failed"
    assert b"[DONE]" not in body
    assert await client.metric("block_stream_broken_total") == 1


async def test_the_openai_client_sees_a_broken_stream_as_an_api_error(start: Start) -> None:
    client = await start(FakeEngine(dies_in_stream))
    async with AsyncOpenAI(base_url=client.url + "/v1", api_key="none", max_retries=0) as api:
        stream = await api.chat.completions.create(model="fake", messages=[], stream=True)
        with pytest.raises(openai.APIError, match="broke off"):
            async for _ in stream:
                pass


async def test_a_broken_whole_answer_is_cut_off_and_not_made_to_look_complete(start: Start) -> None:
    client = await start(FakeEngine(dies_in_body))
    got = await client.raw(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 16\r\n\r\n{"model":"fake"}')
    assert got.endswith(b'{"id": "x"')


async def test_bytes_beyond_an_answers_end_never_reach_a_client(start: Start) -> None:
    async def splits(engine: FakeEngine, heard: object, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")

    client = await start(FakeEngine(splits))
    got = await client.raw(
        b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 16\r\n\r\n{"model":"fake"}', 0.5
    )
    assert b"evil" not in got


async def test_when_nobody_can_answer_the_client_is_told_why(start: Start) -> None:
    engine = FakeEngine()
    client = await start(engine)
    await engine.stop()
    status, body, _ = await client.post()
    assert status in (502, 503)
    assert "e0" in str(error_of(body)["message"])
    await until(lambda: client.gateway.pool.instances["e0"].state == "down")  # type: ignore[index]
    status, body, headers = await client.post()
    assert (status, error_of(body)["code"]) == (503, "no_ready_endpoint")
    assert "retry-after" in headers
    assert (await client.get("/ready"))[0] == 503
    assert (await client.get("/health"))[0] == 200


async def test_the_last_instances_error_is_passed_on_as_it_is(start: Start) -> None:
    client = await start(FakeEngine(fails))
    status, body, headers = await client.post()
    assert (status, body) == (500, b'{"error":"broken"}')
    client = await start(FakeEngine(overloaded))
    status, _, headers = await client.post()
    assert (status, headers["retry-after"]) == (429, "7")


async def test_a_circuit_opens_after_failures_in_a_row_and_closes_by_trial(start: Start) -> None:
    bad, good = FakeEngine(fails), FakeEngine()
    client = await start(bad, good, cb_failure_threshold=3, cb_open_s=0.3, policy="round-robin")
    for _ in range(12):
        assert (await client.post())[0] == 200
    assert len(bad.heard) == 3
    assert await client.metric("block_worker_cb_state") == 1
    bad.behave = well
    await until(lambda: not client.gateway.pool.instances["e0"].circuit_open_until_s)  # type: ignore[index]
    for _ in range(20):
        await client.post()
    assert len(bad.heard) > 8


async def test_retries_are_limited_by_a_budget(start: Start) -> None:
    bad, worse = FakeEngine(dies_unanswered), FakeEngine(dies_unanswered)
    client = await start(bad, worse, retry_budget_fraction=0.0, cb_failure_threshold=10_000)
    client.gateway.dispatcher.budget.left = 3.0
    assert [(await client.post())[0] for _ in range(5)] == [502] * 5
    assert len(bad.heard) + len(worse.heard) == 5 + 3


async def test_a_stale_pooled_connection_is_nobodys_fault(start: Start) -> None:
    engine = FakeEngine()
    client = await start(engine, health_check_interval_s=60.0)
    await client.post()
    for writer in list(engine._writers):  # the engine closes idle connections just as the gateway uses them
        writer.transport.abort()
    assert (await client.post())[0] == 200
    assert await client.metric("block_worker_retries_total") == 0


async def test_an_instance_url_that_is_no_openai_server_is_named_as_such(start: Start) -> None:
    web = FakeEngine()
    web._own = lambda path: b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 6\r\n\r\n<html>"  # type: ignore[method-assign]
    client = await start(web)
    status, body, _ = await client.post()
    assert status == 503
    assert "no OpenAI server" in str(error_of(body)["message"])

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n")
        writer.close()

    ssh = await asyncio.start_server(greet, "127.0.0.1", 0)
    engine = FakeEngine()
    engine.port = ssh.sockets[0].getsockname()[1]
    client = await start(engine)
    _, body, _ = await client.post()
    assert "not HTTP" in str(error_of(body)["message"])
    ssh.close()


async def test_an_unhealthy_instance_gets_nothing(start: Start) -> None:
    a, b = FakeEngine(), FakeEngine()
    client = await start(a, b, health_failure_threshold=2)
    a.healthy = False
    await until(lambda: client.gateway.pool.instances["e0"].state == "down")  # type: ignore[index]
    for _ in range(4):
        await client.post()
    assert (len(a.heard), len(b.heard)) == (0, 4)


async def hang(client: Client, engine: FakeEngine) -> "asyncio.Task[tuple[int, bytes, object]]":
    task = asyncio.create_task(client.post(body=STREAM))
    await until(lambda: len(engine.heard) >= 1)
    return task


async def test_an_instance_whose_streams_fall_silent_gets_no_new_requests(start: Start) -> None:
    a, b = FakeEngine(hangs_in_stream), FakeEngine()
    client = await start(a, b, hang_after_s=0.15)
    task = await hang(client, a)
    await until(lambda: client.gateway.pool.instances["e0"].suspect is not None)  # type: ignore[index]
    heard = len(a.heard)
    for _ in range(6):
        assert (await client.post())[0] == 200
    assert len(a.heard) == heard
    assert await client.metric("block_worker_suspect") == 1
    task.cancel()


async def test_an_instance_that_owes_an_answer_and_fails_its_health_check_is_suspected_at_once(start: Start) -> None:
    a, b = FakeEngine(never_answers), FakeEngine()
    client = await start(a, b, hang_after_s=0.15, health_check_interval_s=30.0)
    task = await hang(client, a)
    a.healthy = False
    await until(lambda: client.gateway.pool.instances["e0"].suspect is not None)  # type: ignore[index]
    for _ in range(4):
        assert (await client.post())[0] == 200
    task.cancel()


async def test_what_an_instance_that_hangs_has_not_answered_is_asked_of_another(start: Start) -> None:
    hung, other = FakeEngine(hangs_in_stream), FakeEngine()
    client = await start(hung, other, hang_after_s=0.15, continue_silent_s=0.4)
    stream = await hang(client, hung)
    hung.behave = never_answers
    asked = [asyncio.create_task(client.post(headers={"x-smg-target-worker": "e0"})) for _ in range(2)]
    await until(lambda: len(hung.heard) == 3)
    freed = next(x for x in client.gateway.dispatcher.active if not x.stream)
    freed.asked = Asked()
    (moved,), (pinned,) = await asyncio.wait(asked, timeout=5, return_when=asyncio.FIRST_COMPLETED)
    status, _, headers = moved.result()
    assert (status, headers["x-gateway-destination-endpoint"]) == (200, "e1")
    assert not stream.done()  # it has begun, and continuing is off
    for task in (stream, pinned):
        task.cancel()


async def test_if_everybody_is_suspect_requests_are_still_tried(start: Start) -> None:
    client = await start(FakeEngine())
    client.gateway.pool.set_suspect(client.gateway.pool.instances["e0"], "silent")  # type: ignore[index]
    assert (await client.post())[0] == 200


async def test_a_request_beyond_its_time_ends_with_a_timeout_error(start: Start) -> None:
    client = await start(FakeEngine(never_answers), request_timeout_s=0.2)
    status, body, _ = await client.post()
    assert (status, error_of(body)["type"]) == (504, "timeout_error")
    client = await start(FakeEngine(hangs_in_stream), request_timeout_s=0.2, hang_after_s=0)
    status, body, _ = await client.post(body=STREAM)
    assert status == 200
    assert error_of(body.split(b"\n\n")[-2].removeprefix(b"data: "))["code"] == "timeout"


async def test_beyond_the_limit_requests_queue_then_are_told_to_come_back(start: Start) -> None:
    engine = FakeEngine(slowly(0.3))
    client = await start(engine, max_concurrent_requests=2, queue_size=2)
    tasks = [asyncio.create_task(client.post()) for _ in range(4)]
    await until(lambda: len(client.gateway.dispatcher.queue) == 2)
    status, body, headers = await client.post()
    assert (status, error_of(body)["type"]) == (429, "rate_limit_error")
    assert 1 <= int(headers["retry-after"]) <= 60
    assert headers["x-llm-d-request-dropped-reason"] == "rejected-queue-full"
    assert [(await task)[0] for task in tasks] == [200] * 4


async def test_the_queue_has_a_deadline(start: Start) -> None:
    client = await start(FakeEngine(slowly(1.0)), instance_in_flight_max=1, queue_timeout_s=0.1)
    first = asyncio.create_task(client.post())
    await until(lambda: len(client.gateway.dispatcher.active) == 1)
    status, body, _ = await client.post()
    assert (status, error_of(body)["code"]) == (429, "queue_timeout")
    assert (await first)[0] == 200


async def test_a_queued_request_goes_when_its_instance_has_room(start: Start) -> None:
    client = await start(FakeEngine(slowly(0.05)), instance_in_flight_max=1)
    assert [r[0] for r in await asyncio.gather(*(client.post() for _ in range(5)))] == [200] * 5


async def test_draining_says_not_ready_and_lets_answers_finish(start: Start) -> None:
    client = await start(FakeEngine(slowly(0.2)))
    answer = asyncio.create_task(client.post())
    await until(lambda: len(client.gateway.dispatcher.active) == 1)
    drained = asyncio.create_task(client.gateway.drain())
    await asyncio.sleep(0.01)
    assert (await client.get("/ready"))[0] == 503
    assert (await client.get("/health"))[0] == 200
    status, _, headers = await answer
    assert (status, headers["connection"]) == (200, "close")
    await drained


async def test_chunks_split_anywhere_still_make_the_same_stream(start: Start) -> None:
    whole = b"".join(chunk(event(f" t{n}")) for n in range(3)) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"

    async def dribbles(engine: FakeEngine, heard: object, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for at in range(0, len(whole), 7):
            writer.write(whole[at : at + 7])
            await writer.drain()
            await asyncio.sleep(0)

    client = await start(FakeEngine(dribbles))
    _, body, _ = await client.post(body=STREAM)
    assert body == b"".join(event(f" t{n}") for n in range(3)) + b"data: [DONE]\n\n"
