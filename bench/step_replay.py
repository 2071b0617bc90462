"""The recursion of engine/pipeline.py over measured steps: each step anew from what was measured before it was scheduled.

Used by host_launches.py and phase.py: what a profile gets wrong in a step, without what earlier errors made of the state.
"""

import numpy as np

from block.steptime.profile import StepTimeProfile
from block.steptime.steplog import Floats, Run, StepLog
from block.steptime.windows import launch_s, work_s

STALLED = 2.0  # times its usual launch (and a margin): then the CPU waited for the accelerator after all
MARGIN_S = 1.5e-3
PAUSE_S = 0.2  # longer ones are pauses of the engine


class StepReplay:
    """A stage's steps under a profile; arrays have shape (steps,), times are the stage's."""

    def __init__(self, log: StepLog, run: Run, profile: StepTimeProfile) -> None:
        curve = profile.curve(limits=run.limits)
        self.log, self.head_s = log, curve.head_s
        self.work_s, self.launch_s = work_s(log, curve, run.limits), launch_s(log, curve)
        self.end_s = self._ends()

    def _ends(self) -> Floats:
        """When the accelerator ends each step, seen from when the next one is scheduled."""
        s, u, found = self.log.scheduled_s, self.log.finished_s, np.zeros(len(self.log))
        usual = np.where(self.log.pure_decode, 1.0, STALLED) * self.launch_s + MARGIN_S
        for k in range(len(s)):
            before_s = 0.0
            if k and u[k - 1] > s[k]:
                before_s = u[k - 1] if u[k - 1] - s[k] > usual[k] else min(found[k - 1], u[k - 1])
            found[k] = max(max(before_s, s[k] + self.head_s) + self.work_s[k], s[k] + self.launch_s[k])
        return found

    def results_s(self, first: int, last: int) -> float:
        """When the results of step ``last`` are in, if all before the scheduling of step ``first`` is as measured."""
        now_s = float(self.log.scheduled_s[first])
        end_s = float(self.end_s[first - 1]) if first and self.log.finished_s[first - 1] > now_s else now_s
        for k in range(first, last + 1):
            free_s = now_s + self.launch_s[k]
            taken_s = max(end_s, free_s)
            end_s = max(max(end_s, now_s + self.head_s) + self.work_s[k], free_s)
            now_s = taken_s
        following_s = self.launch_s[last + 1] if last + 1 < len(self.log) else 0.0
        return float(max(end_s, now_s + following_s))

    def intervals(self) -> tuple[np.ndarray, Floats, Floats, np.ndarray]:
        """Steps k that were scheduled while another was in flight; from the results of k - 2 to those of k - 1, measured and
        modelled, in seconds; and whether the model has the launch of k decide it."""
        s, u = self.log.scheduled_s, self.log.finished_s
        k = np.arange(2, len(s))
        k = k[(s[k] < u[k - 1]) & (s[k - 1] < u[k - 2]) & (u[k - 2] <= s[k]) & (u[k - 1] - u[k - 2] < PAUSE_S)]
        free_s = u[k - 2] + self.launch_s[k]
        modelled = np.maximum(self.end_s[k - 1], free_s) - u[k - 2]
        return k, u[k - 1] - u[k - 2], modelled, self.end_s[k - 1] < free_s
