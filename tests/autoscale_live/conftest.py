"""Gateways that speak administration, and a keeper around them."""

from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest

from autoscale_live.fakes import FakeGateway


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as made:
        yield made


@pytest.fixture
async def gateways() -> AsyncIterator[Callable[[int], Awaitable[list[FakeGateway]]]]:
    """So many fake gateways on real sockets."""
    made: list[FakeGateway] = []

    async def start(count: int = 1) -> list[FakeGateway]:
        made.extend([await FakeGateway().start() for _ in range(count)])
        return made

    yield start
    for one in made:
        await one.stop()
