"""A predictor that lives and is wrong: noticed within a minute, done without, and taken back when it is right again."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from types import SimpleNamespace as Of
from typing import Any

import aiohttp
import msgspec
import pytest

from block.core import InstanceId, Prediction
from block.gateway.config import GatewayConfig, InstanceConfig
from block.gateway.deciding import drift
from block.gateway.deciding.drift import RESIDUALS, SNAPSHOTS, Drift
from block.gateway.serve import Gateway
from block.policy.table import make_policy
from block.steptime.profile import load_profile
from gateway.conftest import QUICK, Client, Start, until
from gateway.fakes import FakeEngine, FakePredictor, slowly, snapshot
from gateway.test_continuation import Emulated
from predictor.profile import faster

E0, E1 = InstanceId("e0"), InstanceId("e1")
BLOCK = make_policy("block")


class Watched:
    """A drift watch under a clock of its own; every second some answers end and a look is taken."""

    def __init__(self, factor: float = 2.0) -> None:
        self.drift = Drift(factor)
        self.now_s = 1000.0
        self.evidence: Any = {E0: Of(unshown=0)}
        self._rng = Random(1)

    def answer(self, ratio: float, *, tokens: int = 101, ttft_s: float = 0.2, tpot_s: float = 0.02) -> None:
        """One whole answer that took ``ratio`` times what was predicted for its length (not for the one expected)."""
        took_s = ratio * (ttft_s + tpot_s * (tokens - 1))
        prediction = Prediction(
            ttft_s=ttft_s, e2e_s=ttft_s + tpot_s * 999, tpot_s=tpot_s, queue_delay_s=0.0, preemptions=0
        )
        exchange: Any = Of(
            prediction=prediction, instance=Of(id=E0), output_tokens=tokens, sse=True, decided_s=self.now_s - took_s,
            answered_s=self.now_s, first_byte_s=self.now_s - took_s + ttft_s,
        )  # fmt: skip
        self.drift.take(exchange)

    def seconds(self, count: int, ratio: float | None, rate: int = 1, spread: float = 0.2) -> float | None:
        """That many seconds of answers; after how many the verdict changed."""
        before = self.drift.wrong.get(E0)
        for second in range(count):
            self.now_s += 1.0
            for _ in range(rate if ratio is not None else 0):
                assert ratio is not None
                self.answer(ratio * (1 + self._rng.uniform(-spread, spread)), tokens=self._rng.randint(20, 300))
            self.drift.look(self.now_s, self.evidence)
            if self.drift.wrong.get(E0) != before:
                return second + 1.0
        return None


@pytest.mark.parametrize("ratio", [3.0, 1 / 3], ids=["three times too fast", "three times too slow"])
@pytest.mark.parametrize("rate", [1, 20])
def test_a_wrong_profile_is_noticed_within_a_minute(ratio: float, rate: int) -> None:
    watched = Watched()
    assert watched.seconds(120, 1.1, rate) is None
    after_s = watched.seconds(120, ratio, rate)
    assert after_s is not None
    assert after_s <= 60
    assert watched.drift.wrong == {E0: RESIDUALS}


def test_it_is_taken_back_when_it_is_right_again_and_not_before() -> None:
    watched = Watched()
    watched.seconds(120, 3.0)
    assert watched.seconds(120, None) is None  # no answers, no news
    assert watched.seconds(120, 2.0, spread=0.4) is None  # half of them right is not right again
    after_s = watched.seconds(120, 1.0)
    assert after_s is not None
    assert after_s <= 60
    assert not watched.drift.wrong


def test_unknown_lengths_and_a_few_bad_answers_are_no_drift() -> None:
    watched = Watched()
    for _ in range(200):
        assert watched.seconds(1, 1.0, rate=3, spread=0.5) is None
        watched.answer(8.0)
    assert not watched.drift.wrong


def test_snapshots_that_do_not_show_the_requests_are_wrong() -> None:
    watched = Watched()
    for unshown in range(1, 9):
        watched.evidence[E0].unshown = unshown
        watched.seconds(1, None)
    assert watched.drift.wrong == {E0: SNAPSHOTS}
    assert watched.seconds(60, None) is not None
    assert not watched.drift.wrong


def test_one_wrong_candidate_means_counters_for_all_by_name() -> None:
    watch = Drift(2.0)
    assert watch.instead_of(BLOCK, [E0, E1]) == (BLOCK, None)
    watch.wrong[E1] = RESIDUALS
    used, why = watch.instead_of(BLOCK, [E0, E1])
    assert (used.name, why) == ("llumnix-minus", "wrong-residuals:llumnix-minus")
    assert watch.instead_of(BLOCK, [E0]) == (BLOCK, None)
    watch.wrong[E0] = SNAPSHOTS
    used, why = watch.instead_of(BLOCK, [E0, E1])
    assert (used.name, why) == ("least-outstanding", "wrong-snapshots:least-outstanding")
    by_load = make_policy("token-load")
    assert watch.instead_of(by_load, [E0, E1]) == (by_load, None)


def test_it_can_be_turned_off() -> None:
    watched = Watched(factor=0)
    assert watched.seconds(120, 10.0) is None


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "HOLD_S", 0.0)
    monkeypatch.setattr(drift, "LOOK_S", 0.0)
    monkeypatch.setattr(drift, "RECENT_S", 3.0)


@pytest.fixture
async def wrongly_profiled(tmp_path: Path) -> AsyncIterator[tuple[Client, list[Emulated]]]:
    """Two emulated engines as fast as real ones (so that a busy host delays them little), four times as fast as the profile
    that the gateway was told."""
    told = tmp_path / "slow.json"
    told.write_bytes(msgspec.json.encode(faster(load_profile("h200-llama3.1-8b"), 0.25)))
    engines = [await Emulated("h200-llama3.1-8b").start() for _ in range(2)]
    instances = [
        InstanceConfig(url=engine.url, name=f"e{n}", profile=str(told), num_gpu_blocks=4096)
        for n, engine in enumerate(engines)
    ]
    gateway = Gateway(GatewayConfig(**(QUICK | {"instances": instances, "policy": "block"})))
    await gateway.start()
    async with aiohttp.ClientSession() as session:
        await until(lambda: all(i.state == "ready" for i in gateway.pool.instances.values()))
        yield Client(gateway, session), engines
    await gateway.close()
    for engine in engines:
        await engine.stop()


async def ask(client: Client, count: int) -> None:
    body = {"max_tokens": 40, "ignore_eos": True, "stream": True}
    answers = await asyncio.gather(*(client.post(body=body) for _ in range(count)))
    assert {status for status, _, _ in answers} == {200}


@pytest.mark.usefixtures("impatient")
async def test_a_wrong_profile_is_done_without_and_predicted_on(
    wrongly_profiled: tuple[Client, list[Emulated]],
) -> None:
    client, engines = wrongly_profiled
    watch = client.gateway.decider.drift
    for _ in range(40):
        await ask(client, 16)
        if len(watch.wrong) == 2:
            break
    assert len(watch.wrong) == 2
    assert await client.metric("block_predictor_drift") == 2
    await ask(client, 4)
    assert b'block_fallback_total{reason="wrong-residuals:llumnix-minus"}' in (await client.get("/metrics"))[1]
    last = next(reversed(client.gateway.dispatcher.decisions._records.values())).decision
    assert all(candidate.prediction is not None for candidate in last.candidates)  # its shadow
    for engine in engines:
        await engine.fault(kind="slow", factor=4.0)
    for _ in range(40):
        await ask(client, 12)
        if not watch.wrong:
            break
    assert not watch.wrong


@pytest.mark.usefixtures("impatient")
async def test_a_predictor_that_always_says_idle_gets_no_more_than_its_share(start: Start) -> None:
    liars = [await FakePredictor(snapshot).start(), await FakePredictor(lambda: snapshot(running=8)).start()]
    engines = FakeEngine(slowly(0.6)), FakeEngine(slowly(0.6))
    client = await start(
        *engines, policy="block", predictors={n: p.url for n, p in enumerate(liars)}, unseen_after_s=0.1
    )
    watch = client.gateway.decider.drift
    evidence = client.gateway.decider.evidence.values()
    await until(lambda: all(e.frames and e._profile is not None for e in evidence))
    posts = []
    for _ in range(80):
        posts.append(asyncio.create_task(client.post()))
        await asyncio.sleep(0.01)
        if watch.wrong:
            break
    assert watch.wrong.get(E0) == SNAPSHOTS
    heard = [len(engine.heard) for engine in engines]
    posts += [asyncio.create_task(client.post()) for _ in range(20)]
    await until(lambda: sum(len(engine.heard) for engine in engines) >= sum(heard) + 20)
    assert len(engines[1].heard) - heard[1] >= 10
    assert {status for status, _, _ in await asyncio.gather(*posts)} == {200}
    for liar in liars:
        await liar.stop()
