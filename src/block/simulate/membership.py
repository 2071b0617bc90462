"""A simulated cluster whose instances come and go: any policy of the gateway, any controller of their number.

The slower twin of ``provision`` (tens of microseconds a request): every request is decided by the gateway's own policy,
so that predictions are those of real decisions. A request that comes while no instance is ready is tried again every
second.
"""

from collections.abc import Sequence

import msgspec

from block.autoscale.controllers.guard import Memory, bounded
from block.autoscale.controllers.window import Window
from block.autoscale.terms import Arrival, Controller, Observation, Phase, Served
from block.core import Decision
from block.metrics.row import Row
from block.simulate.cluster import Cluster, Job
from block.simulate.config import InstanceGroup, SimulationConfig
from block.simulate.fleet import Fleet
from block.simulate.instance import Instance
from block.simulate.provision import Setting, Step
from block.workload.offered import Offered

SLOWEST_MOST = 64
RETRY_S = 1.0


class Provisioned(msgspec.Struct, frozen=True):
    """What came of it: a row a request, the decisions, seconds paid by kind, orders given."""

    rows: list[Row]
    steps: list[Step]
    instance_s: dict[str, float]
    actions: int


def provision_cluster(
    config: SimulationConfig, offered: Sequence[Offered], controller: Controller, setting: Setting
) -> Provisioned:
    """Run what is offered on ``setting.kinds`` (the configuration's own instances are not used).

    Raises:
        UserError: as ``simulate``.
    """
    groups = [InstanceGroup(count=kind.most, profile=kind.profile, limits=kind.limits) for kind in setting.kinds]
    config = msgspec.structs.replace(config, instances=groups, failures=[])
    run = _Elastic(config, offered, controller, setting)
    rows = run.run()
    return Provisioned(rows, run.steps, run.fleet.paid_s(max(run.steps[-1].at_s, 0.0)), run.fleet.actions)


class _Elastic(Cluster):
    """The cluster, and a tick of the controller every interval."""

    def __init__(
        self, config: SimulationConfig, offered: Sequence[Offered], controller: Controller, setting: Setting
    ) -> None:
        super().__init__(config, offered, None, self._decided)
        self.fleet = Fleet(setting.kinds, setting.start)
        self.steps: list[Step] = []
        self._controller, self._setting = controller, setting
        self._memory = Memory(want=dict(setting.start))
        self._window = Window(controller.history_s)
        self._served: list[Served] = []
        self._arrived: list[Arrival] = []
        self._predicted: list[tuple[float, float]] = []
        self._parked: set[int] = set()
        self._ended_s = {instance.id: 0.0 for instance in self._instances}
        self._list_ready(0.0)
        self._at(setting.interval_s, self._tick_fleet)

    def _arrive(self, number: int, now_s: float) -> None:
        request = self._jobs[number].offered.request
        estimate = self._jobs[number].estimate = self._estimator.estimate(request)
        self._arrived.append(Arrival(now_s, request.prompt_tokens, max(round(estimate.expected_total(0)), 1)))
        super()._arrive(number, now_s)

    def _dispatch(self, number: int, now_s: float) -> None:
        if self._healthy:
            self._parked.discard(number)
            super()._dispatch(number, now_s)
        else:
            self._parked.add(number)
            self._at(now_s + RETRY_S, lambda at_s: self._dispatch(number, at_s))

    def _decided(self, number: int, decision: Decision, instances: Sequence[Instance], now_s: float) -> None:
        chosen = next(one for one in decision.candidates if one.instance == decision.instance)
        if chosen.prediction is not None:
            self._predicted.append((chosen.prediction.e2e_s, chosen.prediction.ttft_s))

    def _finished(self, job: Job, instance: Instance, first_token_s: float, finished_s: float, preemptions: int) -> Row:
        row = super()._finished(job, instance, first_token_s, finished_s, preemptions)
        self._served.append(Served(finished_s, row.ttft_s, row.e2e_s))
        self._ended_s[instance.id] = max(self._ended_s[instance.id], finished_s)
        return row

    def _tick_fleet(self, now_s: float) -> None:
        for instance in self._instances:
            self._advance(instance, now_s)
        for number in self.fleet.settle(now_s, self._empty_since_s):
            for gateway in self._gateways:
                gateway.forget(self._instances[number].id)
        seen = self._observe(now_s)
        self._window.append(seen)
        plan = self._controller.decide(self._window.seen)
        plan, self._memory = bounded(plan, now_s, self._memory, self._setting.kinds, self._setting.guard)
        self.fleet.order(plan.want, now_s, lambda number: len(self._instances[number].present))
        self._list_ready(now_s)
        for slot in self.fleet.slots:
            if slot.phase is Phase.STARTING and slot.ready_s < now_s + self._setting.interval_s:
                self._at(slot.ready_s, self._list_ready)
        self.steps.append(
            Step(
                now_s, plan.want, len(self.fleet.numbers(Phase.READY)), len(self.fleet.numbers(Phase.STARTING)),
                len(self.fleet.numbers(Phase.DRAINING)), plan.reason,
            )
        )  # fmt: skip
        if now_s <= self._arrivals_end_s or self._parked:
            self._at(now_s + self._setting.interval_s, self._tick_fleet)

    def _list_ready(self, now_s: float) -> None:
        self.fleet.settle(now_s, self._empty_since_s)
        self._healthy = [self._instances[number].id for number in self.fleet.numbers(Phase.READY)]

    def _observe(self, now_s: float) -> Observation:
        ready = [self._instances[number] for number in self.fleet.numbers(Phase.READY)]
        loads = [instance.view.engine.load() for instance in ready]
        used = [1 - load[3] / one.limits.blocks_usable for one, load in zip(ready, loads, strict=True)]
        slowest = sorted(self._predicted, reverse=True)
        waiting = sum(load[1] for load in loads) + len(self._parked)
        seen = Observation(
            at_s=now_s, members=self.fleet.members(), arrivals=tuple(self._arrived), served=tuple(self._served),
            predicted_e2e_s=slowest[0][0] if slowest else None,
            predicted_ttft_s=max((ttft_s for _, ttft_s in slowest), default=None),
            in_flight=waiting + sum(load[0] for load in loads), queued=waiting,
            kv_used=sum(used) / len(used) if used else None,
            slow_e2e_s=tuple(e2e_s for e2e_s, _ in slowest[:SLOWEST_MOST]),
        )  # fmt: skip
        self._served, self._arrived, self._predicted = [], [], []
        return seen

    def _empty_since_s(self, number: int) -> float | None:
        return None if self._instances[number].present else self._ended_s[self._instances[number].id]
