"""Replaying the recent past at the rate to come: the fewest that meet the SLO, in both directions."""

import numpy as np
import pytest

from block.autoscale.controllers import controller_from
from block.autoscale.controllers.forecast import Forecast, Forecaster
from block.autoscale.controllers.mixes import cheapest
from block.autoscale.terms import Arrival, Kind, Member, Observation, Phase
from block.core import Slo
from block.engine.limits import EngineLimits

LIMITS = EngineLimits(max_num_seqs=64, num_gpu_blocks=7290, max_model_len=8192)
KIND = Kind(name="a30", profile="a30-qwen2-7b", limits=LIMITS, most=16, cold_start_s=60.0)
SLO = Slo(ttft_s=3.0, tpot_s=0.15)


def observed(rates_rps: list[float], ready: dict[str, int], *, queued: int = 0, seed: int = 1) -> list[Observation]:
    """Poisson arrivals, one observation every 15 s, of 1,200 prompt and 200 output tokens on average."""
    rng = np.random.default_rng(seed)
    window = []
    members = tuple(Member(f"{kind}-{i}", kind, Phase.READY, 0.0) for kind, n in ready.items() for i in range(n))
    for number, rate_rps in enumerate(rates_rps):
        times_s = np.sort(15.0 * (number + rng.random(rng.poisson(15.0 * rate_rps))))
        arrivals = tuple(
            Arrival(float(at_s), int(rng.integers(100, 2300)), int(rng.integers(1, 400))) for at_s in times_s
        )
        window.append(Observation(at_s=15.0 * (number + 1), members=members, arrivals=arrivals, queued=queued))
    return window


def wanted(window: list[Observation], *kinds: Kind, text: str = "replay", **options: float) -> dict[str, int]:
    return controller_from(text, kinds or (KIND,), SLO, **options).decide(window).want


def test_more_are_wanted_for_more_traffic_and_fewer_for_less() -> None:
    have = {"a30": 4}
    few, some, many = (wanted(observed([rate_rps] * 60, have))["a30"] for rate_rps in (1.5, 7.0, 18.0))
    assert few < 4
    assert few < some < many
    assert many >= 6


def test_what_is_wanted_bears_the_rate_and_one_fewer_does_not() -> None:
    controller = controller_from("replay:quantile=0.5,caution=1.0", [KIND], SLO)
    window = observed([8.0] * 60, {"a30": 1})
    plan = controller.decide(window)
    assert plan.evidence["bears_rps"] >= plan.evidence["forecast_rps"]
    per_instance = plan.evidence["bears_rps"] / plan.want["a30"]
    assert plan.evidence["bears_rps"] - 1.3 * per_instance < plan.evidence["forecast_rps"]


def test_two_controllers_that_see_the_same_want_the_same() -> None:
    window = observed([6.0] * 50, {"a30": 2})
    early = controller_from("replay", [KIND], SLO)
    for number in range(30, 50):
        early.decide(window[:number])
    assert early.decide(window) == controller_from("replay", [KIND], SLO).decide(window)


def test_longer_prompts_at_the_same_rate_want_more() -> None:
    window = observed([6.0] * 40, {"a30": 3})
    longer = [
        Observation(
            at_s=seen.at_s, members=seen.members,
            arrivals=tuple(Arrival(one.at_s, 2 * one.prompt_tokens, one.output_tokens) for one in seen.arrivals),
        )
        for seen in window
    ]  # fmt: skip
    assert wanted(longer)["a30"] > wanted(window)["a30"]


def test_a_backlog_wants_more_than_the_rate_alone() -> None:
    rates_rps = [4.0] * 40 + [11.0] * 8
    assert wanted(observed(rates_rps, {"a30": 2}, queued=200))["a30"] > wanted(observed(rates_rps, {"a30": 2}))["a30"]


def test_dearer_caution_and_a_higher_worth_of_a_miss_want_more() -> None:
    rates_rps = np.repeat(np.random.default_rng(3).uniform(2, 14, 14), 10)
    window = observed([*rates_rps.tolist(), *[8.0] * 20], {"a30": 4})
    assert wanted(window, quantile=0.98)["a30"] > wanted(window, quantile=0.5)["a30"]
    assert wanted(window, worth=1.0)["a30"] > wanted(window, worth=0.0002)["a30"]


def test_without_a_request_one_is_kept_or_none_if_that_is_allowed() -> None:
    window = observed([0.0] * 80, {"a30": 3})
    assert wanted(window) == {"a30": 1}
    assert wanted(window, zero=1) == {"a30": 0}
    assert wanted(window[:20]) == {"a30": 3}  # too early to say


def test_requests_that_miss_even_alone_are_no_reason_for_more() -> None:
    slow = [
        Observation(
            at_s=seen.at_s, members=seen.members,
            arrivals=tuple(Arrival(one.at_s, 8000 if i % 10 == 0 else 300, 20) for i, one in enumerate(seen.arrivals)),
        )
        for seen in observed([1.0] * 60, {"a30": 2})
    ]  # fmt: skip
    assert controller_from("replay", [KIND], Slo(ttft_s=0.5)).decide(slow).want["a30"] < 8


def test_of_two_kinds_the_cheapest_mix_is_wanted() -> None:
    window = observed([9.0] * 60, {"a30": 3, "h200": 0})
    fast = Kind(name="h200", profile="h200-qwen2-7b", limits=LIMITS, most=6, price=1.5)
    dear = Kind(name="h200", profile="h200-qwen2-7b", limits=LIMITS, most=6, price=40.0)
    assert wanted(window, KIND, fast)["h200"] >= 1
    assert wanted(window, KIND, dear)["h200"] == 0


def test_the_cheapest_counts_are_found_whatever_the_present_ones() -> None:
    kinds = [Kind(name="small", price=1.0, most=30), Kind(name="large", price=2.5, most=30)]
    for have in ({"small": 0, "large": 0}, {"small": 30, "large": 0}, {"small": 3, "large": 2}):
        want, missed = cheapest(kinds, have, lambda want: max(0.0, 1 - (want["small"] + 2 * want["large"]) / 7), 0.0)
        assert (want, missed) == ({"small": 7, "large": 0}, 0.0)


def test_if_nothing_will_do_no_more_are_taken_than_help() -> None:
    kinds = [Kind(name="only", most=10)]
    want, missed = cheapest(kinds, {"only": 1}, lambda want: max(0.4, 1 - want["only"] / 6), 0.01)
    assert missed == pytest.approx(0.4)
    assert want["only"] == 4


# ---- the forecast


def told(rps: np.ndarray, quantile: float = 0.9, **spans: float) -> Forecast:
    window = [Observation(at_s=15.0 * (i + 1), arrived=round(15 * float(rate))) for i, rate in enumerate(rps)]
    return Forecaster(**spans).tell(window, 60.0, 60.0, quantile)


def test_the_forecast_is_high_enough_as_often_as_its_quantile_says() -> None:
    rng = np.random.default_rng(5)
    wander = np.convolve(rng.normal(0, 0.4, 940), 0.95 ** np.arange(41), mode="valid")
    rps = np.maximum(10 + wander + rng.normal(0, 1, 900), 1.0)
    enough = []
    for now in range(400, 880, 4):
        actual = rps[now + 4 : now + 24].mean()
        enough.append(told(rps[:now], 0.8).peak_rps >= actual)
    assert 0.65 < np.mean(enough) < 0.95


def test_a_season_that_the_window_holds_is_foreseen() -> None:
    day = 200
    rps = np.where((np.arange(3 * day) % day) < 100, 2.0, 20.0) + np.random.default_rng(1).normal(0, 0.05, 3 * day)
    foreseen = told(rps[: 2 * day + 97], level_s=30.0, mean_s=60.0, period_s=15.0 * day)
    assert foreseen.by == "season"
    assert foreseen.peak_rps > 15.0


def test_without_a_past_an_allowance_is_added() -> None:
    assert told(np.full(5, 8.0)).peak_rps == pytest.approx(10.0)


def test_an_interval_that_nobody_saw_counts_as_the_one_before() -> None:
    window = [Observation(at_s=15.0 * (i + 1), arrived=60, blind=("g",) if i == 39 else ()) for i in range(40)]
    blind = [*window[:-1], Observation(at_s=600.0, arrived=0, blind=("g",))]
    assert Forecaster().tell(blind, 60.0, 180.0, 0.9) == Forecaster().tell(window, 60.0, 180.0, 0.9)
