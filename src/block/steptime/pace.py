"""What a step log shows of the two clocks of a step: the CPU's launch, and the end on the accelerator.

Theory: let S be when a step is scheduled and U when its results are taken in. The CPU looks at the results of k-1 only after
launching k, so U(k-1) = max(end of k-1 on the accelerator, S(k) + launch(k)). Launching a step with prefill takes longer
than a decode step executes: U(k-1) then shows the launch of k, and the end of k-1 has to be inferred as end(k-2) + its
modelled time. Knowing the ends, a step's work is end(k) - end(k-1) where it exceeds its launch.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from block.engine.limits import EngineLimits
from block.steptime.profile import graph_tokens
from block.steptime.regress import Floats
from block.steptime.steplog import StepLog

DECODE, GRAPH, EAGER = 0, 1, 2  # kinds of launch: decode-only, with prefill from CUDA graphs, beyond the captured sizes
KINDS = 3
MARGIN_S = 1.5e-3  # a result this much later than the CPU was free shows the accelerator
GPU_BOUND_S = 1e-3  # the CPU must have waited this long for a decode step to be the accelerator's time
PAUSE_S = 0.2  # longer decode steps are pauses of the engine, not work
FREE_FRACTION = 0.85  # the accelerator must be done by then for a launch to show unselected
CLIP_PERCENTILE = 90  # slower launches are stalls of the host, which hide the slope
DECODE_LAUNCH_S = 2e-3  # where nothing shows it: a captured graph's launch, scheduling and taking in results
TAIL_PERCENTILE = 5
LEAST_FRACTION = 0.7  # a step with prefill is not much faster than its decoding part alone
LAUNCHES_FEW = 10


class LaunchFit(msgspec.Struct, frozen=True, eq=False):
    """Seconds that the CPU is busy with one step: by kind (decode-only, within CUDA graphs, beyond them), per request."""

    kind_s: Floats
    request_s: float

    @property
    def head_s(self) -> float:
        """From scheduling to the first kernel: what launching a captured graph takes, which is one launch."""
        return float(self.kind_s[DECODE])

    def seconds(self, log: StepLog, kinds: npt.NDArray[np.int64]) -> Floats:
        return self.kind_s[kinds] + self.request_s * (log.decode_requests + log.chunks)


class Observed(msgspec.Struct, frozen=True, eq=False):
    """One log with what is known about it; arrays of shape (steps,). ``decode_s``: modelled work of the decoding part."""

    log: StepLog
    kinds: npt.NDArray[np.int64]
    decode_s: Floats


def observe(log: StepLog, limits: EngineLimits, decode_s: Floats) -> Observed:
    kinds = np.where(log.tokens > graph_tokens(limits), EAGER, np.where(log.pure_decode, DECODE, GRAPH))
    return Observed(log, kinds, decode_s)


def first_launch(seen: Sequence[Observed]) -> LaunchFit:
    """Launch times to start from: of steps with prefill that another step followed at once, nothing else being in flight."""
    times: list[list[float]] = [[] for _ in range(KINDS)]
    bounds: list[list[float]] = [[] for _ in range(KINDS)]
    for one in seen:
        s, u = one.log.scheduled_s, one.log.finished_s
        for k in range(2, len(s) - 1):
            if u[k - 1] < s[k] and s[k + 1] < u[k]:
                times[one.kinds[k]].append(s[k + 1] - s[k])
            elif s[k] < u[k - 1]:
                bounds[one.kinds[k]].append(u[k - 1] - u[k - 2])
    found = [
        float(np.median(t)) if len(t) >= LAUNCHES_FEW else float(np.percentile(b, 10)) if b else 0.0
        for t, b in zip(times, bounds, strict=True)
    ]
    least = float(np.percentile(bounds[DECODE], 0.5)) if bounds[DECODE] else DECODE_LAUNCH_S
    found[DECODE] = min(least, DECODE_LAUNCH_S)
    return LaunchFit(np.maximum.accumulate(np.array(found)), 0.0)


def waited_for(one: Observed, launch: Floats) -> npt.NDArray[np.bool_]:
    """Steps whose results the CPU clearly waited for after launching the next one, so that they show the accelerator.

    A launch with prefill may stall for as long as it usually takes, hence the doubled bound for those.
    """
    s, u = one.log.scheduled_s, one.log.finished_s
    waited = np.zeros(len(s), bool)
    bound = np.where(one.kinds == DECODE, launch, 2 * launch) + MARGIN_S
    waited[:-1] = (s[1:] < u[:-1]) & (u[:-1] - s[1:] > bound[1:])
    return waited


def ends(one: Observed, waited: npt.NDArray[np.bool_]) -> Floats:
    """When the accelerator finished each step, shape (steps,); NaN where nothing shows it."""
    s, u = one.log.scheduled_s, one.log.finished_s
    found = np.where(waited, u, np.nan)
    for k in np.flatnonzero(one.log.pure_decode & ~waited):
        if k and u[k - 1] >= s[k]:
            found[k] = found[k - 1] + one.decode_s[k]
    return found


def shown_launches(one: Observed, usual: LaunchFit) -> Floats:
    """Rows (kind, requests, seconds) of the launches with prefill that the decode step before them waited for."""
    log, s, u = one.log, one.log.scheduled_s, one.log.finished_s
    usual_s = usual.seconds(log, one.kinds)
    end = ends(one, waited_for(one, usual_s))
    k = np.arange(2, len(s) - 1)
    in_flight = (s[k] < u[k - 1]) & (s[k - 1] < u[k - 2])
    free = end[k - 1] - u[k - 2] < FREE_FRACTION * usual_s[k]
    k = k[in_flight & log.pure_decode[k - 1] & ~log.pure_decode[k] & free]
    return np.column_stack([one.kinds[k], log.decode_requests[k] + log.chunks[k], u[k - 1] - u[k - 2]])


def fit_launch(seen: Sequence[Observed], start: LaunchFit) -> LaunchFit:
    """Mean launch times by kind, from steps whose launch is what the decode step before them waited for.

    The mean, stalls of the host included, because it is what adds up. A decode-only step's launch shows only where a small
    prefill ran before it: the shortest ones.
    """
    rows: list[Floats] = []
    tails: list[Floats] = []
    for one in seen:
        log, s, u = one.log, one.log.scheduled_s, one.log.finished_s
        k = np.arange(2, len(s) - 1)
        in_flight = (s[k] < u[k - 1]) & (s[k - 1] < u[k - 2])
        tails.append((u[k - 1] - u[k - 2])[in_flight & log.pure_decode[k] & ~log.pure_decode[k - 1]])
        rows.append(shown_launches(one, start))
    request_s = _slope(rows)
    found = np.concatenate(rows)
    result = start.kind_s.copy()
    for kind in (GRAPH, EAGER):
        of_kind = found[found[:, 0] == kind]
        if len(of_kind) >= LAUNCHES_FEW:
            result[kind] = max(float((of_kind[:, 2] - request_s * of_kind[:, 1]).mean()), 0.0)
    tail = np.concatenate(tails)
    if len(tail) >= LAUNCHES_FEW:
        result[DECODE] = min(float(np.percentile(tail, TAIL_PERCENTILE)), DECODE_LAUNCH_S)
    return LaunchFit(np.maximum.accumulate(result), request_s)


def _slope(rows: list[Floats]) -> float:
    """Seconds a launch takes longer per request: within each log, of the launches that vary least (CUDA graphs)."""
    x, y = [], []
    for row in rows:
        graph = row[row[:, 0] == GRAPH]
        if len(graph) >= LAUNCHES_FEW:
            graph = graph[graph[:, 2] <= np.percentile(graph[:, 2], CLIP_PERCENTILE)]
            x.append(graph[:, 1] - graph[:, 1].mean())
            y.append(graph[:, 2] - graph[:, 2].mean())
    if not x:
        return 0.0
    requests, seconds = np.concatenate(x), np.concatenate(y)
    return max(float(requests @ seconds / max(requests @ requests, 1.0)), 0.0)


def work_samples(one: Observed, launch: LaunchFit) -> tuple[npt.NDArray[np.int64], Floats]:
    """Steps with prefill whose work on the accelerator is seen: their indices and seconds."""
    s, u = one.log.scheduled_s, one.log.finished_s
    usual = launch.seconds(one.log, one.kinds)
    waited = waited_for(one, usual)
    end = ends(one, waited)
    k = np.flatnonzero(waited & ~one.log.pure_decode)
    k = k[(k >= 2) & (k < len(s) - 1)]
    idle = u[k - 1] < s[k]
    began = np.where(idle, s[k] + launch.head_s, end[k - 1])
    took = np.where(idle, s[k + 1] - s[k], np.minimum(u[k - 1] - s[k], 2 * usual[k]))  # its launch, at most
    work = u[k] - began
    seen = ~np.isnan(began) & (u[k] > s[k] + took + MARGIN_S) & (work > LEAST_FRACTION * one.decode_s[k])
    return k[seen], work[seen]


def steady(log: StepLog) -> npt.NDArray[np.int64]:
    """Indices of steps whose work is the distance of results: decode-only between such, the CPU waiting for each."""
    plain = log.pure_decode
    u, s = log.finished_s, log.scheduled_s
    k = np.arange(2, max(len(log) - 1, 2))
    step_s = u[k] - u[k - 1]
    ok = plain[k - 1] & plain[k] & plain[k + 1] & (u[k - 1] - s[k] > GPU_BOUND_S) & (step_s > 0) & (step_s < PAUSE_S)
    return k[ok]
