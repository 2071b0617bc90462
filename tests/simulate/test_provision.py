"""Instances that come and go in virtual time: nothing is lost, what is used is paid for, a cold start is waited for."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from block.autoscale.controllers import Guard, controller_from
from block.autoscale.terms import Kind, Observation, Phase, Plan
from block.core import Slo
from block.engine.limits import EngineLimits
from block.simulate.config import SimulationConfig
from block.simulate.fleet import Fleet
from block.simulate.membership import provision_cluster
from block.simulate.optimum import optimum
from block.simulate.provision import Outcome, Setting, Traffic, provision
from block.workload.offer import WorkloadConfig, offer

KIND = Kind(
    name="gpu",
    profile="a30-qwen2-7b",
    limits=EngineLimits(max_num_seqs=64, num_gpu_blocks=7290),
    most=8,
    cold_start_s=60.0,
)
SLO = Slo(ttft_s=3.0)
AT_ONCE = Guard(least=0, settle_s=0.0)


class Course:
    """A controller that wants a given count from each time on."""

    name = "course"
    history_s = 0.0

    def __init__(self, *course: tuple[float, int]) -> None:
        self.course, self.seen = course, list[Observation]()

    def decide(self, window: Sequence[Observation]) -> Plan:
        self.seen.append(window[-1])
        return Plan({"gpu": next(n for at_s, n in reversed(self.course) if at_s <= window[-1].at_s)}, "as told")


def steady(rate_rps: float, seconds: float, seed: int = 1) -> Traffic:
    rng = np.random.default_rng(seed)
    at_s = np.sort(rng.random(int(rate_rps * seconds)) * seconds)
    return Traffic(
        at_s, rng.integers(50, 2000, len(at_s)).astype(np.int32), rng.integers(1, 400, len(at_s)).astype(np.int32)
    )


def run(traffic: Traffic, controller: Course, start: int, kind: Kind = KIND) -> Outcome:
    return provision(traffic, controller, Setting(kinds=(kind,), start={"gpu": start}, guard=AT_ONCE))


def test_a_static_pool_is_paid_for_all_the_time() -> None:
    done = run(steady(2.0, 300), Course((0.0, 3)), 3)
    assert done.instance_s["gpu"] == pytest.approx(3 * done.steps[-1].at_s)
    assert done.actions == 0
    assert done.within(SLO).all()


def test_an_instance_takes_requests_one_cold_start_after_its_order() -> None:
    controller = Course((0.0, 1), (100.0, 2))
    done = run(steady(2.0, 300), controller, 1)
    ready = {step.at_s: step.ready for step in done.steps}
    ordered_s = 105.0
    assert ready[ordered_s] == ready[ordered_s + 45.0] == 1
    assert ready[ordered_s + 75.0] == 2
    assert done.instance_s["gpu"] == pytest.approx(done.steps[-1].at_s + done.steps[-1].at_s - ordered_s)


def test_an_instance_that_is_removed_ends_its_requests_and_is_paid_for_until_then() -> None:
    done = run(steady(3.0, 300), Course((0.0, 3), (150.0, 1)), 3)
    assert np.isfinite(done.e2e_s).all()
    after = next(step for step in done.steps if step.at_s == 150.0)
    assert (after.ready, after.draining) == (1, 2)
    assert 3 * 150 + done.steps[-1].at_s - 150 < done.instance_s["gpu"] < 3 * 200 + done.steps[-1].at_s - 150


def test_a_request_that_comes_while_none_is_ready_waits_for_the_first() -> None:
    done = run(steady(1.0, 300), Course((0.0, 0), (120.0, 1)), 0)
    assert np.isfinite(done.e2e_s).all()
    assert done.ttft_s[0] > 120 + 60 - 10


def test_the_controller_is_not_told_true_lengths_but_sees_what_ended() -> None:
    controller, traffic = Course((0.0, 2)), steady(2.0, 300)
    provision(traffic, controller, Setting(kinds=(KIND,), start={"gpu": 2}, length_noise=0.5))
    told = np.array([one.output_tokens for seen in controller.seen for one in seen.arrivals])
    assert len(told) == len(traffic.outputs)
    assert not np.array_equal(told, traffic.outputs)
    assert 0 < sum(len(seen.served) for seen in controller.seen) <= len(told)


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 6)), max_size=12), st.sampled_from([0.0, 20.0, 100.0]),
    st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_whatever_the_controller_wants_no_request_is_lost(
    course: list[tuple[int, int]], cold_start_s: float, start: int
) -> None:
    kind = Kind(**{name: getattr(KIND, name) for name in KIND.__struct_fields__} | {"cold_start_s": cold_start_s})
    steps = [(0.0, start), *sorted((15.0 * at, count) for at, count in course)]
    done = run(steady(1.0, 300), Course(*steps), start, kind)
    assert np.isfinite(done.e2e_s).all()
    assert (done.e2e_s >= done.ttft_s).all()
    assert (done.ttft_s > 0).all()


def test_the_same_run_twice_is_the_same() -> None:
    traffic = steady(4.0, 240)
    setting = Setting(kinds=(KIND,), start={"gpu": 2})
    one, two = (provision(traffic, controller_from("replay", [KIND], SLO), setting) for _ in range(2))
    assert np.array_equal(one.e2e_s, two.e2e_s)
    assert one.steps == two.steps


def test_replay_keeps_the_slo_through_a_rise_with_fewer_instance_hours_than_the_static_peak() -> None:
    low, high = steady(2.0, 1800), steady(9.0, 1800, seed=2)
    ramp = np.interp(np.linspace(0, 1, 9000) ** 0.6, [0, 1], [1800.0, 3600.0])
    traffic = Traffic(
        np.concatenate((low.at_s, ramp, high.at_s + 3600.0)),
        np.concatenate((low.prompts, np.resize(high.prompts, 9000), high.prompts)),
        np.concatenate((low.outputs, np.resize(high.outputs, 9000), high.outputs)),
    )
    done = provision(traffic, controller_from("replay", [KIND], SLO), Setting(kinds=(KIND,), start={"gpu": 2}))
    assert done.within(SLO).mean() > 0.97
    assert done.instance_s["gpu"] < 0.8 * 6 * done.steps[-1].at_s


def test_the_fast_form_and_the_cluster_with_the_same_rule_agree() -> None:
    kind = Kind(name="gpu", profile="a30-llama2-7b", limits=EngineLimits(num_gpu_blocks=1053, max_num_seqs=48), most=4)
    offered = offer(WorkloadConfig(rate_rps=6.0, requests=1200, total_tokens_max=2048), 3)
    setting = Setting(kinds=(kind,), start={"gpu": 2}, guard=AT_ONCE, length_noise=0.0)
    traffic = Traffic(
        np.array([one.request.arrived_s for one in offered]),
        np.array([one.request.prompt_tokens for one in offered], np.int32),
        np.array([one.output_tokens for one in offered], np.int32),
    )
    course = ((0.0, 2), (60.0, 4), (120.0, 3))
    fast = provision(traffic, Course(*course), setting)
    slow = provision_cluster(SimulationConfig(policy="llumnix-minus"), offered, Course(*course), setting)
    e2e_s = np.array([row.e2e_s for row in slow.rows])
    assert slow.instance_s["gpu"] == pytest.approx(fast.instance_s["gpu"], rel=0.02)
    assert float(np.mean(e2e_s)) == pytest.approx(float(np.mean(fast.e2e_s)), rel=0.1)


def test_the_cluster_keeps_requests_while_no_instance_is_ready_and_tells_its_predictions() -> None:
    controller = Course((0.0, 0), (45.0, 2))
    offered = offer(WorkloadConfig(rate_rps=1.0, requests=120, total_tokens_max=2048), 3)
    setting = Setting(kinds=(KIND,), start={"gpu": 0}, guard=AT_ONCE)
    done = provision_cluster(SimulationConfig(policy="block"), offered, controller, setting)
    assert all(row.status == "finished" for row in done.rows)
    assert any(seen.slow_e2e_s for seen in controller.seen)


def test_clairvoyance_needs_no_more_than_the_least_static_pool_and_meets_the_target() -> None:
    traffic = Traffic(*(np.concatenate(parts) for parts in zip(
        _fields(steady(1.0, 900)), _fields(steady(7.0, 900), 900.0), _fields(steady(1.0, 900), 1800.0), strict=True
    )))  # fmt: skip
    best = optimum(traffic, KIND, SLO, 0.01)
    assert best.missed <= 0.01
    assert best.needed[2:14].max() < best.needed[16:28].min()
    assert best.instance_s < best.needed.max() * 2700
    assert (best.kept >= best.needed).all()


def _fields(traffic: Traffic, later_s: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return traffic.at_s + later_s, traffic.prompts, traffic.outputs


# ---- the fleet


def test_those_still_starting_are_stopped_first_then_the_least_loaded() -> None:
    fleet = Fleet([KIND], {"gpu": 3})
    fleet.order({"gpu": 5}, 10.0, lambda number: 0)
    assert len(fleet.numbers(Phase.STARTING)) == 2
    fleet.order({"gpu": 2}, 20.0, lambda number: {0: 5, 1: 1, 2: 9}.get(number, 0))
    assert fleet.numbers(Phase.READY) == [0, 2]
    assert fleet.numbers(Phase.STARTING) == []
