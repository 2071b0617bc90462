"""Law L8: online and in simulation the same policy, asked about the same state, says the same."""

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from block.core import InstanceId, Request
from block.engine.limits import EngineLimits
from block.engine.pipeline import Engine
from block.engine.sequence import Sequence
from block.gateway.config import GatewayConfig, InstanceConfig
from block.gateway.deciding.decider import Decider
from block.gateway.deciding.evidence import Evidence
from block.gateway.exchange import Asked
from block.gateway.members.pool import Pool, State
from block.gateway.records.metrics import Metrics
from block.length.simple import OracleEstimator
from block.policy.hold import holds
from block.policy.table import policy_from
from block.predict.capture import Recorder
from block.predict.snapshot import request_key
from block.simulate.config import GatewayModel
from block.simulate.gateway import Dispatched, Gateway
from block.simulate.instance import Instance
from block.steptime.profile import StepTimeProfile

LIMITS = EngineLimits(
    max_num_seqs=12, max_num_batched_tokens=512, num_gpu_blocks=300, max_model_len=4096, async_scheduling=False
)
PROFILE = StepTimeProfile(
    name="linear", gpu="test", model="test", decode_knots=[(0, 0.016), (64, 0.02336)],
    mixed_knots=[(0, 0.016), (512, 0.07488)], kv_s=5.8e-7, attention_s=3.2e-8,
)  # fmt: skip
IDS = [InstanceId(f"i{n}") for n in range(3)]


class Offline:
    """A simulated gateway in front of simulated instances."""

    def __init__(self, policy: str, estimator: OracleEstimator) -> None:
        curve = PROFILE.curve(1.0, LIMITS)
        self.instances = [Instance(i, LIMITS, curve, 0.0, 0.0) for i in IDS]
        self.gateway = Gateway(GatewayModel(), policy_from(policy), self.instances, estimator.bank, Random(1))

    def decide(self, request: Request, estimate: Any, now_s: float) -> Any:
        for instance in self.instances:
            instance.view.engine.advance(now_s)
            instance.view.engine.collect()
        return self.gateway.decide(request, estimate, IDS, now_s)

    def send(self, request: Request, estimate: Any, output: int, to: InstanceId, now_s: float) -> None:
        instance = self.instances[IDS.index(to)]
        most = instance.most_tokens(request.prompt_tokens, None)
        instance.view.add(request, most, output, estimate, now_s, 0)
        self.gateway.note(to, Dispatched(request, most, estimate, now_s, 0), now_s)


class Online:
    """The real gateway's decider, fed with snapshots of engines that are stepped decision by decision."""

    def __init__(self, policy: str, estimator: OracleEstimator) -> None:
        configs = [InstanceConfig(url=f"http://h:{n}", name=i, predictor="http://p:1") for n, i in enumerate(IDS, 1)]
        config = GatewayConfig(instances=configs)
        pool = Pool(config)
        self.decider = Decider(config, pool, policy_from(policy), estimator, Metrics(), Random(1))
        self.pool, curve = pool, PROFILE.curve(1.0, LIMITS)
        self.engines = [Engine(LIMITS, curve) for _ in IDS]
        self.recorders = [Recorder(engine) for engine in self.engines]
        self.sequences: list[list[Sequence]] = [[] for _ in IDS]
        for instance in pool.instances.values():
            instance.state = State.READY
            evidence = Evidence(instance.id, self.decider.expectations, stale_after_s=60, unseen_after_s=5)
            evidence.take_profile(PROFILE, 1.0)
            self.decider.evidence[instance.id] = evidence

    def decide(self, exchange: Any, now_s: float) -> Any:
        for i, engine, recorder in zip(IDS, self.engines, self.recorders, strict=True):
            engine.advance(now_s)
            self.decider.evidence[i].take_frame(recorder.capture(now_s), now_s)
            for sequence in self.sequences[IDS.index(i)]:
                if (
                    sequence.finished_s >= 0
                ):  # its answer ended: one that came and went between two snapshots is over too
                    self.decider.evidence[i].ended(sequence.key)
        return self.decider.decide(exchange, self.decider.policy_for(exchange), IDS)

    def send(self, exchange: Any, output: int, to: InstanceId, now_s: float) -> None:
        request = exchange.request
        self.decider.sent(exchange, self.pool.instances[to])
        most = LIMITS.max_model_len - request.prompt_tokens
        sequence = Sequence(request.id, request.prompt_tokens, most, output, arrived_s=now_s)
        sequence.key = request_key(request.id)
        self.engines[IDS.index(to)].add(sequence, now_s)
        self.sequences[IDS.index(to)].append(sequence)


@pytest.mark.parametrize(
    ("policy", "noise"), [("block", 0.0), ("block-slo", 0.0), ("block-paper", 0.0), ("block", 0.4)]
)
def test_online_and_in_simulation_the_same_states_lead_to_the_same_decisions(
    policy: str, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a run into saturation. Nearly all predictions are equal: a scheduler does not show the token in flight, and where that
    flips a preemption predictions part."""
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr("block.gateway.deciding.decider.time.time", lambda: clock.now_s)
    rng = Random(5)
    lengths = {f"r{n}": rng.randint(20, 500) for n in range(100)}
    estimator = OracleEstimator(lengths=lengths, noise=noise, seed=3)
    offline, online = Offline(policy, estimator), Online(policy, estimator)
    hold = policy_from(policy).hold
    held = same = close = asked = 0
    for request_id, output in lengths.items():
        clock.now_s += rng.expovariate(4.0)
        now_s = clock.now_s
        request = Request(id=request_id, arrived_s=now_s, prompt_tokens=rng.randint(20, 900))
        estimate = estimator.estimate(request)
        exchange = SimpleNamespace(request=request, generating=True, estimate=estimate, http=None, key=0, asked=Asked())
        exchange.expected_total = max(1, round(estimate.expected_total(0)))
        ours, theirs = offline.decide(request, estimate, now_s), online.decide(exchange, now_s)
        assert ours.evidence == theirs.evidence == "prediction"
        for mine, other in zip(ours.candidates, theirs.candidates, strict=True):
            asked += 1
            close += other.prediction.e2e_s == pytest.approx(mine.prediction.e2e_s, rel=0.01, abs=0.04)
        same += ours.instance == theirs.instance
        if hold is not None:
            held += holds(hold, ours, 0.0)
            same -= ours.instance == theirs.instance and holds(hold, ours, 0.0) != holds(hold, theirs, 0.0)
        offline.send(request, estimate, output, ours.instance, now_s)
        online.send(exchange, output, ours.instance, now_s)
    least = 0.97 if noise == 0 else 0.95
    assert close >= least * asked
    assert same >= least * len(lengths)
    assert hold is None or held > 5
