"""Requests of others at an engine that the gateway models from its own streams."""

import asyncio
import random
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import msgspec
import pytest

from block.core import InstanceId
from block.emulate.config import EmulateConfig
from block.engine.limits import EngineLimits
from block.engine.pipeline import Engine
from block.gateway.config import GatewayConfig, parse_instance
from block.gateway.deciding import blackbox
from block.gateway.deciding.foreign import LAG_S, Foreign
from block.gateway.serve import Gateway
from block.predictor.sources.metrics import Figures
from emulate.served import PROFILE, serving
from gateway.conftest import QUICK, until

LIMITS = EngineLimits(
    max_num_seqs=16, max_num_batched_tokens=512, num_gpu_blocks=400, block_size=16, max_model_len=2048
)
ROOMY = msgspec.structs.replace(LIMITS, num_gpu_blocks=4000)


def figures(running: float, waiting: float = 0.0, kv_used: float | None = None) -> Figures:
    return Figures(
        running=running, waiting=waiting, kv_used=kv_used, prompt_sum=1000.0, prompt_count=10.0, output_sum=2000.0,
        output_count=10.0,
    )  # fmt: skip


def seen(engine: Engine) -> tuple[int, int]:
    return len(engine.scheduler.running), len(engine.scheduler.waiting)


def test_what_runs_and_waits_beyond_our_own_is_played() -> None:
    engine, foreign = Engine(LIMITS, PROFILE.curve(1.0, LIMITS)), Foreign()
    foreign.note(0, 0.0)
    foreign.take(engine, figures(16, 5), 1.0)
    assert seen(engine) == (16, 5)
    assert len({g.output for g in foreign.ghosts if g.output}) > 8, "they are spread over their answers"
    foreign.take(engine, figures(16, 9), 1.0)
    assert len(foreign.ghosts) == 25
    foreign.take(engine, figures(3, 0), 1.0)
    assert seen(engine) == (3, 0)
    foreign.take(engine, figures(0, 0), 1.0)
    assert seen(engine) == (0, 0)
    assert foreign.ghosts == []


def test_ghosts_hold_the_blocks_that_are_in_use() -> None:
    engine, foreign = Engine(LIMITS, PROFILE.curve(1.0, LIMITS)), Foreign()
    foreign.take(engine, figures(10, 0, kv_used=0.35), 1.0)
    engine.advance(1.1)
    used = 1 - engine.scheduler.blocks_free / LIMITS.blocks_usable
    assert used == pytest.approx(0.35, abs=0.08)


def test_our_own_requests_are_nobody_elses_though_the_counts_lag() -> None:
    engine, foreign = Engine(LIMITS, PROFILE.curve(1.0, LIMITS)), Foreign()
    for step in range(40):  # they come and go between 2 and 6; the engine's count is a quarter of a second old
        now_s = 0.1 * step
        foreign.note(2 + step % 5, now_s)
        foreign.take(engine, figures(2 + max(0, step - 2) % 5), now_s)
        assert foreign.ghosts == []
    foreign.note(0, 5.0)
    foreign.note(0, 5.0 + 2 * LAG_S)
    foreign.take(engine, figures(4), 5.0 + 2 * LAG_S)
    assert len(foreign.ghosts) == 4


@pytest.fixture
async def engine_and_gateway(tmp_path: Path) -> AsyncIterator[tuple[str, Gateway]]:
    profile = tmp_path / "test.json"
    profile.write_bytes(msgspec.json.encode(PROFILE))
    config = EmulateConfig(limits=ROOMY, profile=str(profile), models=("tiny",), name=f"test-{uuid.uuid4().hex[:12]}")
    async with serving(config) as url:
        instance = parse_instance(
            f"{url},name=e0,profile={profile},max-num-seqs=16,max-num-batched-tokens=512,max-model-len=2048"
        )
        gateway = Gateway(GatewayConfig(**(QUICK | {"instances": [instance], "policy": "block"})))
        await gateway.start()
        box = gateway.decider.boxes[InstanceId("e0")]
        await until(lambda: box.limits.num_gpu_blocks == 4000)
        yield url, gateway
        await gateway.close()


async def ask(session: aiohttp.ClientSession, url: str, prompt: int, output: int) -> None:
    body = {"model": "tiny", "prompt": [7] * prompt, "max_tokens": output, "ignore_eos": True, "stream": True}
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        assert answer.status == 200
        await answer.read()


async def keep_asking(session: aiohttp.ClientSession, url: str) -> None:
    while True:
        await ask(session, url, 200, 1000)


async def test_requests_that_did_not_come_through_this_gateway_show_in_its_model(
    engine_and_gateway: tuple[str, Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blackbox, "SHARE_MAX", 1.0)  # a busy machine answers slowly, and would seldom be looked at
    url, gateway = engine_and_gateway
    box = gateway.decider.boxes[InstanceId("e0")]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        others = [asyncio.create_task(keep_asking(session, url)) for _ in range(8)]
        await until(lambda: len(box.foreign.ghosts) >= 7, 15.0)
        await until(lambda: len(box._engine.scheduler.running) >= 7, 15.0)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await until(lambda: not box.foreign.ghosts, 15.0)


async def test_a_gateway_that_is_alone_sees_no_others(engine_and_gateway: tuple[str, Gateway]) -> None:
    _, gateway = engine_and_gateway
    box, chance, most = gateway.decider.boxes[InstanceId("e0")], random.Random(3), 0
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        tasks = []
        for _ in range(40):
            work = ask(session, f"http://127.0.0.1:{gateway.port}", chance.randint(20, 400), chance.randint(5, 60))
            tasks.append(asyncio.create_task(work))
            await asyncio.sleep(0.03)
            most = max(most, len(box.foreign.ghosts))
        await asyncio.gather(*tasks)
    assert most <= 1
