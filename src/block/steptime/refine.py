"""Last stage of a fit: one bounded factor that makes whole windows come out right on average.

The direct estimates see clean steps only; what adds up in a run also has the work that hides behind a launch and the
accelerator's slowing down under long prefills. The factor multiplies the work of steps with prefill, nothing else.
"""

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from scipy.optimize import least_squares

from block.engine.limits import EngineLimits
from block.steptime.profile import StepTimeProfile
from block.steptime.regress import Floats
from block.steptime.steplog import StepLog
from block.steptime.windows import Window, windows

LEAST, MOST = 0.85, 1.2
PAUSE_FRACTION = 0.25  # a window that the starting profile misses by more had a pause in it
PULL_S = 1e-3  # what being off 1 by a hundred per cent counts, in seconds of a typical window


def scaled(profile: StepTimeProfile, factor: float) -> StepTimeProfile:
    """The profile with the work of steps with prefill multiplied."""
    return msgspec.structs.replace(
        profile,
        mixed_knots=[(tokens, seconds * factor) for tokens, seconds in profile.mixed_knots],
        attention_s=profile.attention_s * factor,
    )


def refine(
    logs: Sequence[tuple[StepLog, EngineLimits]], profile: StepTimeProfile, progress: Callable[[], None] = lambda: None
) -> StepTimeProfile:
    """The profile with its factor fitted to the windows that begin in a running engine; unchanged if there are none."""

    def counts(window: Window) -> bool:
        usual = abs(window.modelled_s / window.measured_s - 1) < PAUSE_FRACTION
        return window.prefills > 0 and not window.from_idle and usual

    usable = [{w.last for w in windows(log, profile, limits) if counts(w)} for log, limits in logs]
    if not any(usable):
        return profile

    def off(factor: Floats) -> Floats:
        progress()
        rows = [(np.asarray(factor) - 1) * PULL_S]
        trial = scaled(profile, float(factor[0]))
        for (log, limits), use in zip(logs, usable, strict=True):
            found = [w for w in windows(log, trial, limits) if w.last in use]
            error = np.array([(w.modelled_s - w.measured_s) / np.sqrt(w.prefills) for w in found])
            rows.append(error / np.sqrt(max(len(found), 1)))
        return np.concatenate(rows)

    solved = least_squares(off, [1.0], bounds=(LEAST, MOST), diff_step=1e-3, x_scale=0.02, max_nfev=10)
    return scaled(profile, float(solved.x[0]))
