"""Last stage of a fit: what steps beyond the CUDA graphs take longer, so that whole windows come out right on average.

The direct estimates see clean steps only, and medians: a step whose kernels are launched one by one also waits for the CPU now and
then, most of all while the host is slow. That adds up in a run and is found here as one constant, ``eager_s``.
"""

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from scipy.optimize import least_squares

from block.engine.limits import EngineLimits
from block.steptime.profile import StepTimeProfile, graph_tokens
from block.steptime.regress import Floats
from block.steptime.steplog import StepLog
from block.steptime.windows import windows

MOST_S = 5e-3
PAUSE_FRACTION = 0.25  # a window that the starting profile misses by more had a pause in it
PULL = 1e-3  # weight of the constant itself: it stays 0 where nothing shows it


def refine(
    logs: Sequence[tuple[StepLog, EngineLimits]], profile: StepTimeProfile, progress: Callable[[], None] = lambda: None
) -> StepTimeProfile:
    """The profile with its constant fitted to the windows that begin in a running engine; unchanged if there are none."""
    usable, eager = [], []
    for log, limits in logs:
        beyond = np.cumsum((log.tokens > graph_tokens(limits)) & ~log.pure_decode)
        found = [w for w in windows(log, profile, limits) if not w.from_idle]
        found = [w for w in found if abs(w.modelled_s / w.measured_s - 1) < PAUSE_FRACTION]
        count = {w.last: int(beyond[w.last] - beyond[w.first]) for w in found}
        usable.append({last for last, n in count.items() if n > 0})
        eager.append(count)
    if not any(usable):
        return profile

    def off(constant: Floats) -> Floats:
        progress()
        rows = [np.asarray(constant) * PULL]
        trial = msgspec.structs.replace(profile, eager_s=float(constant[0]))
        for (log, limits), use, count in zip(logs, usable, eager, strict=True):
            found = [w for w in windows(log, trial, limits) if w.last in use]
            error = np.array([(w.modelled_s - w.measured_s) / np.sqrt(count[w.last]) for w in found])
            rows.append(error / np.sqrt(max(len(found), 1)))
        return np.concatenate(rows)

    solved = least_squares(off, [1e-4], bounds=(0.0, MOST_S), diff_step=0.5, x_scale=1e-3, max_nfev=12)
    return msgspec.structs.replace(profile, eager_s=float(solved.x[0]))
