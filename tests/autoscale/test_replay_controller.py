"""Replaying the recent past at the rate to come: the fewest that meet the SLO, in both directions."""

import numpy as np
import pytest

from block.autoscale.controllers import controller_from
from block.autoscale.controllers.forecast import Forecast, Forecaster, moving_mean, on_grid, since_change
from block.autoscale.controllers.mixes import cheapest
from block.autoscale.controllers.window import thinned
from block.autoscale.controllers.work import Work, work_on
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


def test_what_is_wanted_is_expected_to_meet_the_target_and_one_fewer_is_not() -> None:
    plan = controller_from("replay:target=0.98", [KIND], SLO).decide(observed([8.0] * 200, {"a30": 1}))
    assert plan.want["a30"] > 1
    assert plan.evidence["missed"] <= 0.02 < plan.evidence["missed_with_fewer"]


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


def test_a_higher_target_wants_more() -> None:
    rates_rps = np.repeat(np.random.default_rng(3).uniform(2, 14, 14), 10)
    window = observed([*rates_rps.tolist(), *[8.0] * 20], {"a30": 4})
    assert wanted(window, target=0.999)["a30"] > wanted(window, target=0.6)["a30"]


def test_a_shift_to_longer_requests_at_the_same_rate_is_one_of_load() -> None:
    def made(prompts: list[int]) -> list[Observation]:
        return [
            Observation(
                at_s=seen.at_s, members=seen.members,
                arrivals=tuple(Arrival(one.at_s, prompt, 100) for one in seen.arrivals),
            )
            for seen, prompt in zip(observed([5.0] * 200, {"a30": 3}), prompts, strict=True)
        ]  # fmt: skip

    shifted = controller_from("replay", [KIND], SLO).decide(made([400] * 150 + [4000] * 50))
    steady = controller_from("replay", [KIND], SLO).decide(made([400] * 200))
    assert shifted.want["a30"] > steady.want["a30"], "though as many requests came"


def test_requests_that_are_dropped_leave_their_work_behind() -> None:
    window = observed([5.0] * 100, {"a30": 3})
    forecaster = Forecaster(work_on(KIND))
    before = forecaster.course(window).rates
    after = forecaster.course([*(thinned(seen) for seen in window[:60]), *window[60:]]).rates
    assert after == pytest.approx(before)


def test_without_a_request_one_is_kept_or_none_if_that_is_allowed() -> None:
    window = observed([0.0] * 80, {"a30": 3})
    assert wanted(window) == {"a30": 1}
    assert wanted(window, zero=1) == {"a30": 0}
    assert wanted(window[:20]) == {"a30": 3}  # too early to say


def test_with_none_there_the_first_request_wakes_one() -> None:
    quiet = observed([3.0] * 60 + [0.0] * 300, {"a30": 0})
    controller = controller_from("replay:zero=1", [KIND], SLO)
    for number in range(60, 361, 20):
        asleep = controller.decide(quiet[:number])
    assert asleep.want == {"a30": 0}
    last = quiet[-1]
    came = Observation(at_s=last.at_s + 15.0, arrivals=(Arrival(last.at_s + 7.0, 500, 100),), queued=1)
    assert controller.decide([*quiet, came]).want == {"a30": 1}


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
    for have in ({"small": 0, "large": 0}, {"small": 30, "large": 0}, {"small": 9, "large": 3}):
        want, missed = cheapest(kinds, have, lambda want: max(0.0, 1 - (want["small"] + 2 * want["large"]) / 7), 0.0)
        assert (want, missed) == ({"small": 7, "large": 0}, 0.0)


def test_a_mix_that_does_is_not_given_up_for_one_that_is_a_little_cheaper() -> None:
    def wanted_at(price: float) -> dict[str, int]:
        kinds = [Kind(name="small", price=1.0, most=30), Kind(name="large", price=price, most=30)]
        have = {"small": 1, "large": 3}
        return cheapest(kinds, have, lambda want: max(0.0, 1 - (want["small"] + 2 * want["large"]) / 7), 0.0)[0]

    assert wanted_at(2.3) == {"small": 1, "large": 3}
    assert wanted_at(3.5) == {"small": 7, "large": 0}


def test_if_nothing_will_do_no_more_are_taken_than_help() -> None:
    kinds = [Kind(name="only", most=10)]
    want, missed = cheapest(kinds, {"only": 1}, lambda want: max(0.4, 1 - want["only"] / 6), 0.01)
    assert missed == pytest.approx(0.4)
    assert want["only"] == 4


# ---- the forecast

EACH = Work(1.0, 0.0)


def told(rps: np.ndarray, lead_s: float = 60.0, **spans: float) -> Forecast:
    counts = [round(30 * float(rate)) for rate in rps]
    window = [Observation(at_s=30.0 * (i + 1), arrived=n, tokens=(n, 0)) for i, n in enumerate(counts)]
    forecaster = Forecaster(EACH, **spans)
    return forecaster.tell(forecaster.course(window), lead_s, lead_s)


def test_the_forecast_is_exceeded_by_as_much_of_the_work_as_it_says() -> None:
    rng = np.random.default_rng(5)
    wander = np.convolve(rng.normal(0, 0.4, 1540), 0.95 ** np.arange(41), mode="valid")
    rps = np.maximum(10 + wander + rng.normal(0, 1, 1500), 1.0)
    brought = above = 0.0
    for now in range(600, 1480, 4):
        actual = rps[now + 2 : now + 4].mean()
        brought += actual
        above += actual * (actual > told(rps[:now]).exceeded_by(0.2))
    assert 0.1 < above / brought < 0.3


def test_after_a_burst_began_its_end_is_known_to_be_near() -> None:
    rps = np.full(2000, 5.0)
    for start in range(40, 2000, 100):
        rps[start : start + 6] = 10.0
    rps = rps * np.random.default_rng(1).uniform(0.98, 1.02, 2000)
    assert told(rps[:1944]).exceeded_by(0.01) > 9.0, "it has just begun"
    assert told(rps[:1990]).exceeded_by(0.5) < 6.0, "it is over"


def test_traffic_in_bunches_is_forecast_by_its_bunches_and_not_by_the_last_minute() -> None:
    rps = np.where(np.random.default_rng(2).random(2000) < 0.1, 20.0, 1.0)
    for now in range(1980, 2000):
        assert told(rps[:now]).exceeded_by(0.05) > 9.0


def test_a_jump_is_believed_at_once_and_a_wandering_minute_is_not() -> None:
    come = np.random.default_rng(4).poisson(200.0, 1000).astype(float)
    steady = since_change(come, 120)[200:]
    assert np.std(steady) < 0.25 * np.std(moving_mean(come, 2)[200:])
    jumped = since_change(np.concatenate((come, come[:2] + 200.0)), 120)
    assert jumped[-2:] == pytest.approx(400.0, rel=0.1)


def test_of_traffic_in_bunches_the_mean_over_the_longest_window_is_believed() -> None:
    rng = np.random.default_rng(6)
    come = np.where(rng.random(3000) < 0.05, rng.exponential(400.0, 3000), 0.0)
    since, longest = since_change(come, 120)[240:], moving_mean(come, 120)[240:]
    assert np.mean(since == longest) > 0.9


def test_headroom_is_in_proportion_to_the_load() -> None:
    rng = np.random.default_rng(8)
    rps = np.full(2400, 6.0)
    for start in range(70, 2400, 150):
        rps[start : start + 10] = 10.0
    rps *= rng.uniform(0.98, 1.02, 2400)
    head = [told(rps[:2000] * scale).exceeded_by(0.01) / scale for scale in (1.0, 4.0)]
    assert head[0] == pytest.approx(head[1], rel=0.05)
    assert 9.0 < head[0] < 13.0, "the bursts that there were may come again"


def test_a_season_that_the_window_holds_is_foreseen() -> None:
    day = 400
    rps = np.where((np.arange(3 * day) % day) < 200, 2.0, 20.0) + np.random.default_rng(1).normal(0, 0.05, 3 * day)
    foreseen = told(rps[: 2 * day + 197], 120.0, base_s=300.0, period_s=30.0 * day)
    assert foreseen.by == "season"
    assert foreseen.exceeded_by(0.05) > 15.0


def test_without_a_past_an_allowance_is_added() -> None:
    assert told(np.full(5, 8.0)).exceeded_by(0.01) == pytest.approx(10.0)


def test_an_interval_that_nobody_saw_counts_as_the_one_before() -> None:
    seen = [Observation(at_s=30.0 * (i + 1), arrived=60, tokens=(60, 0)) for i in range(100)]
    blind = [*seen[:-1], Observation(at_s=3000.0, arrived=0, blind=("g",))]
    courses = [Forecaster(EACH).course(window) for window in (seen, blind)]
    assert np.array_equal(courses[0].rates, courses[1].rates)


def test_a_rush_of_short_requests_is_taken_for_one_of_usual_ones() -> None:
    seen = [Observation(at_s=30.0 * (i + 1), arrived=60, tokens=(60, 0)) for i in range(100)]
    rush = [Observation(at_s=3000.0 + 30.0 * (i + 1), arrived=120, tokens=(60, 0)) for i in range(2)]
    level = Forecaster(EACH).course([*seen, *rush]).level[-1]
    assert 3.5 < level < 4.0, "requests come twice as fast, though they bring no more yet"


def test_observations_at_uneven_times_are_put_on_an_even_grid() -> None:
    ends_s = np.array([10.0, 45.0, 60.0, 130.0, 180.0])
    rates = on_grid(ends_s, 2.0 * np.diff(ends_s, prepend=-25.0), 30.0)
    assert rates == pytest.approx(2.0)


def test_the_rate_is_right_from_the_second_observation_on() -> None:
    for count in (2, 3, 8):
        ends_s = 5.0 * np.arange(1, count + 1)
        assert on_grid(ends_s, np.full(count, 60.0), 30.0) == pytest.approx(12.0)
