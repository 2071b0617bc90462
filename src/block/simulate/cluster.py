"""A whole cluster in virtual time: arrivals, decisions, engines, failures -> one row a request.

Theory of operation. Time passes in events: the arrivals, in order, and a heap of everything else (snapshots taken and
received, a busy gateway's turn, failures). Engines are advanced only when somebody looks: with fresh snapshots at
every decision, otherwise when they publish. An engine decides nothing about the others, so between two looks it runs
by itself, in jumps. Ties in time are broken by the order in which events were made, chance comes from named streams of the
seed, so a run is a function of its configuration (law L6).

Every request offered ends as exactly one row (law L1): finished; rejected, if it could never fit where it was sent; or failed,
if its instance died while it streamed. One that had no token yet when its instance died is sent elsewhere.
"""

import heapq
from collections.abc import Callable, Sequence

from block.core import Candidate, Decision, InstanceId, Prediction
from block.length.distribution import Estimate
from block.length.simple import Estimator
from block.length.table import make_estimator
from block.metrics.row import Row, finished_row
from block.policy import policy_from
from block.policy.hold import HeldQueue, holds, prediction_of
from block.policy.learned import LearnedLatency
from block.simulate.config import Failure, SimulationConfig
from block.simulate.gateway import Dispatched, Gateway
from block.simulate.instance import Instance, View
from block.steptime.profile import StepTimeProfile, load_profile
from block.workload.chance import generator, pyrandom
from block.workload.offer import offer
from block.workload.offered import Offered

Progress = Callable[[int, int], None]
Watch = Callable[[int, Decision, Sequence[Instance], float], None]
"""Told of each decision before it takes effect: request number, decision, true instances, time. It may look and copy, not touch."""

INFINITY = float("inf")


def simulate(
    config: SimulationConfig, offered: Sequence[Offered] | None = None, *, on_progress: Progress | None = None,
    on_decision: Watch | None = None,
) -> list[Row]:  # fmt: skip
    """Run one simulation; rows in the order offered.

    ``offered`` replaces the configured workload. ``on_progress(done, total)`` is called now and then; ``on_decision``: see `Watch`.

    Raises:
        UserError: the configuration names something that does not exist or cannot be.
    """
    if offered is None:
        offered = offer(config.workload, config.seed)
    return Cluster(config, offered, on_progress, on_decision).run()


class Job:
    """One offered request under way; written by the cluster alone."""

    __slots__ = ("candidate", "decided_s", "estimate", "gateway", "instance", "offered", "prediction", "row")

    def __init__(self, offered: Offered, gateway: Gateway) -> None:
        self.offered, self.gateway = offered, gateway
        self.instance: Instance | None = None
        self.prediction: Prediction | None = None
        self.candidate: Candidate | None = None
        self.estimate: Estimate | None = None
        self.decided_s = 0.0
        self.row: Row | None = None


class Cluster:
    """The state of one run."""

    def __init__(
        self, config: SimulationConfig, offered: Sequence[Offered], on_progress: Progress | None, on_decision: Watch | None
    ) -> None:  # fmt: skip
        self._config = config
        self._estimator = _estimator(config, offered)
        self._learns = config.lengths.estimator not in ("oracle", "constant")
        self._instances = _instances(config, _cache_tokens(offered))
        self._by_id = {instance.id: instance for instance in self._instances}
        self._healthy = [instance.id for instance in self._instances]
        gateways = [
            Gateway(
                config.gateways, policy_from(config.policy), self._instances, self._estimator.bank,
                pyrandom(config.seed, f"policy {number}"),
            )
            for number in range(config.gateways.count)
        ]  # fmt: skip
        self._gateways = gateways
        self._jobs = [Job(one, gateways[number % len(gateways)]) for number, one in enumerate(offered)]
        self._heap: list[tuple[float, int, Callable[[float], None]]] = []
        self._events = self._ended = 0
        self._on_progress = on_progress
        self._on_decision = on_decision
        self._jitter = generator(config.seed, "snapshots")
        self._arrivals_end_s = offered[-1].request.arrived_s if offered else 0.0

    def run(self) -> list[Row]:
        if self._config.gateways.snapshot_interval_s > 0:
            self._start_publishing()
        for failure in self._config.failures:
            self._at(failure.at_s, lambda now_s, failure=failure: self._fail(failure, now_s))  # type: ignore[misc]
        heap, total = self._heap, len(self._jobs)
        for number, job in enumerate(self._jobs):
            arrived_s = job.offered.request.arrived_s
            while heap and heap[0][0] <= arrived_s:
                at_s, _, act = heapq.heappop(heap)
                act(at_s)
            self._arrive(number, arrived_s)
            if self._on_progress is not None and number % 500 == 499:
                self._on_progress(number + 1, total)
        while heap:
            at_s, _, act = heapq.heappop(heap)
            act(at_s)
        for instance in self._instances:
            self._advance(instance, INFINITY)
        rows = [job.row for job in self._jobs if job.row is not None]
        assert len(rows) == total, "every request offered ends as one row (law L1)"
        return rows

    def _at(self, at_s: float, act: Callable[[float], None]) -> None:
        self._events += 1
        heapq.heappush(self._heap, (at_s, self._events, act))

    # ---- a request's life

    def _arrive(self, number: int, now_s: float) -> None:
        gateway, decision_s = self._jobs[number].gateway, self._config.gateways.decision_s
        if decision_s == 0:
            self._dispatch(number, now_s)
            return
        start_s = max(now_s, gateway.free_s)
        gateway.free_s = start_s + decision_s
        self._at(gateway.free_s, lambda at_s: self._dispatch(number, at_s))

    def _dispatch(self, number: int, now_s: float) -> None:
        """Send a request, or keep it at its gateway."""
        job = self._jobs[number]
        gateway, held, request = job.gateway, job.gateway.held, job.offered.request
        if held is None:
            self._try(number, now_s)
            return
        job.estimate = job.estimate or self._estimator.estimate(request)
        size = request.prompt_tokens + round(job.estimate.expected_total(0))
        if not held.offer(number, request, size, now_s, self._attempt(now_s)) and len(held) == 1:
            self._at(now_s + held.hold.tick_s, lambda at_s: self._tick(gateway, held, at_s))

    def _tick(self, gateway: Gateway, held: HeldQueue[int], now_s: float) -> None:
        """Try the held requests again."""
        if self._config.gateways.snapshot_interval_s == 0:
            for instance in self._instances:
                self._advance(instance, now_s)
        held.tick(now_s, self._attempt(now_s), self._ended)
        if len(held):
            self._at(now_s + held.hold.tick_s, lambda at_s: self._tick(gateway, held, at_s))

    def _attempt(self, now_s: float) -> Callable[[int, float, bool], bool]:
        return lambda number, held_s, may_hold: self._try(number, now_s, held_s if may_hold else None)

    def _try(self, number: int, now_s: float, held_s: float | None = None) -> bool:
        """Decide, and send unless the decision says to hold (``held_s`` so far; ``None``: it may not be held); whether the
        request is off the gateway's hands."""
        job = self._jobs[number]
        request = job.offered.request
        if job.estimate is None:
            job.estimate = self._estimator.estimate(request)
        decision = self._decide(job, job.estimate, now_s)
        if decision is None:
            job.row = _lost(job, now_s, "rejected", "no instance is healthy")
            return True
        hold = job.gateway.policy.hold
        if hold is not None and held_s is not None and holds(hold, decision, held_s):
            return False
        if self._on_decision is not None:
            self._on_decision(number, decision, self._instances, now_s)
        instance = job.instance = self._by_id[decision.instance]
        job.decided_s, job.prediction = now_s, prediction_of(decision)
        if isinstance(job.gateway.policy.rank, LearnedLatency):
            job.candidate = next(c for c in decision.candidates if c.instance == decision.instance)
        if not instance.can_ever_run(request.prompt_tokens, job.offered.output_tokens):
            job.row = _lost(job, now_s, "rejected", "longer than the instance can hold")
            return True
        arrives_s = now_s + self._config.gateways.network_s + instance.input_s
        most = instance.most_tokens(request.prompt_tokens, request.max_tokens)
        hit_tokens = job.gateway.hit_tokens(request, instance.id)
        instance.view.add(request, most, job.offered.output_tokens, job.estimate, arrives_s, number)
        instance.present.add(number)
        dispatched = Dispatched(request, most, job.estimate, arrives_s, number, hit_tokens)
        job.gateway.note(instance.id, dispatched, now_s)
        return True

    def _decide(self, job: Job, estimate: Estimate, now_s: float) -> Decision | None:
        if self._config.gateways.snapshot_interval_s == 0:
            for instance in self._instances:
                self._advance(instance, now_s)
        healthy = self._healthy
        while healthy:
            decision = job.gateway.decide(job.offered.request, estimate, healthy, now_s)
            if self._by_id[decision.instance].alive:
                return decision
            # Connection refused: not a byte was answered, so another one is asked at once.
            healthy = [other for other in healthy if other != decision.instance]
        return None

    def _advance(self, instance: Instance, until_s: float) -> None:
        engine = instance.view.engine
        engine.advance(until_s)
        for number, _, first_token_s, finished_s, preemptions in engine.collect():
            instance.present.discard(number)
            self._ended += 1
            job = self._jobs[number]
            job.row = self._finished(job, instance, first_token_s, finished_s, preemptions)
            if job.candidate is not None:
                job.gateway.learn(job.offered.request, job.candidate, job.row, job.decided_s)
            if self._learns:
                self._estimator.observe(job.offered.request, job.offered.output_tokens)

    def _finished(self, job: Job, instance: Instance, first_token_s: float, finished_s: float, preemptions: int) -> Row:
        request, prediction = job.offered.request, job.prediction
        way_s = instance.output_s + self._config.gateways.network_s
        since_s = job.decided_s - request.arrived_s  # a prediction counts from the decision
        return finished_row(
            id=request.id, policy=self._config.policy, instance=instance.id, intended_s=request.arrived_s,
            sent_s=request.arrived_s, first_token_s=first_token_s + way_s, finished_s=finished_s + way_s,
            prompt_tokens=request.prompt_tokens, output_tokens=job.offered.output_tokens, preemptions=preemptions,
            predicted_ttft_s=None if prediction is None else prediction.ttft_s + since_s,
            predicted_e2e_s=None if prediction is None else prediction.e2e_s + since_s,
        )  # fmt: skip

    # ---- snapshots

    def _start_publishing(self) -> None:
        interval_s = self._config.gateways.snapshot_interval_s
        for number, instance in enumerate(self._instances):
            phase_s = interval_s * (number + 0.5) / len(self._instances)
            self._at(phase_s, lambda now_s, instance=instance: self._publish(instance, now_s))  # type: ignore[misc]

    def _publish(self, instance: Instance, now_s: float) -> None:
        model = self._config.gateways
        if now_s <= self._arrivals_end_s:
            self._at(now_s + model.snapshot_interval_s, lambda at_s: self._publish(instance, at_s))
        if not instance.alive:
            return
        self._advance(instance, now_s)
        delay_s = model.snapshot_delay_s
        if model.snapshot_jitter_s > 0:
            delay_s += model.snapshot_jitter_s * self._jitter.random()
        if delay_s == 0:
            instance.view.taken_s = now_s
            self._receive(instance, instance.view)
            return
        snapshot = View(instance.limits, instance.curve)
        snapshot.copy_from(instance.view, now_s)
        self._at(now_s + delay_s, lambda _: self._receive(instance, snapshot))

    def _receive(self, instance: Instance, snapshot: View) -> None:
        if instance.alive:
            for gateway in self._gateways:
                gateway.receive(instance.id, snapshot)

    # ---- failures

    def _fail(self, failure: Failure, now_s: float) -> None:
        instance = self._instances[failure.instance]
        self._advance(instance, now_s)
        lost = sorted(instance.present)
        # What each had got by now: let the dead engine's future tell when its first token would have come.
        instance.view.engine.advance(INFINITY)
        first_token_s = {number: first_s for number, _, first_s, _, _ in instance.view.engine.collect()}
        instance.restart()
        instance.alive = False
        for gateway in self._gateways:
            gateway.forget(instance.id)
        for number in lost:
            if first_token_s[number] <= now_s:
                self._jobs[number].row = _lost(
                    self._jobs[number], now_s, "failed", "the instance died while it streamed"
                )
            else:
                self._at(now_s + self._config.gateways.network_s, lambda at_s, n=number: self._dispatch(n, at_s))  # type: ignore[misc]
        self._at(now_s + min(failure.detection_s, failure.for_s), lambda at_s: self._list(instance, at_s))
        self._at(now_s + failure.for_s, lambda at_s: self._recover(instance, at_s))

    def _recover(self, instance: Instance, now_s: float) -> None:
        instance.restart()
        self._list(instance, now_s)

    def _list(self, instance: Instance, now_s: float) -> None:
        """The gateways notice whether the instance is up."""
        instance.listed = instance.alive
        self._healthy = [one.id for one in self._instances if one.listed]


def _lost(job: Job, now_s: float, status: str, error: str) -> Row:
    request = job.offered.request
    return Row(
        id=request.id, policy=job.gateway.policy.name, instance=job.instance.id if job.instance else None,
        intended_s=request.arrived_s, sent_s=request.arrived_s, first_token_s=None, finished_s=None,
        prompt_tokens=request.prompt_tokens, output_tokens=0, ttft_s=None, e2e_s=None, tpot_s=None,
        status="rejected" if status == "rejected" else "failed", error=error,
    )  # fmt: skip


def _estimator(config: SimulationConfig, offered: Sequence[Offered]) -> Estimator:
    name, options = config.lengths.estimator, dict(config.lengths.options)
    if name == "oracle":
        lengths = {one.request.id: one.output_tokens for one in offered}
        options.setdefault("seed", config.seed)
        return make_estimator(name, **{**options, "lengths": lengths})
    return make_estimator(name, **options)


def _cache_tokens(offered: Sequence[Offered]) -> int:
    """Tokens per content key of the prompts; 0: they have none."""
    return next((one.blocks.tokens for one in offered if one.blocks is not None), 0)


def _instances(config: SimulationConfig, cache_tokens: int) -> list[Instance]:
    made: list[Instance] = []
    for group in config.instances:
        profile: StepTimeProfile = (
            group.profile if isinstance(group.profile, StepTimeProfile) else load_profile(group.profile)
        )
        curve = profile.curve(1.0 / group.speed, group.limits)
        for _ in range(group.count):
            name = InstanceId(f"i{len(made):02d}")
            made.append(Instance(name, group.limits, curve, profile.input_s, profile.output_s, cache_tokens))
    return made
