"""Last stage of a fit: a few bounded factors that make whole windows come out right on average.

The direct estimates see clean steps only; what adds up in a run also has stalls of the host and the work that hides behind a
launch. The factors multiply the launch times and the work of steps with prefill, nothing else.
"""

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from scipy.optimize import least_squares

from block.engine.limits import EngineLimits
from block.steptime.profile import StepTimeProfile
from block.steptime.regress import Floats
from block.steptime.steplog import StepLog
from block.steptime.windows import windows

FACTORS = ("launch_graph_s", "launch_eager_s", "work")
LEAST, MOST = 0.8, 1.25
TRUST = 0.02  # how far a factor moves for as much as one typical window is off
PULL_S = 0.02e-3
PAUSE_FRACTION = 0.25  # a window that the starting profile misses by more had a pause in it


def scaled(profile: StepTimeProfile, factors: Floats) -> StepTimeProfile:
    graph, eager, work = map(float, factors)
    return msgspec.structs.replace(
        profile,
        launch_graph_s=profile.launch_graph_s * graph,
        launch_eager_s=profile.launch_eager_s * eager,
        mixed_knots=[(tokens, seconds * work) for tokens, seconds in profile.mixed_knots],
        attention_s=profile.attention_s * work,
    )


def refine(
    logs: Sequence[tuple[StepLog, EngineLimits]], profile: StepTimeProfile, progress: Callable[[], None] = lambda: None
) -> StepTimeProfile:
    """The profile with its factors fitted to the logs' windows; unchanged if they hold none with prefill."""

    usable = [
        {w.last for w in windows(log, profile, limits) if w.prefills and not w.from_idle and abs(w.modelled_s / w.measured_s - 1) < PAUSE_FRACTION}
        for log, limits in logs
    ]

    def off(factors: Floats) -> Floats:
        progress()
        rows = []
        trial = scaled(profile, factors)
        for (log, limits), use in zip(logs, usable, strict=True):
            found = [w for w in windows(log, trial, limits) if w.last in use]
            error = np.array([(w.modelled_s - w.measured_s) / np.sqrt(w.prefills) for w in found])
            rows.append(error / np.sqrt(max(len(found), 1)))
        pull = (np.asarray(factors) - 1) / TRUST * PULL_S
        return np.concatenate([*rows, pull])

    if not any(usable):
        return profile
    solved = least_squares(
        off, np.ones(len(FACTORS)), bounds=(LEAST, MOST), diff_step=1e-3, x_scale=TRUST, loss="linear", max_nfev=12
    )
    return scaled(profile, solved.x)
