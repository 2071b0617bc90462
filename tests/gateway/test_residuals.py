"""Prediction intervals hold for the share of requests that they promise, also after the engine has changed."""

from random import Random

import pytest

from block.core import InstanceId, Prediction, Request
from block.gateway.deciding.residuals import KEPT, LEAST, Residuals, Ring
from block.length.table import make_estimator

A, B = InstanceId("a"), InstanceId("b")


def prediction(ttft_s: float = 0.1, tokens: int = 100, tpot_s: float = 0.01, **more: bool) -> Prediction:
    return Prediction(ttft_s, ttft_s + tpot_s * (tokens - 1), tpot_s if tokens > 1 else None, 0.0, 0, **more)


def feed(residuals: Residuals, ratio: float, times: int = LEAST, instance: InstanceId = A) -> None:
    for n in range(times):
        p = prediction()
        residuals.observe(instance, p, None, ttft_s=p.ttft_s * ratio, e2e_s=p.e2e_s * ratio, now_s=float(n))


@pytest.mark.parametrize("level", [0.8, 0.9])
def test_the_promised_share_lies_inside_before_and_after_a_shift(level: float) -> None:
    rng, estimator, residuals = Random(5), make_estimator("history"), Residuals(level)

    def length() -> int:
        return int(rng.lognormvariate(5, 0.8)) + 1

    for n in range(300):
        estimator.observe(Request(id=f"h{n}", arrived_s=0, prompt_tokens=1), length())
    held: list[tuple[bool, bool]] = []
    for n in range(5000):
        cap = rng.choice([20, 100, 2000])
        request = Request(id=f"r{n}", arrived_s=0, prompt_tokens=1, max_tokens=cap)
        estimate = estimator.estimate(request)
        expected = max(1, round(estimate.expected_total(0)))
        p = prediction(rng.choice([0.02, 2.0]), expected)
        interval = residuals.interval(A, p, estimate, expected, n * 0.05)
        off = rng.lognormvariate(0, 0.15) * (1.0 if n < 2000 else 1.6)  # the engine gets slower by 60 %
        tokens = min(length(), cap)
        ttft_s, e2e_s = p.ttft_s * off, (p.ttft_s + 0.01 * (tokens - 1)) * off
        if interval.ttft_low_s is not None and interval.e2e_low_s is not None:
            assert interval.ttft_high_s is not None
            assert interval.e2e_high_s is not None
            held.append(
                (
                    interval.ttft_low_s <= ttft_s <= interval.ttft_high_s,
                    interval.e2e_low_s <= e2e_s <= interval.e2e_high_s,
                )
            )
        residuals.observe(A, p, interval, ttft_s=ttft_s, e2e_s=e2e_s, now_s=n * 0.05)
        estimator.observe(request, tokens)
    for part in (held[:1900], held[2500:]):
        for shares in zip(*part, strict=True):
            assert sum(shares) / len(shares) == pytest.approx(level, abs=0.025)
    coverage = residuals.of(A).e2e.coverage
    assert coverage == pytest.approx(level, abs=0.08)
    assert residuals.of(A).ttft.quantile(0.5) == pytest.approx(1.6, rel=0.1)


def test_without_enough_answers_there_is_no_interval_and_others_stand_in_for_a_newcomer() -> None:
    residuals = Residuals()
    feed(residuals, 1.2, LEAST - 1)
    assert residuals.interval(A, prediction(), None, 100, 0.0).ttft_low_s is None
    feed(residuals, 1.2, 1)
    ours, newcomer = (residuals.interval(i, prediction(), None, 100, 0.0) for i in (A, B))
    assert ours == newcomer
    assert ours.ttft_low_s == pytest.approx(0.12)
    feed(residuals, 3.0, LEAST, B)
    assert residuals.interval(B, prediction(), None, 100, 0.0).ttft_low_s == pytest.approx(0.3)
    residuals.forget(B)
    assert B not in residuals.instances


def test_a_request_that_must_be_short_has_a_narrow_interval() -> None:
    estimator, residuals = make_estimator("history"), Residuals()
    for n in range(200):
        estimator.observe(Request(id=f"h{n}", arrived_s=0, prompt_tokens=1), 10 * (n + 1))
    feed(residuals, 1.0)
    widths = []
    for cap in (5, 500):
        estimate = estimator.estimate(Request(id=f"r{cap}", arrived_s=0, prompt_tokens=1, max_tokens=cap))
        expected = round(estimate.expected_total(0))
        interval = residuals.interval(A, prediction(0.1, expected), estimate, expected, 0.0)
        assert interval.e2e_low_s is not None
        assert interval.e2e_high_s is not None
        widths.append(interval.e2e_high_s - interval.e2e_low_s)
    assert widths[0] < 0.05 < 2 < widths[1]


def test_what_was_cut_off_by_the_horizon_teaches_nothing() -> None:
    residuals = Residuals()
    for _ in range(LEAST):
        residuals.observe(A, prediction(truncated=True), None, ttft_s=1.0, e2e_s=1.0, now_s=0.0)
    assert A not in residuals.instances


def test_a_ring_keeps_the_newest_in_their_order() -> None:
    ring = Ring(0.9)
    for n in range(KEPT + 10):
        ring.note(float(n), float(n), float(n), float(n))
    assert (len(ring), ring.count, ring.last_s) == (KEPT, KEPT + 10, KEPT + 9)
    assert ring.newest(3) == [KEPT + 7, KEPT + 8, KEPT + 9]
    assert ring.scale(0.5) == pytest.approx(KEPT / 2 + 10, abs=2)
