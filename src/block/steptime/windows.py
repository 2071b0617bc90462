"""How far a profile is from a step log, on windows that end in a step whose time is the accelerator's alone.

A window starts where the pipeline's state is known: at such a step, or where the engine was idle. Inside, the pipeline
(see ``engine.pipeline``) is played over the logged batches with the profile's times; only the window's whole length is compared,
because the measured times of single steps around a prefill are shifted against their work.
"""

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from block.engine.limits import EngineLimits
from block.steptime.curve import StepCurve
from block.steptime.profile import RegimeError, StepTimeProfile
from block.steptime.steplog import Floats, StepLog

CPU_WAITS_S = 2.5e-3  # the CPU waited this long for a step's results, so they came when the accelerator ended
DECODE_STEPS = 20  # decode-only windows have this many steps
LARGE_BATCH = 32
PAUSE_S = 1.0  # steps further apart are not one window


class Window(msgspec.Struct, frozen=True):
    """Steps ``first`` < ... <= ``last``; the time runs from the results of ``first`` (or, from idle, its scheduling)."""

    first: int
    last: int
    from_idle: bool
    prefills: int
    decode_requests: float
    measured_s: float
    modelled_s: float


def _anchors(log: StepLog) -> tuple[list[bool], list[bool]]:
    """Per step: whether its results mark the accelerator's end among decode-only steps; whether it began from idle."""
    s, u, plain = log.scheduled_s, log.finished_s, log.pure_decode
    anchor = np.zeros(len(log), bool)
    k = np.arange(1, len(log) - 1)
    anchor[k] = plain[k - 1] & plain[k] & plain[k + 1] & (u[k] - s[k + 1] > CPU_WAITS_S) & (u[k - 1] > s[k])
    idle = np.ones(len(log), bool)
    idle[1:] = u[:-1] < s[1:]
    return anchor.tolist(), idle.tolist()


def work_s(log: StepLog, curve: StepCurve, limits: EngineLimits) -> Floats:
    """The accelerator's modelled time for every step of a log, shape (steps,)."""
    columns = (log.decode_requests, log.context, log.prefill_tokens, log.prefill_work, log.chunks)
    rows = np.column_stack([*columns, log.heat(curve.heat_memory_s), log.shared(limits)]).tolist()
    return np.array([curve.gpu_s(int(n), k, int(p), w, int(c), h, d) for n, k, p, w, c, h, d in rows])


def launch_s(log: StepLog, curve: StepCurve) -> Floats:
    """The CPU's modelled time for every step of a log, shape (steps,)."""
    rows = np.column_stack([log.decode_requests, log.prefill_tokens, log.chunks]).astype(int).tolist()
    return np.array([curve.launch_s(n, p, c) for n, p, c in rows])


def windows(log: StepLog, profile: StepTimeProfile, limits: EngineLimits) -> Iterator[Window]:
    """Cut a log into windows and play each with the profile (for asynchronous scheduling)."""
    curve = profile.curve(limits=limits)
    s, u = log.scheduled_s.tolist(), log.finished_s.tolist()
    chunks, requests = log.chunks.tolist(), log.decode_requests.tolist()
    work, launch = work_s(log, curve, limits).tolist(), launch_s(log, curve).tolist()
    anchor, idle = _anchors(log)
    first: int | None = None
    from_idle, prefills, taken_s, end_s = False, 0, 0.0, 0.0
    for k in range(len(s)):
        if idle[k] or (k and u[k] - u[k - 1] > PAUSE_S):
            first, from_idle, prefills = k, True, int(chunks[k] > 0)
            end_s = max(s[k] + curve.head_s + work[k], s[k] + launch[k])
            taken_s = s[k] + launch[k]  # nothing older is in flight: the next one is scheduled at once
            continue
        if first is None:
            continue
        now_s, free_s = taken_s, taken_s + launch[k]
        taken_s = max(end_s, free_s)  # the results of step k - 1
        end_s = max(max(end_s, now_s + curve.head_s) + work[k], free_s)
        prefills += chunks[k] > 0
        if anchor[k] and (prefills or k - first >= DECODE_STEPS):
            begun_s = s[first] if from_idle else u[first]
            yield Window(first, k, from_idle, prefills, requests[k], u[k] - begun_s, end_s - begun_s)
        if anchor[k] and (prefills or k - first >= DECODE_STEPS):
            # Step k's end is known, and step k + 1 was scheduled when the results of k - 1 were in.
            first, from_idle, prefills = k, False, 0
            end_s, taken_s = u[k], u[k - 1]


REGIMES = ("decode, up to 32 requests", "decode, more", "with prefill", "prefill from idle")


def regime_of(window: Window) -> str:
    if window.prefills == 0:
        return REGIMES[0] if window.decode_requests <= LARGE_BATCH else REGIMES[1]
    return REGIMES[3] if window.from_idle else REGIMES[2]


def errors_by_regime(logs: Sequence[tuple[StepLog, EngineLimits]], profile: StepTimeProfile) -> list[RegimeError]:
    """Relative errors of window lengths, by kind of window."""
    sorted_in: dict[str, list[Window]] = {name: [] for name in REGIMES}
    for log, limits in logs:
        for window in windows(log, profile, limits):
            sorted_in[regime_of(window)].append(window)
    return [_error(name, found) for name, found in sorted_in.items() if found]


def _error(name: str, found: list[Window]) -> RegimeError:
    measured = np.array([w.measured_s for w in found])
    modelled = np.array([w.modelled_s for w in found])
    off = np.abs(modelled / measured - 1)
    return RegimeError(
        regime=name,
        samples=len(found),
        bias_fraction=float(modelled.sum() / measured.sum() - 1),
        error_p50_fraction=float(np.percentile(off, 50)),
        error_p90_fraction=float(np.percentile(off, 90)),
    )
