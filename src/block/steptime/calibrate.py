"""Online calibration: one slowly moving factor on a profile's times, from the steps that an engine reports.

Single steps say little (around a prefill the CPU's launches shift their ends), so the modelled pipeline is played over windows of
consecutive steps and only a window's length is compared. The factor follows the windows' logarithms: the median of the last
few, so that one pause moves nothing, then a fraction of what is left, bounded per window and in all.
"""

import math
from collections import deque
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from block.engine.limits import EngineLimits
from block.steptime.profile import StepTimeProfile

WINDOW_STEPS = 16
MEDIAN_OF = 9
GAIN = 0.25
STEP_MOST = math.log(1.05)  # what one window may change
LEAST, MOST = 0.5, 2.0  # what all may, against the scale that it began with


class Reported(Protocol):
    """The part of a snapshot that is looked at. ``steps``: rows of ``predict.snapshot.STEP``, oldest first."""

    @property
    def steps(self) -> npt.NDArray[np.void]: ...
    @property
    def limits(self) -> EngineLimits: ...
    @property
    def epoch(self) -> int: ...
    @property
    def shared_tokens(self) -> int: ...


class CalibrationState(msgspec.Struct, frozen=True):
    """For metrics. ``error_fraction``: how far off the last windows are *after* scaling (positive: the model is too slow)."""

    scale: float
    windows: int
    error_fraction: float | None


class Calibration:
    """Feed it every snapshot of one engine; read ``scale``, by which to multiply the profile's times.

    ``scale`` is where it begins: 1 / speed for an engine whose speed against the profile is known.
    """

    def __init__(self, profile: StepTimeProfile, scale: float = 1.0) -> None:
        self.scale = scale
        self._least, self._most = LEAST * scale, MOST * scale
        self._profile = profile
        self._limits: EngineLimits | None = None
        self._epoch: int | None = None
        self._recent: deque[float] = deque(maxlen=MEDIAN_OF)
        self._windows = 0
        self._last_finished_s = -math.inf
        self._pending: list[tuple[Any, int]] = []  # steps, tokens of their context that were shared
        self._heat, self._heated_s = 0.0, -math.inf

    @property
    def state(self) -> CalibrationState:
        error = self.scale / math.exp(float(np.median(self._recent))) - 1.0 if self._recent else None
        return CalibrationState(self.scale, self._windows, error)

    def observe(self, snapshot: Reported) -> None:
        """Learn from a snapshot's step log; the same step may come several times, a gap begins a new window."""
        if snapshot.limits != self._limits or snapshot.epoch != self._epoch:
            self._limits, self._epoch = snapshot.limits, snapshot.epoch
            self._curve = self._profile.curve(limits=snapshot.limits)
            self._pending, self._last_finished_s = [], -math.inf
        steps = snapshot.steps
        fresh = steps[steps["finished_s"] > self._last_finished_s]
        if len(fresh) == 0:
            return
        if len(fresh) == len(steps):
            self._pending = []  # older steps than these went by unseen
        self._last_finished_s = float(fresh[-1]["finished_s"])
        shared = snapshot.shared_tokens
        for step in fresh:
            if self._pending and step["scheduled_s"] > self._pending[-1][0]["finished_s"] + self._curve.launch_decode_s:
                self._pending = []  # the engine was idle in between
            self._pending.append((step, shared))
            if len(self._pending) > WINDOW_STEPS:
                self._close()

    def _close(self) -> None:
        steps, self._pending = self._pending, self._pending[-1:]
        observed_s = float(steps[-1][0]["finished_s"] - steps[0][0]["finished_s"])
        modelled_s = self._play(steps)
        if observed_s <= 0 or modelled_s <= 0:
            return
        self._windows += 1
        self._recent.append(math.log(min(max(observed_s / modelled_s, self._least), self._most)))
        left = float(np.median(self._recent)) - math.log(self.scale)
        change = min(max(GAIN * left, -STEP_MOST), STEP_MOST)
        self.scale = min(max(self.scale * math.exp(change), self._least), self._most)

    def _play(self, steps: list[tuple[Any, int]]) -> float:
        """Seconds from the first step's results to the last one's in the unscaled profile (see ``engine.pipeline``)."""
        assert self._limits is not None
        curve, overlapped = self._curve, self._limits.async_scheduling
        end_s = 0.0
        now_s = min(float(steps[1][0]["scheduled_s"] - steps[0][0]["finished_s"]), 0.0) if overlapped else 0.0
        for step, shared in steps[1:]:
            n, tokens, chunks = int(step["decode_requests"]), int(step["prefill_tokens"]), int(step["chunks"])
            heat = 0.0
            if chunks:
                heat = curve.heat_after(self._heat, float(step["finished_s"]) - self._heated_s)
                self._heat, self._heated_s = heat + tokens, float(step["finished_s"])
            context = float(step["context"])
            work_s = curve.gpu_s(n, context, tokens, float(step["prefill_work"]), chunks, heat, min(shared, context))
            free_s = now_s + curve.launch_s(n, tokens, chunks)
            # With two batches in flight the next one is scheduled when the results of the one before are in.
            taken_s = max(end_s, free_s)
            end_s = max(max(end_s, now_s + curve.head_s) + work_s, free_s)
            now_s = taken_s if overlapped else end_s
        return end_s
