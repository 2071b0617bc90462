"""Provisioning in virtual time: traffic on a fleet that a controller grows and shrinks.

Every interval the controller sees what a live one would (no true lengths: those are estimated, law L7), its plan is bounded by the
guard, and the fleet starts and drains. Requests are dispatched by the compiled rule of ``engine.spread``, at about a
microsecond each, so that a day is simulated in seconds; ``membership`` does the same with any policy of the gateway. No
request is lost: one that comes while nothing is ready waits, one on an instance that drains ends there.
"""

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from block.autoscale.controllers.guard import Guard, Memory, bounded
from block.autoscale.controllers.window import Window
from block.autoscale.terms import Arrival, Controller, Kind, Observation, Phase, Served
from block.core import Slo
from block.engine.ask import ask_all
from block.engine.kernel import FastEngine
from block.engine.spread import spread
from block.simulate.fleet import NEVER_S, Fleet
from block.steptime.profile import load_profile
from block.workload.chance import generator

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
PREDICTED_MOST = 3
"""What-ifs an interval, where a controller wants predictions."""


class Traffic(msgspec.Struct, frozen=True):
    """Requests by time: (n,) arrays of seconds (ascending), prompt tokens, output tokens."""

    at_s: Floats
    prompts: Ints
    outputs: Ints


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What is simulated. ``start``: instances ready at 0. ``length_noise``: sigma of the log-normal error of the lengths
    that the controller is told. ``predicts``: the observations have predictions (what-ifs of the interval's last requests).
    """

    kinds: tuple[Kind, ...]
    start: Mapping[str, int]
    guard: Guard = Guard()
    interval_s: float = 15.0
    length_noise: float = 0.3
    predicts: bool = False
    seed: int = 1


class Step(msgspec.Struct, frozen=True):
    """One interval's decision: its end, the counts after it, and why."""

    at_s: float
    want: dict[str, int]
    ready: int
    starting: int
    draining: int
    reason: str


class Outcome(msgspec.Struct, frozen=True):
    """What came of it: (n,) seconds, NaN where a request never got there; instance seconds paid, by kind."""

    ttft_s: Floats
    e2e_s: Floats
    outputs: Ints
    steps: list[Step]
    instance_s: dict[str, float]
    actions: int

    def within(self, slo: Slo) -> npt.NDArray[np.bool_]:
        """Which requests met all targets."""
        return within(self.ttft_s, self.e2e_s, self.outputs, slo)


def within(ttft_s: Floats, e2e_s: Floats, outputs: Ints, slo: Slo) -> npt.NDArray[np.bool_]:
    """Which requests met all targets; one that never ended did not."""
    met = np.isfinite(e2e_s)
    if slo.ttft_s is not None:
        met &= ttft_s <= slo.ttft_s
    if slo.e2e_s is not None:
        met &= e2e_s <= slo.e2e_s
    if slo.tpot_s is not None:
        met &= (e2e_s - ttft_s) <= slo.tpot_s * np.maximum(outputs - 1, 0) + 1e-9
    return met


def provision(traffic: Traffic, controller: Controller, setting: Setting) -> Outcome:
    """Run the traffic through; requests that fit into no kind alone are cut to what does."""
    return _Run(traffic, controller, setting).run()


def engines_for(kinds: Sequence[Kind]) -> list[FastEngine]:
    """An idle engine for every slot of a fleet of these kinds, in its order."""
    made = []
    for kind in kinds:
        curve = load_profile(kind.profile).curve(1.0, kind.limits)
        made += [FastEngine(kind.limits, curve, 0.0, 64) for _ in range(kind.most)]
    return made


def fitting(traffic: Traffic, kinds: Sequence[Kind]) -> Traffic:
    """The traffic with prompts, then outputs, cut to what every kind can hold alone."""
    room = min(min(kind.limits.max_model_len, kind.limits.blocks_usable * kind.limits.block_size) for kind in kinds)
    prompts = np.minimum(traffic.prompts, room - 1).astype(np.int32)
    outputs = np.clip(traffic.outputs, 1, np.maximum(room - prompts, 1)).astype(np.int32)
    return Traffic(traffic.at_s, prompts, outputs)


class _Run:
    """The state of one run."""

    def __init__(self, traffic: Traffic, controller: Controller, setting: Setting) -> None:
        self._traffic = fitting(traffic, setting.kinds)
        self._controller, self._setting = controller, setting
        self._fleet = Fleet(setting.kinds, setting.start)
        self._engines = engines_for(setting.kinds)
        self._memory = Memory(want=dict(setting.start))
        self._window = Window(controller.history_s)
        count = len(traffic.at_s)
        self._out = np.full((count, 2), -1.0)
        noise = generator(setting.seed, "lengths told").normal(0.0, setting.length_noise, count)
        self._told = np.maximum(np.rint(self._traffic.outputs * np.exp(noise)), 1).astype(int)
        self._unserved = np.zeros(0, np.int32)
        self._unplaced = np.zeros(0, np.int32)
        self._steps: list[Step] = []
        self._scratch = FastEngine(setting.kinds[0].limits, load_profile(setting.kinds[0].profile).curve(), 0.0, 256)

    def run(self) -> Outcome:
        at_s, interval_s = self._traffic.at_s, self._setting.interval_s
        end_s = float(at_s[-1]) if len(at_s) else 0.0
        from_s, first = 0.0, 0
        while from_s < end_s:
            to_s = from_s + interval_s
            after = int(np.searchsorted(at_s, to_s, side="right"))
            self._serve(np.arange(first, after, dtype=np.int32), from_s, to_s)
            self._decide(first, after, to_s)
            from_s, first = to_s, after
        self._finish(from_s)
        ttft_s = np.where(self._out[:, 0] >= 0, self._out[:, 0] - at_s, np.nan)
        e2e_s = np.where(self._out[:, 1] >= 0, self._out[:, 1] - at_s, np.nan)
        paid_s = self._fleet.paid_s(from_s)
        return Outcome(ttft_s, e2e_s, self._traffic.outputs, self._steps, paid_s, self._fleet.actions)

    def _serve(self, fresh: Ints, from_s: float, to_s: float) -> None:
        """Dispatch what waits and what comes in the interval, and let it pass."""
        slots = self._fleet.slots
        opens_s = np.array([slot.ready_s for slot in slots])
        open_phases = (Phase.STARTING, Phase.READY)
        closes_s = np.array([NEVER_S if slot.phase in open_phases else -1.0 for slot in slots])
        labels = np.concatenate((self._unplaced, fresh))
        times_s = np.maximum(self._traffic.at_s[labels], from_s)
        placed = np.empty(len(labels), np.int32)
        spread(
            self._engines, opens_s, closes_s, times_s, self._traffic.prompts[labels], self._traffic.outputs[labels],
            labels, to_s, self._out, placed,
        )  # fmt: skip
        self._unplaced = labels[placed < 0]
        self._unserved = np.concatenate((self._unserved, fresh))

    def _decide(self, first: int, after: int, now_s: float) -> None:
        self._fleet.settle(now_s, self._empty_since_s)
        seen = self._observe(first, after, now_s)
        self._window.append(seen)
        plan = self._controller.decide(self._window.seen)
        plan, self._memory = bounded(
            plan, now_s, self._memory, self._setting.kinds, self._setting.guard, blind=seen.blind
        )
        self._fleet.order(plan.want, now_s, self._load)
        fleet = self._fleet
        self._steps.append(
            Step(
                now_s, plan.want, len(fleet.numbers(Phase.READY)), len(fleet.numbers(Phase.STARTING)),
                len(fleet.numbers(Phase.DRAINING)), plan.reason,
            )
        )  # fmt: skip

    def _finish(self, now_s: float) -> None:
        """Let everything end that is there; without anything to come, what waits gets an instance of the first kind."""
        if len(self._unplaced):
            self._fleet.order({self._setting.kinds[0].name: 1}, now_s, self._load)
        self._serve(np.zeros(0, np.int32), now_s, NEVER_S)
        self._fleet.settle(now_s, self._empty_since_s)

    def _observe(self, first: int, after: int, now_s: float) -> Observation:
        traffic, unserved = self._traffic, self._unserved
        ended = self._out[unserved, 1] >= 0
        done = unserved[ended]
        self._unserved = unserved[~ended]
        firsts_s = self._out[done, 0] - traffic.at_s[done]
        ends_s = self._out[done, 1] - traffic.at_s[done]
        ready = self._fleet.numbers(Phase.READY)
        loads = [self._engines[number].load() for number in ready]
        waiting = sum(load[1] for load in loads) + len(self._unplaced)
        used = [
            1 - load[3] / self._engines[number].limits.blocks_usable for number, load in zip(ready, loads, strict=True)
        ]
        slow_e2e_s = self._predictions(first, after, now_s, ready) if self._setting.predicts else ()
        return Observation(
            at_s=now_s, members=self._fleet.members(),
            arrivals=tuple(map(
                Arrival, traffic.at_s[first:after].tolist(), traffic.prompts[first:after].tolist(),
                self._told[first:after].tolist(),
            )),
            served=tuple(map(Served, self._out[done, 1].tolist(), firsts_s.tolist(), ends_s.tolist())),
            predicted_e2e_s=max(slow_e2e_s, default=None),
            in_flight=sum(load[0] for load in loads) + waiting, queued=waiting,
            kv_used=sum(used) / len(used) if used else None, slow_e2e_s=slow_e2e_s,
        )  # fmt: skip

    def _predictions(self, first: int, after: int, now_s: float, ready: list[int]) -> tuple[float, ...]:
        """Best predicted E2E of the interval's last requests, asked of the engines as they are at its end."""
        engines, most = [self._engines[number] for number in ready], self._setting.kinds[0].limits.max_model_len
        if not engines:
            return ()
        answers, hits = np.empty((len(engines), 6)), np.zeros(len(engines), np.int32)
        best: list[float] = []
        for number in range(max(first, after - PREDICTED_MOST), after):
            told = np.array([self._told[number]], np.int32)
            prompt = int(self._traffic.prompts[number])
            ask_all(engines, self._scratch, prompt, most - prompt, told, hits, 0, now_s, 600.0, True, False, answers)
            best.append(float(answers[:, 2].min()))
        return tuple(sorted(best, reverse=True))

    def _load(self, number: int) -> int:
        running, waiting, _, _ = self._engines[number].load()
        return int(running + waiting)

    def _empty_since_s(self, number: int) -> float | None:
        return None if self._load(number) else float(self._engines[number].now_s)
