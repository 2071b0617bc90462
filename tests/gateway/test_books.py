"""What is put off is done: in order, once, before anybody reads it, and whatever one entry does."""

import asyncio
import json

import pytest

from block.gateway.records.books import OPEN_MAX, Books
from gateway.conftest import Start, until
from gateway.fakes import FakeEngine


async def test_entries_are_settled_in_order_and_once(caplog: pytest.LogCaptureFixture) -> None:
    books, done = Books(asyncio.get_running_loop()), []

    def fails() -> None:
        raise ValueError("a bug")

    for n in range(3):
        books.later(lambda n=n: done.append(n))  # type: ignore[misc]
        books.later(fails)
    assert done == []
    books.settle()
    books.settle()
    assert done == [0, 1, 2]
    assert caplog.text.count("ValueError: a bug") == 3


async def test_not_more_than_so_many_wait() -> None:
    books, done = Books(asyncio.get_running_loop()), []
    for n in range(OPEN_MAX):
        books.later(lambda n=n: done.append(n))  # type: ignore[misc]
    await asyncio.sleep(0)
    assert done == list(range(OPEN_MAX))


async def test_an_entry_of_an_entry_is_kept() -> None:
    books, done = Books(asyncio.get_running_loop()), []
    books.later(lambda: books.later(lambda: done.append(1)))
    books.settle()
    books.settle()
    assert done == [1]


async def test_a_request_is_in_the_metrics_as_soon_as_it_is_answered_and_learned_from_without_being_asked(
    start: Start,
) -> None:
    client = await start(FakeEngine(), policy="least-outstanding")
    for n in range(1, 4):
        await client.post(body={"stream": True})
        assert await client.metric("block_request_total") == n
        assert await client.metric("block_request_duration_seconds_count") == n
        assert await client.metric("block_router_overhead_seconds_count") == n
        assert await client.metric("block_scheduler_e2e_duration_seconds_count") == n
    await client.post(body={"stream": True})
    await until(lambda: client.gateway.decider.estimator._of("fake").observed == 4)


async def test_who_was_left_out_is_told_as_it_was_when_it_was_decided(start: Start) -> None:
    client = await start(FakeEngine(), FakeEngine(), policy="least-outstanding")
    pool = client.gateway.dispatcher.pool
    await client.post(headers={"x-request-id": "r"})
    for instance in pool.instances.values():
        pool.drain(instance)
    told = json.loads((await client.get("/v1/decisions/r"))[1])
    assert len(told["candidates"]) == 2
    assert told["left_out"] == {}
