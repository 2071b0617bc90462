"""Predictors that are right, slow, dead or lying: they change which instance is chosen, never whether one is (law L10)."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from block.core import InstanceId, Request
from block.gateway.deciding.evidence import Evidence
from block.gateway.deciding.expectations import Expectations
from block.length.table import make_estimator
from block.predict.snapshot import ANONYMOUS, request_key
from block.steptime.profile import load_profile
from gateway.conftest import Client, Start, until
from gateway.fakes import FakeEngine, FakePredictor, encoded, never_answers, snapshot

Predictors = Callable[..., Awaitable[dict[int, str]]]


def idle() -> bytes:
    return snapshot()


def busy() -> bytes:
    return snapshot(running=64, waiting=40)


@pytest.fixture
async def predictors() -> AsyncIterator[Predictors]:
    """Start predictors of these frame sources; returns what ``start`` takes as ``predictors``."""
    running: list[FakePredictor] = []

    async def begin(*frames: Callable[[], bytes | None]) -> dict[int, str]:
        running.extend([await FakePredictor(frame).start() for frame in frames])
        begin.running = running  # type: ignore[attr-defined]
        return {n: predictor.url for n, predictor in enumerate(running)}

    yield begin
    for predictor in running:
        await predictor.stop()


async def settled(client: Client) -> None:
    """Every predictor has spoken and told its step times."""
    evidence = client.gateway.decider.evidence.values()
    await until(lambda: all(e.frames and e._profile is not None for e in evidence))


async def decision(client: Client, request_id: str) -> Any:
    status, body = await client.get(f"/v1/decisions/{request_id}")
    assert status == 200
    return json.loads(body)


async def test_requests_go_where_they_are_predicted_to_end_first(start: Start, predictors: Predictors) -> None:
    urls = await predictors(busy, idle, busy)
    client = await start(FakeEngine(), FakeEngine(), FakeEngine(), policy="block", predictors=urls)
    await settled(client)
    for n in range(5):
        _, _, headers = await client.post(headers={"x-request-id": f"r{n}"})
        assert headers["x-gateway-destination-endpoint"] == "e1"
        assert 0 < float(headers["x-predicted-ttft-ms"]) <= float(headers["x-predicted-e2e-ms"])
    why = await decision(client, "r4")
    assert (why["chosen"], why["evidence"], why["fallback"], why["policy"]) == ("e1", "prediction", None, "block")
    costs = {c["instance"]: c["cost"] for c in why["candidates"]}
    assert costs["e1"] < min(costs["e0"], costs["e2"])
    assert why["outcome"]["status"] == 200
    assert all(0 <= c["prediction"]["snapshot_age_s"] < 1 for c in why["candidates"])
    assert await client.metric("block_fallback_total") == 0
    assert (await client.get("/ready"))[0] == 200


async def test_simultaneous_arrivals_do_not_herd(start: Start, predictors: Predictors) -> None:
    """
    The snapshots never show them; the ledger alone must spread them: no engine gets twice its share of ten or under half.

    Nearer than that they need not be: a step takes as long with 9 requests as with 16, so the phase of the step decides there,
    and how far the steps have come when a request arrives is the machine's own affair.
    """
    urls = await predictors(idle, idle, idle, idle)
    engines = [FakeEngine(never_answers) for _ in range(4)]
    client = await start(*engines, policy="block", predictors=urls, hang_after_s=0, unseen_after_s=60.0)
    await settled(client)
    body = {"max_tokens": 200, "ignore_eos": True}
    tasks = [asyncio.create_task(client.post(body=body)) for _ in range(40)]
    await until(lambda: sum(len(e.heard) for e in engines) == 40)
    assert all(5 <= len(e.heard) < 20 for e in engines), [len(e.heard) for e in engines]
    for task in tasks:
        task.cancel()


FAULTS: dict[str, tuple[Callable[[], bytes | None], str]] = {
    "silent": (lambda: None, "prediction-missing"),
    "garbage": (lambda: b"not a snapshot at all" * 20, "prediction-missing"),
    "truncated": (lambda: busy()[:-40], "prediction-missing"),
    "negative counts": (lambda: snapshot(running=4, outputs=-7), "prediction-missing"),
    "impossible blocks": (lambda: snapshot(running=4, kv_blocks_free=10**6), "prediction-missing"),
    "impossible limits": (lambda: snapshot(running=4, max_num_seqs=0), "prediction-missing"),
    "from the future": (lambda: snapshot(running=4, age_s=-60.0), "prediction-missing"),
    "standing still": (lambda: snapshot(running=4, age_s=60.0), "prediction-missing"),
    "not a time": (lambda: snapshot(running=4, taken_s=float("nan")), "prediction-missing"),
    "a billion waiting": (lambda: snapshot(running=4, waiting_total=10**9), "prediction-missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_faulty_predictor_costs_no_request(start: Start, predictors: Predictors, fault: str) -> None:
    frame, fallback = FAULTS[fault]
    urls = await predictors(idle, frame)
    client = await start(FakeEngine(), FakeEngine(), policy="block", predictors=urls, hang_after_s=0)
    await until(lambda: client.gateway.decider.evidence[InstanceId("e0")]._profile is not None)
    await asyncio.sleep(0.05)
    for n in range(4):
        assert (await client.post(headers={"x-request-id": f"r{n}"}))[0] == 200
    why = await decision(client, "r3")
    assert (why["evidence"], why["fallback"]) == ("load", fallback)
    assert all(c["prediction"] is None for c in why["candidates"])
    assert await client.metric("block_fallback_total") == 4
    assert await client.metric("block_evidence_missing_total") >= 4


async def test_a_predictor_that_dies_and_returns_is_used_again(start: Start, predictors: Predictors) -> None:
    urls = await predictors(idle, busy)
    client = await start(FakeEngine(), FakeEngine(), policy="block", predictors=urls, stale_after_s=0.2)
    await settled(client)
    await client.post()
    assert await client.metric("block_fallback_total") == 0
    first = predictors.running[0]  # type: ignore[attr-defined]
    await first.stop()
    await asyncio.sleep(0.3)
    assert (await client.post())[0] == 200
    assert await client.metric("block_fallback_total") == 1
    await first.start()
    evidence = client.gateway.decider.evidence[InstanceId("e0")]
    await until(lambda: evidence.fresh(time.time()))
    assert (await client.post(headers={"x-request-id": "back"}))[0] == 200
    assert (await decision(client, "back"))["evidence"] == "prediction"


async def test_instances_without_predictors_are_balanced_by_what_the_gateway_knows(start: Start) -> None:
    engines = [FakeEngine(never_answers) for _ in range(3)]
    client = await start(*engines, policy="least-outstanding", hang_after_s=0)
    tasks = [asyncio.create_task(client.post()) for _ in range(9)]
    await until(lambda: sum(len(e.heard) for e in engines) == 9)
    assert [len(e.heard) for e in engines] == [3, 3, 3]
    for task in tasks:
        task.cancel()


async def test_remote_predictors_are_asked_and_missed_ones_fall_back(start: Start, predictors: Predictors) -> None:
    urls = await predictors(idle, idle)
    slow, quick = predictors.running  # type: ignore[attr-defined]
    fields = {"ttft_s": 0.1, "tpot_s": None, "queue_delay_s": 0.0, "preemptions": 0}
    slow.prediction, quick.prediction = lambda: fields | {"e2e_s": 2.0}, lambda: fields | {"e2e_s": 1.0}
    client = await start(
        FakeEngine(), FakeEngine(), policy="block", predictors=urls, predict="remote", predict_timeout_s=0.15
    )
    for _ in range(3):
        _, _, headers = await client.post(headers={"x-request-id": "r"})
        assert headers["x-gateway-destination-endpoint"] == "e1"
        assert float(headers["x-predicted-e2e-ms"]) == pytest.approx(1000, abs=150)  # from the request's arrival on
    slow.delay_s = 1.0
    assert (await client.post(headers={"x-request-id": "late"}))[0] == 200
    assert (await decision(client, "late"))["fallback"] == "prediction-missing"
    slow.delay_s, slow.prediction = 0.0, lambda: {"lies": True}
    assert (await client.post())[0] == 200
    assert await client.metric("block_fallback_total") == 2


async def test_only_the_oracle_policy_reads_the_emulation_header(start: Start, predictors: Predictors) -> None:
    urls = await predictors(idle, idle)
    header = {"x-emulate-output-tokens": "7", "x-request-id": "r"}
    for policy, told in (("block-oracle", True), ("block", False)):
        engines = [FakeEngine(), FakeEngine()]
        client = await start(*engines, policy=policy, predictors=urls)
        await settled(client)
        await client.post(body={"max_tokens": 500}, headers=header)
        await client.post(body={"max_tokens": 500}, headers=header | {"x-request-id": "r2"})
        e2e = (await decision(client, "r2"))["candidates"][0]["prediction"]["e2e_s"]
        assert (e2e < 0.1) is told
        assert {e.heard[0].headers["x-emulate-output-tokens"] for e in engines if e.heard} == {"7"}


async def test_a_missed_target_is_counted_and_a_wrong_one_refused(start: Start) -> None:
    client = await start(FakeEngine())
    await client.post(headers={"x-slo-e2e-ms": "0.001"})
    assert await client.metric("block_request_slo_violation_total") == 1
    status, body, _ = await client.post(headers={"x-slo-ttft-ms": "soon"})
    assert (status, json.loads(body)["error"]["param"]) == (400, "x-slo-ttft-ms")


# The ledger and the counters, without sockets


def evidence_of(unseen_after_s: float = 5.0) -> Evidence:
    evidence = Evidence(
        InstanceId("e"), Expectations(make_estimator("constant")), stale_after_s=2.0, unseen_after_s=unseen_after_s
    )
    evidence.take_profile(load_profile("h200-llama3.1-8b"), 1.0)
    return evidence


def request(request_id: str) -> Request:
    return Request(id=request_id, arrived_s=0.0, prompt_tokens=100)


def test_a_dispatched_request_counts_until_a_snapshot_shows_it() -> None:
    evidence, now_s = evidence_of(), time.time()
    evidence.take_frame(snapshot(running=3), now_s)
    evidence.sent(request("a"), 400, 50, now_s)
    load = evidence.load(0, 0, 0, now_s)
    assert (load.running, load.waiting, load.in_flight) == (3, 1, 4)
    evidence.take_frame(snapshot(running=3), now_s)
    assert evidence.load(0, 0, 0, now_s).in_flight == 4
    evidence.take_frame(snapshot(running=4, ids=("a",)), now_s)
    assert evidence.load(0, 0, 0, now_s).in_flight == 4
    assert evidence.unseen == 0


def test_a_dispatched_request_counts_no_more_when_its_answer_ended_or_time_passed() -> None:
    evidence, now_s = evidence_of(unseen_after_s=1.0), time.time()
    evidence.take_frame(snapshot(), now_s)
    key = evidence.sent(request("a"), 400, 50, now_s)
    evidence.sent(request("b"), 400, 50, now_s)
    assert key == request_key("a")
    evidence.ended(key)
    assert evidence.load(0, 0, 0, now_s).in_flight == 1
    evidence.take_frame(snapshot(), now_s + 1.5)
    assert evidence.load(0, 0, 0, now_s + 1.5).in_flight == 0


def counted(evidence: Evidence, now_s: float, **fields: int) -> tuple[int, int]:
    """(in flight, unseen) after a snapshot that tells numbers and no names, as one made from metrics does."""
    evidence.take_frame(snapshot(flags=ANONYMOUS, taken_s=now_s, **fields), now_s)
    return evidence.load(0, 0, 0, now_s).in_flight, evidence.unseen


def test_of_a_snapshot_without_names_no_request_is_lost_and_none_counted_twice() -> None:
    evidence, now_s = evidence_of(), time.time()
    keys = [evidence.sent(request(f"r{n}"), 400, 50, now_s + 0.01 * n) for n in range(3)]
    assert counted(evidence, now_s + 0.05) == (3, 3), "the engine has not counted them yet"
    assert counted(evidence, now_s + 0.10, running=2) == (3, 1), "it has counted two, surely the first"
    assert counted(evidence, now_s + 0.15, running=2, waiting=1) == (3, 0)
    late = evidence.sent(request("late"), 400, 50, now_s + 0.16)
    assert evidence.load(0, 0, 0, now_s + 0.16).in_flight == 4, "dispatched after the engine was counted"
    assert counted(evidence, now_s + 0.20, running=3) == (4, 1)
    assert counted(evidence, now_s + 0.25, running=4) == (4, 0)
    assert counted(evidence, now_s + 9.0, running=4) == (4, 0), "requests that last are not counted twice, however long"
    assert counted(evidence, now_s + 9.1, running=9) == (9, 0), "others' are there too"
    for key in (*keys, late):
        evidence.ended(key)
    assert counted(evidence, now_s + 9.2, running=5) == (5, 0)


def test_a_request_in_the_part_of_a_queue_that_is_only_counted_is_not_counted_twice() -> None:
    evidence, now_s = evidence_of(), time.time()
    for name in ("a", "b"):
        evidence.sent(request(name), 400, 50, now_s)
    beyond = {"waiting_total": 4, "waiting_tokens_beyond": 200, "taken_s": now_s + 0.1}
    evidence.take_frame(snapshot(running=2, waiting=2, **beyond), now_s + 0.1)  # type: ignore[arg-type]
    assert evidence.load(0, 0, 0, now_s + 0.1).in_flight == 6
    assert evidence.unseen == 0


def test_an_older_snapshot_does_not_replace_a_newer_one() -> None:
    evidence, now_s = evidence_of(), time.time()
    evidence.take_frame(snapshot(running=3, sequence=10), now_s)
    assert evidence.fresh(now_s)
    evidence.take_frame(snapshot(running=9, sequence=9), now_s)
    assert evidence.load(0, 0, 0, now_s).running == 3
    evidence.take_frame(snapshot(running=9, sequence=1, epoch=2), now_s)
    assert evidence.load(0, 0, 0, now_s).running == 9


def test_an_idle_engines_old_snapshot_is_evidence_as_long_as_its_predictor_speaks() -> None:
    evidence, now_s = evidence_of(), time.time()
    evidence.take_frame(snapshot(age_s=100.0), now_s)
    assert evidence.fresh(now_s)
    assert not evidence.fresh(now_s + 3.0)
    assert evidence.problem is not None
    assert "silent" in evidence.problem


def test_without_evidence_the_gateways_own_books_count() -> None:
    load = evidence_of().load(in_flight=7, sent_last_minute=9, in_flight_tokens=500, now_s=time.time())
    assert (load.in_flight, load.dispatched_last_minute, load.kv_blocks_free) == (7, 9, None)


def test_more_unseen_requests_make_predictions_later() -> None:
    from block.predict.whatif import predict_all

    evidence, now_s = evidence_of(), time.time()
    evidence.take_frame(snapshot(running=2), now_s)
    question: dict[str, Any] = {"prompt_tokens": 1000, "max_tokens": 100, "output_tokens": 50, "now_s": now_s}
    mirror = evidence.mirror(now_s)
    assert mirror is not None
    before = predict_all([mirror], **question)[0]
    for n in range(30):
        evidence.sent(Request(id=f"u{n}", arrived_s=0.0, prompt_tokens=1000), 400, 100, now_s)
    mirror = evidence.mirror(now_s)
    assert mirror is not None
    after = predict_all([mirror], **question)[0]
    assert after.ttft_s > 2 * before.ttft_s
    evidence.take_frame(snapshot(running=2), now_s)  # the ledger survives a snapshot that does not show them
    mirror = evidence.mirror(now_s)
    assert mirror is not None
    assert predict_all([mirror], **question)[0].ttft_s == pytest.approx(after.ttft_s, rel=0.2)


def test_another_scale_makes_predictions_later_and_nonsense_is_refused() -> None:
    from block.gateway.members.subscription import profile_of
    from block.predict.whatif import predict_all
    from gateway.fakes import profile_fields

    evidence, now_s = evidence_of(), time.time()
    evidence.take_frame(snapshot(running=2), now_s)
    e2e_s = []
    for scale in (1.0, 2.0):
        evidence.take_profile(*profile_of(encoded(profile_fields() | {"scale": scale})))
        mirror = evidence.mirror(now_s)
        assert mirror is not None
        question: dict[str, Any] = {"prompt_tokens": 1000, "max_tokens": 100, "output_tokens": 50, "now_s": now_s}
        e2e_s.append(predict_all([mirror], **question)[0].e2e_s)
    assert e2e_s[1] > 1.5 * e2e_s[0]
    for wrong in (
        {"scale": -1.0}, {"scale": "x"}, {"nonsense": 1}, {"decode_knots": []}, {"decode_knots": [[1e12, 0.1]]},
        {"decode_knots": [[1, -0.1], [2, 0.1]]}, {"mixed_knots": [[2, 0.1], [1, 0.1]]}, {"kv_s": -1.0}, {"kv_s": 1e9},
    ):  # fmt: skip
        with pytest.raises(ValueError):  # noqa: PT011  msgspec's errors are ValueErrors
            profile_of(encoded(profile_fields() | {"scale": 1.0} | wrong))
