"""The scheduler in time: one or two batches in flight, a CPU that launches, an accelerator that executes.

One thread schedules, launches and takes in results; the accelerator runs batches in order. At time S a batch is scheduled, the
CPU is busy until S + launch, the accelerator ends it at max(its previous end, S + head) + step, and not before its last kernel is
launched; the results are taken in at the later of that end and the CPU being free. With asynchronous scheduling the
next batch is scheduled before the CPU waits, so an arrival waits for the batch that runs and the one already scheduled.
"""

from collections import deque
from typing import NamedTuple

from block.engine.limits import EngineLimits
from block.engine.scheduler import Scheduler
from block.engine.sequence import FINISHED, RUNNING, Batch, Sequence
from block.steptime.curve import StepCurve


STEPS_KEPT = 16  # finished steps that are remembered, for snapshots


class Flight(NamedTuple):
    """A batch in flight: scheduled, launched, not yet taken in."""

    batch: Batch
    scheduled_s: float
    started_s: float
    ends_s: float


class Engine:
    """One engine instance in virtual time. Times given must not go back."""

    def __init__(self, limits: EngineLimits, curve: StepCurve, now_s: float = 0.0) -> None:
        self.limits = limits
        self.curve = curve
        self.scheduler = Scheduler(limits)
        self.in_flight: deque[Flight] = deque()
        self.steps = 0
        self.recent: deque[tuple[Flight, float]] = deque(
            maxlen=STEPS_KEPT
        )  # the last finished steps, when they finished
        self._arrivals: deque[tuple[float, Sequence]] = deque()
        self._cpu_free_s = now_s
        self._gpu_free_s = now_s
        self._heat, self._heated_s = 0.0, now_s  # tokens prefilled lately, and when that was counted
        self._batches_max = 2 if limits.async_scheduling else 1
        self._stuck = False  # nothing to compute until something arrives or comes back

    def add(self, sequence: Sequence, at_s: float) -> None:
        """A request reaches the scheduler's input queue at ``at_s`` (not before earlier ones)."""
        self._arrivals.append((at_s, sequence))
        self._stuck = False

    def abort(self, sequence: Sequence, at_s: float | None = None) -> None:
        """Forget a request, wherever it is; what its leaving makes possible does not happen before ``at_s``."""
        if at_s is not None:
            self._cpu_free_s = max(self._cpu_free_s, at_s)
        for entry in self._arrivals:
            if entry[1] is sequence:
                self._arrivals.remove(entry)
                sequence.status = FINISHED
                return
        self.scheduler.abort(sequence)
        self._stuck = False

    def place(self, sequence: Sequence, output: int) -> bool:
        """Make a sequence one that decodes and has ``output`` tokens (at least 1), because the real engine was seen there.

        It takes its blocks with the next batch. A finished sequence cannot come back; a new one of its key can be placed.
        ``False``: not now, nothing changed (still on its way in, tokens of before a preemption in flight, no room to run).
        """
        scheduler = self.scheduler
        if sequence.status != RUNNING:
            if sequence.stale or len(scheduler.running) >= self.limits.max_num_seqs:
                return False
            if any(arriving is sequence for _, arriving in self._arrivals):
                return False
            if sequence in scheduler.waiting:
                scheduler.waiting.remove(sequence)
            scheduler.running.append(sequence)
            sequence.status = RUNNING
        sequence.output = output
        sequence.computed = sequence.prompt + output + sequence.placeholders - 1
        self._stuck = False
        return True

    def next_event_s(self) -> float | None:
        """When something happens next; ``None``: never, unless a request is added."""
        if self._can_schedule():
            if self.scheduler.has_requests:
                return self._cpu_free_s
            return max(self._cpu_free_s, self._arrivals[0][0])
        if self.in_flight:
            return max(self._cpu_free_s, self.in_flight[0].ends_s)
        return max(self._cpu_free_s, self._arrivals[0][0]) if self._arrivals else None

    def advance(self, until_s: float) -> list[tuple[float, Sequence]]:
        """Let everything up to ``until_s`` happen; returns (time, sequence) for every output token, in order."""
        tokens: list[tuple[float, Sequence]] = []
        while (at_s := self.next_event_s()) is not None and at_s <= until_s:
            if self._can_schedule():
                self._schedule(at_s)
            elif self.in_flight:
                self._update(at_s, tokens)
            else:
                self._cpu_free_s = at_s  # what waits cannot run; only the next arrival may change that
                self._stuck = False
        return tokens

    def _can_schedule(self) -> bool:
        if self._stuck or len(self.in_flight) >= self._batches_max:
            return False
        if self.scheduler.has_requests:
            return True
        # The input queue is drained on every turn of the engine's loop, and awaited when nothing is in flight.
        return bool(self._arrivals) and (not self.in_flight or self._arrivals[0][0] <= self._cpu_free_s)

    def _schedule(self, now_s: float) -> None:
        while self._arrivals and self._arrivals[0][0] <= now_s:
            self.scheduler.add(self._arrivals.popleft()[1])
        batch = self.scheduler.schedule()
        if not batch.sequences:
            # Preempting may leave nothing for this step and everything for the next (priority: a request gives way itself).
            self._stuck = bool(self.in_flight) or not batch.preempted
            return
        for sequence in batch.sequences:
            if sequence.scheduled_s < 0:
                sequence.scheduled_s = now_s
        chunks = len(batch.chunks)
        self._cpu_free_s = now_s + self.curve.launch_s(batch.decode_requests, batch.prefill_tokens, chunks)
        started_s = max(self._gpu_free_s, now_s + self.curve.head_s)
        heat = 0.0
        if chunks:
            heat = self.curve.heat_after(self._heat, started_s - self._heated_s)
            self._heat, self._heated_s = heat + batch.prefill_tokens, started_s
        step_s = self.curve.gpu_s(
            batch.decode_requests, batch.context, batch.prefill_tokens, batch.prefill_work, chunks, heat, batch.shared
        )
        self._gpu_free_s = max(started_s + step_s, self._cpu_free_s)
        self.in_flight.append(Flight(batch, now_s, started_s, self._gpu_free_s))
        self.steps += 1

    def _update(self, now_s: float, tokens: list[tuple[float, Sequence]]) -> None:
        self._stuck = False
        self._cpu_free_s = now_s
        flight = self.in_flight.popleft()
        self.recent.append((flight, now_s))
        for sequence in self.scheduler.update(flight.batch):
            if sequence.output == 1:
                sequence.first_token_s = now_s
            if sequence.status == FINISHED:
                sequence.finished_s = now_s
            tokens.append((now_s, sequence))
