"""Late binding online: what the policy keeps is bounded, counted, sent in the end, and never in a client's or a shutdown's way."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import pytest

from block.policy.table import policy_from
from gateway.conftest import Client, Start, until
from gateway.fakes import FakeEngine, FakePredictor, snapshot

Begin = Callable[..., "asyncio.Future[tuple[Client, FakeEngine, FakePredictor]]"]


def idle() -> bytes:
    return snapshot()


def full() -> bytes:
    """So many wait that a newcomer would too."""
    return snapshot(running=64, waiting=40)


@pytest.fixture
async def begin(start: Start) -> AsyncIterator[Begin]:
    predictors: list[FakePredictor] = []

    async def one(policy: str = "block", **options: object) -> tuple[Client, FakeEngine, FakePredictor]:
        predictor = await FakePredictor(full).start()
        predictors.append(predictor)
        engine = FakeEngine()
        client = await start(engine, policy=policy, predictors={0: predictor.url}, hang_after_s=0, **options)
        evidence = client.gateway.decider.evidence.values()
        await until(lambda: all(e.frames and e._profile is not None for e in evidence))
        return client, engine, predictor

    yield one  # type: ignore[misc]
    for predictor in predictors:
        await predictor.stop()


async def test_a_request_is_kept_while_it_would_only_wait_and_sent_when_there_is_room(begin: Begin) -> None:
    client, engine, predictor = await begin()
    asked_s = time.monotonic()
    tasks = [asyncio.create_task(client.post()) for _ in range(3)]
    await until(lambda: len(client.gateway.dispatcher.holding) == 3)
    assert await client.metric("block_flow_control_held_requests") == 3
    assert not engine.heard
    await asyncio.sleep(0.05)
    predictor.frame = idle
    statuses = [(await task)[0] for task in tasks]
    assert statuses == [200, 200, 200]
    assert len(engine.heard) == 3
    assert await client.metric("block_flow_control_held_requests") == 0
    assert await client.metric("block_flow_control_held_request_duration_seconds_count") == 3
    # what it waited here is part of its time to first token and of the gateway's own time
    assert await client.metric("block_router_overhead_seconds_sum") > 3 * 0.05
    assert time.monotonic() - asked_s > 0.05


async def test_a_held_request_is_sent_after_the_longest_wait_whatever_the_predictions_say(begin: Begin) -> None:
    client, engine, _ = await begin(policy="block:most_s=0.1")
    status, _, headers = await client.post()
    assert status == 200
    assert len(engine.heard) == 1
    assert float(headers["x-block-overhead-ms"]) >= 100


async def test_what_is_told_of_a_held_request_comes_when_it_is_sent_and_counts_the_wait(begin: Begin) -> None:
    client, _, _ = await begin(policy="block:most_s=0.1", admin_key="k")
    recent = client.gateway.dispatcher.recent
    task = asyncio.create_task(client.post())
    await until(lambda: len(client.gateway.dispatcher.holding) == 1)
    before = recent.after("", client.gateway.dispatcher, client.gateway.pool)
    assert (len(before.arrivals), before.sent) == (1, [])
    await task
    after = recent.after(before.cursor, client.gateway.dispatcher, client.gateway.pool)
    ((number, predicted_ttft_s),) = ((one.number, one.predicted_ttft_s) for one in after.sent)
    assert number == before.arrivals[0].number
    assert predicted_ttft_s is not None
    assert predicted_ttft_s > 0.1


async def test_a_client_that_leaves_leaves_no_held_request(begin: Begin) -> None:
    client, engine, predictor = await begin()
    task = asyncio.create_task(client.post())
    await until(lambda: len(client.gateway.dispatcher.holding) == 1)
    task.cancel()
    await until(lambda: not client.gateway.dispatcher.active)
    predictor.frame = idle
    await until(lambda: len(client.gateway.dispatcher.holding) == 0)
    assert not engine.heard


async def test_a_shutdown_sends_what_is_held_at_once(begin: Begin) -> None:
    client, engine, _ = await begin()
    task = asyncio.create_task(client.post())
    await until(lambda: len(client.gateway.dispatcher.holding) == 1)
    await client.gateway.drain()
    assert (await task)[0] == 200
    assert len(engine.heard) == 1


async def test_another_policy_lets_go_of_what_the_last_one_held(begin: Begin) -> None:
    client, engine, _ = await begin()
    task = asyncio.create_task(client.post())
    await until(lambda: len(client.gateway.dispatcher.holding) == 1)
    client.gateway.decider.policy = policy_from("least-outstanding")
    assert (await task)[0] == 200
    assert len(engine.heard) == 1


async def test_a_request_that_runs_out_of_time_while_held_is_told_so(begin: Begin) -> None:
    client, engine, _ = await begin(request_timeout_s=0.2)
    status, body, _ = await client.post()
    assert status == 504
    assert b"timeout" in body
    assert not engine.heard


async def test_without_predictions_nothing_is_held(start: Start) -> None:
    client = await start(FakeEngine(), policy="block")
    assert (await client.post())[0] == 200
    assert len(client.gateway.dispatcher.holding) == 0


async def test_beyond_its_bound_nothing_is_held(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    client, engine, predictor = await begin()
    policy = client.gateway.decider.policy
    assert policy.hold is not None
    client.gateway.decider.policy = policy._replace(hold=policy.hold._replace(queue_max=2))
    tasks = [asyncio.create_task(client.post()) for _ in range(4)]
    await until(lambda: len(engine.heard) == 2)
    assert len(client.gateway.dispatcher.holding) == 2
    predictor.frame = idle
    assert [(await task)[0] for task in tasks] == [200] * 4
