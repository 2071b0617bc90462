"""Who decides how many: each controller does what its rule says, and the guard keeps all of them in bounds."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from block.autoscale.controllers import Guard, Memory, bounded, controller_from, controller_names, guard_for
from block.autoscale.controllers.window import Window
from block.autoscale.terms import Arrival, Kind, Member, Observation, Phase, Plan, Served
from block.core import Slo
from block.errors import ConfigError, UnknownNameError

KIND = Kind(name="gpu", profile="a30-qwen2-7b", most=12, cold_start_s=60.0)


def members(ready: int, starting: int = 0, kind: str = "gpu") -> tuple[Member, ...]:
    phases = [Phase.READY] * ready + [Phase.STARTING] * starting
    return tuple(Member(f"{kind}-{i}", kind, phase, 0.0) for i, phase in enumerate(phases))


def seen(at_s: float = 60.0, ready: int = 2, starting: int = 0, **more: object) -> Observation:
    return Observation(at_s=at_s, members=members(ready, starting), **more)  # type: ignore[arg-type]


# ---- the published rules


def test_preempt_adds_one_for_every_request_predicted_beyond_the_threshold() -> None:
    rule = controller_from("preempt", [KIND])
    assert rule.decide([seen(slow_e2e_s=(90.0, 71.0, 69.0), predicted_e2e_s=90.0)]).want == {"gpu": 4}
    assert rule.decide([seen(predicted_e2e_s=71.0)]).want == {"gpu": 3}


def test_preempt_as_published_never_removes() -> None:
    rule = controller_from("preempt", [KIND])
    assert rule.decide([seen(at_s=15.0 * i, ready=5, predicted_e2e_s=1.0) for i in range(100)]).want == {"gpu": 5}


def test_preempt_can_be_told_to_wait_and_to_remove() -> None:
    rule = controller_from("preempt:waits=1,remove_below_s=10,calm_s=60", [KIND])
    assert rule.decide([seen(starting=1, predicted_e2e_s=99.0)]).want == {"gpu": 3}
    assert rule.decide([seen(at_s=15.0 * i, ready=5, predicted_e2e_s=1.0) for i in range(5)]).want == {"gpu": 4}


def test_relief_adds_after_a_measured_breach_and_not_before() -> None:
    rule = controller_from("relief", [KIND])
    assert rule.decide([seen(served=(Served(50.0, 1.0, 71.0),))]).want == {"gpu": 3}
    assert rule.decide([seen(served=(Served(50.0, 60.0, 69.0),), predicted_e2e_s=500.0)]).want == {"gpu": 2}


def test_a_failed_request_counts_as_late() -> None:
    assert controller_from("relief", [KIND]).decide([seen(served=(Served(50.0, None, None),))]).want == {"gpu": 3}


# ---- Kubernetes' formula


@pytest.mark.parametrize(("queued", "want"), [(8, 2), (11, 2), (12, 3), (24, 5), (7, 2), (1, 1)], ids=str)
def test_the_hpa_wants_ready_times_metric_over_target_rounded_up_beyond_its_tolerance(queued: int, want: int) -> None:
    assert controller_from("hpa-queue:target=5", [KIND]).decide([seen(queued=queued)]).want == {"gpu": want}


def test_instances_that_are_starting_count_as_idle_so_that_they_are_not_ordered_twice() -> None:
    rule = controller_from("hpa-queue:target=5", [KIND])
    assert rule.decide([seen(ready=2, starting=2, queued=20)]).want == {"gpu": 4}


def test_an_unknown_metric_changes_nothing() -> None:
    for name in ("hpa-queue", "hpa-kv"):
        assert controller_from(name, [KIND]).decide([seen(ready=3)]).want == {"gpu": 3}
    assert controller_from("hpa-rps", [KIND]).decide([seen(ready=3, blind=("g",))]).want == {"gpu": 3}


# ---- the table


def test_every_controller_can_be_made_by_name_and_has_a_guard() -> None:
    for name in controller_names():
        controller = controller_from(name, [KIND], Slo(ttft_s=3.0))
        assert controller.name == name
        assert controller.history_s >= 0
        assert guard_for(name).least >= 0
        assert set(controller.decide([seen()]).want) == {"gpu"}


@pytest.mark.parametrize(
    ("text", "error"),
    [("magic", UnknownNameError), ("static:n=2", ConfigError), ("static:count=two", ConfigError),
     ("preempt:threshold_s=-1", ConfigError), ("replay:target=2.0", ConfigError), ("hpa-kv:target=0", ConfigError)],
)  # fmt: skip
def test_a_wrong_word_is_refused_in_one_sentence(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        controller_from(text, [KIND])


# ---- the guard


def asked(counts: Sequence[int], guard: Guard, blind: Sequence[bool] = (), kind: Kind = KIND) -> list[int]:
    """What the guard makes of one plan every 15 s."""
    memory, out = Memory(want={"gpu": 2}), []
    for number, count in enumerate(counts):
        dark = ("gateway",) if number < len(blind) and blind[number] else ()
        plan, memory = bounded(Plan({"gpu": count}, ""), 15.0 * number, memory, [kind], guard, blind=dark)
        out.append(plan.want["gpu"])
    return out


@given(st.lists(st.integers(-3, 100), max_size=60), st.integers(0, 4), st.integers(0, 8), st.sampled_from([0.0, 60.0]))
@settings(max_examples=150)
def test_the_count_is_never_below_the_least_nor_above_the_most(
    counts: list[int], least: int, more: int, settle_s: float
) -> None:
    guard = Guard(least=least, most=least + more, settle_s=settle_s)
    assert all(least <= count <= least + more for count in asked(counts, guard))


@given(st.lists(st.integers(1, 12), min_size=2, max_size=120))
@settings(max_examples=150)
def test_however_noisy_the_plans_the_count_goes_up_again_at_most_once_in_the_settling_time(counts: list[int]) -> None:
    got = asked(counts, Guard(settle_s=150.0))
    turns = [i for i in range(2, len(got)) if got[i] > got[i - 1]]
    falls = [i for i in range(1, len(got)) if got[i] < got[i - 1]]
    for fall in falls:
        # Before every fall there was no higher plan for the settling time, so no rise either.
        assert not any(fall - 9 <= rise < fall for rise in turns)


@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=80))
@settings(max_examples=150)
def test_while_a_source_is_blind_nothing_is_removed(steps: list[tuple[int, bool]]) -> None:
    got = [2, *asked([count for count, _ in steps], Guard(settle_s=0.0), [dark for _, dark in steps])]
    for (_, dark), before, after in zip(steps, got[:-1], got[1:], strict=True):
        assert not dark or after >= before


def test_a_rise_is_let_through_at_once_and_a_fall_after_the_settling_time() -> None:
    assert asked([5, *[3] * 12], Guard(settle_s=60.0)) == [5, 5, 5, 5, *[3] * 9]


def test_steps_and_pauses_are_kept() -> None:
    assert asked([9, 9, 9], Guard(settle_s=0.0, up_most=2)) == [4, 6, 8]
    assert asked([9, 9, 9, 9], Guard(settle_s=0.0, up_most=2, up_wait_s=30.0)) == [4, 4, 6, 6]
    assert asked([1, 1], Guard(least=0, settle_s=0.0, down_wait_s=30.0)) == [1, 1]


def test_the_total_is_bounded_by_adding_the_cheapest_and_leaving_out_the_dearest() -> None:
    kinds = [Kind(name="dear", price=4.0), Kind(name="cheap", price=1.0)]
    plan, _ = bounded(Plan({"dear": 5, "cheap": 5}, ""), 0.0, Memory(), kinds, Guard(most=7))
    assert plan.want == {"dear": 2, "cheap": 5}
    plan, _ = bounded(Plan({"dear": 0, "cheap": 0}, ""), 0.0, Memory(), kinds, Guard(least=3))
    assert plan.want == {"dear": 0, "cheap": 3}


def test_kinds_that_a_plan_leaves_out_stay() -> None:
    kinds = [Kind(name="a"), Kind(name="b")]
    plan, _ = bounded(Plan({"a": 2}, ""), 0.0, Memory(want={"a": 1, "b": 3}), kinds, Guard())
    assert plan.want == {"a": 2, "b": 3}


# ---- the window


def test_a_window_forgets_what_is_old_and_keeps_the_counts_of_what_it_thins() -> None:
    window = Window(history_s=1000.0, detail_s=100.0)
    for number in range(200):
        arrivals = tuple(Arrival(10.0 * number, 10, 10) for _ in range(3))
        window.append(seen(at_s=10.0 * number, arrivals=arrivals))
    assert 1000 <= window.seen[-1].at_s - window.seen[0].at_s <= 1300
    assert {one.count for one in window.seen} == {3}
    assert all(bool(one.arrivals) == (one.at_s > 1990 - 100) for one in window.seen)
