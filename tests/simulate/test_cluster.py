"""The cluster simulator: its laws, and that it does what the parts do."""

from collections import Counter

import msgspec
import pytest

from block.core import Request
from block.engine.limits import EngineLimits
from block.engine.pipeline import Engine
from block.engine.sequence import Sequence
from block.errors import ConfigError, UserError
from block.metrics import Row, summarize
from block.policy import policy_names
from block.simulate import SimulationConfig, simulate
from block.simulate.bound import packed, pooled, work_bound_rps
from block.simulate.config import Failure, GatewayModel, InstanceGroup, LengthModel
from block.steptime.profile import StepTimeProfile
from block.workload import Offered, WorkloadConfig, offer

PROFILE = StepTimeProfile(
    name="linear", gpu="test", model="test", decode_knots=[(0, 0.016), (64, 0.02336)],
    mixed_knots=[(0, 0.016), (512, 0.07488)], kv_s=5.8e-7, attention_s=3.2e-8,
)  # fmt: skip
LIMITS = EngineLimits(
    max_num_seqs=48, max_num_batched_tokens=512, num_gpu_blocks=1053, max_model_len=4096, async_scheduling=False
)  # fmt: skip


def config(rate_rps: float = 10.0, requests: int = 400, count: int = 4, **fields: object) -> SimulationConfig:
    given: dict[str, object] = {
        "workload": WorkloadConfig(rate_rps=rate_rps, requests=requests, total_tokens_max=4096),
        "instances": [InstanceGroup(count=count, profile=PROFILE, limits=LIMITS)],
    }
    return SimulationConfig(**given | fields)


def ttft_mean_s(config: SimulationConfig) -> float:
    summary = summarize(simulate(config), warmup_fraction=0.1)
    assert summary.ttft_s_mean is not None
    return summary.ttft_s_mean


STALE = GatewayModel(count=2, snapshot_interval_s=0.2, snapshot_delay_s=0.01, snapshot_jitter_s=0.02, decision_s=0.001)


@pytest.mark.parametrize("policy", policy_names())
def test_every_request_ends_as_exactly_one_row(policy: str) -> None:
    rows = simulate(config(policy=policy))
    assert [row.id for row in rows] == [f"r{n:06d}" for n in range(400)]
    assert {row.status for row in rows} == {"finished"}


@pytest.mark.parametrize("gateways", [GatewayModel(), STALE])
@pytest.mark.parametrize("policy", ["power-of-two", "block"])
def test_the_same_seed_gives_the_same_rows_byte_for_byte(policy: str, gateways: GatewayModel) -> None:
    lengths = LengthModel(options={"noise": 0.5})

    def run(seed: int) -> bytes:
        return msgspec.json.encode(simulate(config(policy=policy, gateways=gateways, lengths=lengths, seed=seed)))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_times_are_in_causal_order() -> None:
    for row in simulate(config(rate_rps=16.0, policy="random", gateways=STALE)):
        assert row.intended_s <= row.sent_s < row.first_token_s <= row.finished_s


def test_one_instance_does_what_the_stepping_engine_does() -> None:
    """L8: the simulator's jumps against the decision-by-decision model, with preemptions."""
    one = config(rate_rps=3.0, requests=300, count=1, policy="round-robin")
    rows = simulate(one)
    engine = Engine(LIMITS, PROFILE.curve(1.0, LIMITS))
    sequences = []
    for offered in offer(one.workload, one.seed):
        request = offered.request
        most = LIMITS.max_model_len - request.prompt_tokens
        sequence = Sequence(request.id, request.prompt_tokens, most, offered.output_tokens, arrived_s=request.arrived_s)
        engine.add(sequence, request.arrived_s)
        sequences.append(sequence)
    engine.advance(1e9)
    assert engine.scheduler.preemptions > 0
    assert sum(row.preemptions for row in rows) == engine.scheduler.preemptions
    for row, sequence in zip(rows, sequences, strict=True):
        assert row.first_token_s == pytest.approx(sequence.first_token_s, abs=1e-6)
        assert row.finished_s == pytest.approx(sequence.finished_s, abs=1e-6)


def test_with_perfect_lengths_and_nobody_after_it_a_prediction_is_what_happens() -> None:
    for gateways in (GatewayModel(), GatewayModel(network_s=0.003), STALE):
        rows = simulate(config(rate_rps=12.0, requests=120, gateways=gateways))
        last_on: dict[str, Row] = {row.instance: row for row in rows}
        assert len(last_on) == 4
        exact = gateways.snapshot_interval_s == 0
        for row in last_on.values():
            within = 1e-6 if exact else 0.1 * row.e2e_s
            assert row.predicted_ttft_s + gateways.network_s == pytest.approx(row.ttft_s, abs=within)
            assert row.predicted_e2e_s + gateways.network_s == pytest.approx(row.e2e_s, abs=within)


def test_predicting_beats_counting_beats_chance_near_saturation() -> None:
    results = {
        p: ttft_mean_s(config(rate_rps=10.5, requests=1500, policy=p)) for p in ("random", "llumnix-minus", "block")
    }
    assert results["block"] < results["llumnix-minus"] < results["random"] / 2


def test_prediction_knows_which_instances_are_slow() -> None:
    groups = [InstanceGroup(count=2, profile=PROFILE, limits=LIMITS, speed=speed) for speed in (1.0, 0.4)]
    cells = {p: simulate(config(rate_rps=6.0, instances=groups, policy=p)) for p in ("round-robin", "block")}
    share = {p: Counter(row.instance for row in rows) for p, rows in cells.items()}
    assert share["round-robin"]["i00"] == share["round-robin"]["i03"]
    assert share["block"]["i00"] > 1.5 * share["block"]["i03"]
    assert summarize(cells["block"]).e2e_s_mean < summarize(cells["round-robin"]).e2e_s_mean


def test_stale_snapshots_make_gateways_herd_and_in_flight_accounting_cures_it() -> None:
    stale = GatewayModel(snapshot_interval_s=1.0)
    blind = msgspec.structs.replace(stale, in_flight_accounting=False)
    fresh_s, stale_s, blind_s = (ttft_mean_s(config(requests=800, gateways=g)) for g in (GatewayModel(), stale, blind))
    assert stale_s == pytest.approx(fresh_s, rel=0.1)
    assert blind_s > 1.3 * stale_s


def test_a_known_in_flight_request_is_not_counted_twice() -> None:
    """One gateway that accounts for its own dispatches has, without delays, the same counters as fresh snapshots."""
    fresh = simulate(config(policy="least-outstanding", rate_rps=0.5, requests=50))
    stale = simulate(
        config(policy="least-outstanding", rate_rps=0.5, requests=50, gateways=GatewayModel(snapshot_interval_s=1e-3))
    )
    assert [row.status for row in fresh] == [row.status for row in stale]
    busiest = Counter(row.instance for row in stale).most_common(1)[0][1]
    assert busiest < 25


def test_when_an_instance_dies_every_request_still_ends_once_and_nothing_goes_there() -> None:
    failures = [Failure(instance=1, at_s=10.0, for_s=15.0, detection_s=2.0)]
    for gateways in (GatewayModel(), STALE):
        rows = simulate(config(failures=failures, gateways=gateways))
        assert len({row.id for row in rows}) == len(rows) == 400
        failed = [row for row in rows if row.status == "failed"]
        assert failed
        assert {row.instance for row in failed} == {"i01"}
        assert all("streamed" in row.error for row in failed)
        for row in rows:
            if row.instance == "i01" and row.status == "finished":
                assert row.finished_s <= 10.0 or row.intended_s > 8.0
                assert not 10.0 < row.first_token_s < 25.0
        assert any(row.instance == "i01" and row.intended_s > 25.0 for row in rows)


def test_when_all_instances_are_down_requests_are_rejected_not_lost() -> None:
    failures = [Failure(instance=i, at_s=5.0, for_s=10.0) for i in range(2)]
    rows = simulate(config(count=2, requests=200, failures=failures))
    statuses = Counter(row.status for row in rows)
    assert statuses["rejected"] > 20
    assert sum(statuses.values()) == 200
    assert all(row.status == "finished" for row in rows if row.intended_s > 15.0)


def test_what_can_never_fit_is_rejected() -> None:
    small = InstanceGroup(count=2, profile=PROFILE, limits=msgspec.structs.replace(LIMITS, num_gpu_blocks=20))
    offered = [
        Offered(Request(id="big", arrived_s=0.0, prompt_tokens=250), 100),
        Offered(Request(id="ok", arrived_s=0.1, prompt_tokens=9), 9),
    ]
    big, ok = simulate(config(instances=[small]), offered)
    assert (big.status, ok.status) == ("rejected", "finished")
    assert "longer than" in big.error


def test_estimates_that_are_wrong_cost_capacity_but_lose_nothing() -> None:
    sure = config(rate_rps=11.0, requests=1000)
    unsure = msgspec.structs.replace(sure, lengths=LengthModel(options={"noise": 1.0}))
    learned = msgspec.structs.replace(sure, lengths=LengthModel(estimator="history"))
    results = {name: simulate(c) for name, c in (("sure", sure), ("unsure", unsure), ("learned", learned))}
    for rows in results.values():
        assert {row.status for row in rows} == {"finished"}
    error_s = {
        name: sum(abs(row.predicted_e2e_s - row.e2e_s) for row in rows) / len(rows) for name, rows in results.items()
    }
    assert error_s["sure"] < error_s["unsure"]
    assert error_s["sure"] < error_s["learned"]


def test_a_gateway_that_takes_its_time_shows_in_the_latency() -> None:
    slow = config(
        rate_rps=4.0, requests=200, policy="round-robin", gateways=GatewayModel(decision_s=0.2, network_s=0.05)
    )
    quick = config(rate_rps=4.0, requests=200, policy="round-robin")
    assert ttft_mean_s(slow) > ttft_mean_s(quick) + 0.3


@pytest.mark.parametrize("fields", [{"policy": "best"}, {"lengths": LengthModel(estimator="magic")}])
def test_unknown_names_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(UserError, match="Known"):
        simulate(config(**fields))


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    simulate(config(requests=1000), on_progress=lambda done, total: told.append((done, total)))
    assert told == [(500, 1000), (1000, 1000)]


def test_one_instance_pooled_is_that_instance() -> None:
    one = config(rate_rps=3.0, requests=200, count=1, policy="round-robin")
    assert [row.e2e_s for row in simulate(pooled(one))] == pytest.approx([row.e2e_s for row in simulate(one)])


def test_pooled_hardware_is_no_worse_than_any_routing() -> None:
    near = config(rate_rps=10.5, requests=1500)
    assert ttft_mean_s(pooled(near)) < ttft_mean_s(near)
    with pytest.raises(ConfigError, match="Only equal instances"):
        pooled(msgspec.structs.replace(near, instances=[*near.instances, InstanceGroup(profile=PROFILE)]))


@pytest.mark.parametrize("gateways", [GatewayModel(), STALE])
def test_held_requests_are_sent_in_the_end_and_it_pays_when_lengths_are_uncertain(gateways: GatewayModel) -> None:
    full = config(rate_rps=12.0, requests=1500, lengths=LengthModel(options={"noise": 0.4}), gateways=gateways)
    held = simulate(msgspec.structs.replace(full, policy="block"))
    assert {row.status for row in held} == {"finished"}
    assert len(held) == 1500
    published = simulate(msgspec.structs.replace(full, policy="block-paper"))
    assert summarize(held).ttft_s_mean < summarize(published).ttft_s_mean


def test_no_policy_beats_the_bound_and_the_pooled_cluster_is_below_it() -> None:
    one = config(rate_rps=20.0, requests=600)
    offered = offer(one.workload, one.seed)
    bound_rps = work_bound_rps(one, offered)
    for each in (pooled(one), packed(one), msgspec.structs.replace(one, policy="block")):
        rows = simulate(each, offered)
        assert len(rows) / max(row.finished_s for row in rows) < bound_rps
    slower = msgspec.structs.replace(one, instances=[InstanceGroup(count=4, profile=PROFILE, limits=LIMITS, speed=0.5)])
    assert work_bound_rps(slower, offered) == pytest.approx(bound_rps / 2)
    batch = msgspec.structs.replace(LIMITS, max_num_seqs=8)
    fewer = msgspec.structs.replace(one, instances=[InstanceGroup(count=4, profile=PROFILE, limits=batch)])
    assert work_bound_rps(fewer, offered) < bound_rps
