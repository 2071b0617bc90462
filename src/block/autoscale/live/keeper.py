"""The loop: look, decide, guard, act, explain.

What can go wrong, and what then happens:

- no gateway answers: nothing is decided, the last counts hold ("held"); with some of them silent the guard lets nothing shrink
- the controller fails or is slower than the interval: the last counts hold, the failure is counted
- the actuator fails: the same order again, after 1, 2, 4, ... intervals; it is slow: the loop goes on looking, no second order is
  given meanwhile, and after ``act_within_s`` it is given up and given again
- the actuator lies (there are more or fewer instances than ordered): visible as ``unmet_seconds``; orders are absolute counts,
  so repeating one can never add up, and the controller counts what the gateways see
- another autoscaler holds the lock, or it cannot be asked for: this one decides and explains, and acts only once the lock is
  free; one that loses it (it was stopped for longer than its Lease) gives its order under way up
"""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Final

import msgspec

from block.autoscale.controllers import Guard, Memory, bounded
from block.autoscale.live.cold_start import ColdStarts
from block.autoscale.live.figures import Figures
from block.autoscale.live.lock import Lock
from block.autoscale.live.membership import Membership
from block.autoscale.live.observer import Observer
from block.autoscale.terms import Actuator, Controller, Kind, Observation, Phase, Plan
from block.errors import ActuatorError, ConfigError

BACK_OFF_MOST: Final = 32
"""Intervals between two tries of an order that fails."""
RELEARN: Final = 0.1
"""A measured cold start that differs by so much from the one in use makes the controller anew."""

log = logging.getLogger("block.autoscale")


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One decision and everything needed to explain it."""

    number: int
    at_s: float
    controller: str
    members: dict[str, dict[str, int]]
    arrivals: int
    in_flight: int | None
    queued: int | None
    kv_used: float | None
    blind: tuple[str, ...]
    asked: dict[str, int]
    want: dict[str, int]
    reason: str
    evidence: dict[str, float]
    action: str
    trouble: str | None = None
    cold_start_s: dict[str, float] = {}
    decide_s: float = 0.0


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """The keeper's times, in seconds."""

    interval_s: float = 5.0
    act_within_s: float = 60.0
    unmet_after_s: float = 600.0


class Keeper:
    """Owns the guard's memory, the decisions kept and the order under way. ``make`` builds the controller for kinds."""

    def __init__(
        self, observer: Observer, make: Callable[[Sequence[Kind]], Controller], actuator: Actuator, kinds: Sequence[Kind],
        guard: Guard, *, pace: Pace, lock: Lock, membership: Membership, figures: Figures, dry_run: bool = False,
        kept: int = 512, on_record: Callable[[Record], None] | None = None,
    ) -> None:  # fmt: skip
        self._observer, self._make, self._actuator, self._guard = observer, make, actuator, guard
        self._pace, self._lock, self._membership, self._figures = pace, lock, membership, figures
        self._dry_run, self._on_record = dry_run, on_record
        self._kinds = list(kinds)
        self._controller = make(self._kinds)
        self._memory: Memory | None = None
        self._act: asyncio.Task[None] | None = None
        self._failures, self._again_s = 0, 0.0
        self._unmet_since_s: float | None = None
        self._unmet_said = False
        self._trouble: str | None = None
        self._lock_trouble = ""
        self.cold_starts = ColdStarts()
        self.records: deque[Record] = deque(maxlen=kept)
        self.number = 0

    @property
    def want(self) -> dict[str, int]:
        """The counts now in force; empty before the first decision."""
        return {} if self._memory is None else dict(self._memory.want)

    async def run(self) -> None:
        """Until cancelled. A turn that takes longer than the interval is followed by the next at once."""
        while True:
            due_s = monotonic() + self._pace.interval_s
            try:
                await self.turn()
            except Exception:  # the outermost place: a bug here costs this turn and no instance
                log.exception("bug while deciding; the counts hold")
                self._figures.controller_failures.inc()
            await asyncio.sleep(max(0.0, due_s - monotonic()))

    async def close(self) -> None:
        """Leave the order under way, let the lock go."""
        if self._act is not None:
            self._act.cancel()
            await asyncio.gather(self._act, return_exceptions=True)
        await self._lock.release()

    async def turn(self) -> Record:
        """Look, decide, guard, act and explain once."""
        started_s = monotonic()
        window = await self._observer.look(self._controller.history_s, self._pace.interval_s)
        self._figures.look_time.observe(monotonic() - started_s)
        seen = window[-1]
        self._learn(seen)
        self._figures.show_members(seen.members, len(seen.blind))
        # A dry run leaves the lock to those who act, and the gateways as they are.
        self._membership.leads = leads = not self._dry_run and await self._leads()
        self._figures.leads.set(leads)
        started_s = monotonic()
        plan, asked, held = await self._decide(window)
        decide_s = monotonic() - started_s
        self._figures.decide_time.observe(decide_s)
        if plan.want:
            self._figures.show_desired(plan.want)
        action = self._order(plan.want, seen, leads=leads, held=held)
        return self._explain(seen, plan, asked, action, decide_s)

    async def _leads(self) -> bool:
        """Whether this one acts; nobody does where the lock cannot be asked for."""
        leads, trouble = False, ""
        try:
            leads = await self._lock.held()
        except ConfigError as error:
            trouble = str(error)
        if trouble and trouble != self._lock_trouble:
            log.error("standing by: %s", trouble)
        self._lock_trouble = trouble
        return leads

    def _learn(self, seen: Observation) -> None:
        """From starts that ended; the controller is made anew where it matters."""
        ordered_s: Mapping[str, float] = getattr(self._actuator, "ordered_s", {})
        ended = self.cold_starts.hear(seen.members, ordered_s, self._membership.ready_s)
        self._figures.show_starts(ended, self.cold_starts)
        for kind, took_s in ended:
            log.info("an instance of %s was ready after %.1f s", kind, took_s)
        learned = self.cold_starts.applied(self._kinds)
        for old, new in zip(self._kinds, learned, strict=True):
            if abs(new.cold_start_s - old.cold_start_s) > RELEARN * max(old.cold_start_s, 0.1):
                self._kinds = learned
                self._controller = self._make(learned)
                return

    async def _decide(self, window: Sequence[Observation]) -> tuple[Plan, dict[str, int], bool]:
        """The bounded plan, what the controller asked for, and whether the counts only hold."""
        if self._observer.blind_wholly:
            why = "; ".join(f"{url}: {trouble}" for url, trouble in self._observer.silent.items())
            return Plan(self.want, f"No gateway answers ({why}): the counts hold."), {}, True
        try:
            async with asyncio.timeout(max(self._pace.interval_s, 1.0) * 4):
                plan = await asyncio.to_thread(self._controller.decide, window)
        except TimeoutError:
            self._figures.controller_failures.inc()
            return Plan(self.want, "The controller took too long: the counts hold."), {}, True
        if self._memory is None:
            there = self._counts(window[-1], Phase.STARTING, Phase.READY)
            # What is there counts as asked for just now: an autoscaler that starts anew must not shrink at once.
            self._memory = Memory(there, ((window[-1].at_s, there),)) if any(there.values()) else Memory()
        guarded, self._memory = bounded(
            plan, window[-1].at_s, self._memory, self._kinds, self._guard, blind=window[-1].blind
        )
        return guarded, plan.want, False

    # Acting

    def _order(self, want: Mapping[str, int], seen: Observation, *, leads: bool, held: bool) -> str:
        """Give the order where one is due; what was done, in a word."""
        met = self._watch_met(want, seen)
        leads = leads and monotonic() < self._lock.sure_until_s  # this process may have been stopped since it asked
        if not leads and self._act is not None:
            self._act.cancel()  # the other one may give its own orders now
        if not want:
            return "held"
        if self._dry_run or not leads:
            return "dry-run" if self._dry_run else "standby"
        if self._act is not None and not self._act.done():
            return "busy"
        if monotonic() < self._again_s:
            return "waiting"
        mine = {kind: max(0, count - self._observer.foreign.get(kind, 0)) for kind, count in want.items()}
        self._act = asyncio.create_task(self._carry_out(mine))
        if held:
            return "held"
        return "kept" if met else "ordered"

    async def _carry_out(self, want: Mapping[str, int]) -> None:
        started_s = monotonic()
        trouble = reason = None
        try:
            async with asyncio.timeout(self._pace.act_within_s):
                await self._actuator.scale_to(want)
        except TimeoutError:
            trouble, reason = f"the actuator took longer than {self._pace.act_within_s:g} s", "slow"
        except ActuatorError as error:
            trouble, reason = str(error), "failed"
        except Exception as error:  # an actuator is a plugin: whatever it does, the loop goes on
            log.exception("bug in the actuator")
            trouble, reason = f"bug in the actuator: {error!r}", "bug"
        self._figures.act_time.observe(monotonic() - started_s)
        if reason is None:
            if self._failures:
                log.info("the actuator works again")
            self._failures, self._again_s, self._trouble = 0, 0.0, None
            return
        self._failures += 1
        pause_s = self._pace.interval_s * min(2 ** (self._failures - 1), BACK_OFF_MOST)
        self._again_s = monotonic() + pause_s
        self._figures.actuator_failures.labels(reason).inc()
        log.warning(
            "the order was not carried out (%d in a row): %s; again in %.3g s",
            self._failures, (trouble or "").rstrip("."), pause_s,
        )  # fmt: skip
        self._trouble = trouble

    def _watch_met(self, want: Mapping[str, int], seen: Observation) -> bool:
        """Whether there are as many as wanted; for how long not is shown."""
        there = self._counts(seen, Phase.STARTING, Phase.READY)
        met = all(there.get(kind, 0) == count for kind, count in want.items())
        ready = met and all(self._counts(seen, Phase.READY).get(kind, 0) == count for kind, count in want.items())
        if ready or not want:
            self._unmet_since_s, self._unmet_said = None, False
            self._figures.unmet.set(0)
            return met
        since_s = self._unmet_since_s = self._unmet_since_s or seen.at_s
        self._figures.unmet.set(seen.at_s - since_s)
        if seen.at_s - since_s >= self._pace.unmet_after_s and not self._unmet_said:
            self._unmet_said = True
            log.error("for %.0f s there were not as many as ordered: %s of %s", seen.at_s - since_s, there, dict(want))
        return met

    @staticmethod
    def _counts(seen: Observation, *phases: Phase) -> dict[str, int]:
        return dict(Counter(member.kind for member in seen.members if member.phase in phases))

    # Explaining

    def _explain(self, seen: Observation, plan: Plan, asked: dict[str, int], action: str, decide_s: float) -> Record:
        members: dict[str, dict[str, int]] = {kind.name: {} for kind in self._kinds}
        for member in seen.members:
            phases = members.setdefault(member.kind, {})
            phases[member.phase.value] = phases.get(member.phase.value, 0) + 1
        self.number += 1
        record = Record(
            number=self.number, at_s=seen.at_s, controller=self._controller.name, members=members, arrivals=seen.count,
            in_flight=seen.in_flight, queued=seen.queued, kv_used=seen.kv_used, blind=seen.blind, asked=asked,
            want=plan.want, reason=plan.reason, evidence=plan.evidence, action=action, trouble=self._trouble,
            cold_start_s={kind: round(s, 3) for kind, s in self.cold_starts.measured_s.items()}, decide_s=round(decide_s, 4),
        )  # fmt: skip
        self.records.append(record)
        self._figures.decisions.labels(action).inc()
        changed = len(self.records) < 2 or self.records[-2].want != plan.want or self.records[-2].action != action
        log.log(
            logging.INFO if changed else logging.DEBUG, "%s %s (there: %s): %s",
            action, plan.want, {k: v for k, v in members.items() if v}, plan.reason,
        )  # fmt: skip
        if self._on_record is not None:
            self._on_record(record)
        return record
