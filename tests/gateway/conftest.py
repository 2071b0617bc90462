"""A gateway in this process on real sockets; at the end nothing of it may be left."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
import uvloop

from block.gateway.config import GatewayConfig, InstanceConfig
from block.gateway.serve import Gateway
from gateway.fakes import FakeEngine

QUICK: dict[str, Any] = {
    "port": 0, "policy": "round-robin", "seed": 1, "health_check_interval_s": 0.05, "health_check_timeout_s": 3.0,
    "connect_timeout_s": 2.0, "shutdown_grace_period_s": 2.0,
}  # fmt: skip


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """As in production."""
    return {"uvloop": uvloop.new_event_loop}


class Client:
    """Asks a gateway as a client would; ``raw`` sends bytes as they are."""

    def __init__(self, gateway: Gateway, session: aiohttp.ClientSession) -> None:
        self.gateway, self.session = gateway, session
        self.url = f"http://127.0.0.1:{gateway.port}"

    async def post(
        self, path: str = "/v1/chat/completions", body: Any = None, **options: Any
    ) -> tuple[int, bytes, Any]:
        """(status, body, headers)."""
        body = {"model": "fake", "messages": [{"role": "user", "content": "hello"}]} | (body or {})
        async with self.session.post(self.url + path, json=body, **options) as answer:
            return answer.status, await answer.read(), answer.headers

    async def get(self, path: str, **options: Any) -> tuple[int, bytes]:
        async with self.session.get(self.url + path, **options) as answer:
            return answer.status, await answer.read()

    async def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        _, text = await self.get("/metrics")
        lines = [line for line in text.decode().splitlines() if line.startswith((name + " ", name + "{"))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    async def raw(self, data: bytes, timeout_s: float = 5.0) -> bytes:
        """What comes back on one connection until it is closed or silent for a moment."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.gateway.port)
        got = b""
        try:
            writer.write(data)
            await writer.drain()
            async with asyncio.timeout(timeout_s):
                while part := await reader.read(65536):
                    got += part
        except (TimeoutError, ConnectionError):
            pass
        finally:
            writer.close()
        return got


Start = Callable[..., Awaitable[Client]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Start engines (those not running yet) and a gateway in front of them, wait until each instance was checked."""
    running: list[tuple[Gateway, list[FakeEngine], aiohttp.ClientSession]] = []

    async def begin(
        *engines: FakeEngine, predictors: dict[int, str] | None = None, wait: bool = True, **options: Any
    ) -> Client:
        for engine in engines:
            if not engine.port:
                await engine.start()
        instances = [
            InstanceConfig(url=engine.url, name=f"e{n}", predictor=(predictors or {}).get(n))
            for n, engine in enumerate(engines)
        ]
        gateway = Gateway(GatewayConfig(**(QUICK | {"instances": instances} | options)))
        await gateway.start()
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=30)
        )
        running.append((gateway, list(engines), session))
        if wait:
            await until(lambda: all(i.state != "starting" for i in gateway.pool.instances.values()))
        return Client(gateway, session)

    yield begin
    for gateway, engines, session in running:
        await session.close()
        await _check_nothing_is_left(gateway)
        await gateway.close()
        for engine in engines:
            await engine.stop()
    await asyncio.sleep(0.01)
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task() and "fakes" not in repr(task)]
    assert not left, left


async def _check_nothing_is_left(gateway: Gateway) -> None:
    """Law: when the clients are gone, no request, no count, no ledger entry and no connection of theirs remains."""
    dispatcher = gateway.dispatcher
    await until(lambda: not dispatcher.active and not gateway.app.connections)
    assert not dispatcher.tasks()
    assert len(dispatcher.decider.expectations) == 0
    for instance in gateway.pool.instances.values():
        assert (instance.in_flight, instance.in_flight_tokens, instance.streaming) == (0, 0, 0), instance.id
    for evidence in dispatcher.decider.evidence.values():
        assert evidence.unseen == 0


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait for a condition; AssertionError if it does not come true."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)
