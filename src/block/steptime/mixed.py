"""Fit of steps with prefill: the CPU's launch time, and the accelerator's work where it is what the step waits for.

Theory: let S be when a step is scheduled and U when its results are taken in. U(k-1) = max(end of k-1 on the accelerator, S(k) + launch(k)).
Launching a step with prefill takes longer than a decode step executes, so U(k-1) then shows the launch of k, and
the end of k-1 has to be inferred: end(k-2) + its modelled time. Knowing the ends, a step's work is end(k) - end(k-1) where it
exceeds its launch. The sums are right whichever way single durations look.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from block.engine.limits import EngineLimits
from block.steptime.decode import MILLI, DecodeFit
from block.steptime.profile import graph_tokens
from block.steptime.regress import Floats, balanced, bends, rises, solve
from block.steptime.steplog import StepLog

KNOTS = np.array([0, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192], dtype=float)
DECODE, GRAPH, EAGER = 0, 1, 2  # kinds of launch
KINDS = 3
MARGIN_S = 1.5e-3  # a result this much later than the CPU was free shows the accelerator
SURE_S = 0.5e-3  # a result this much later than the modelled end shows the launch
FREE_FRACTION = 0.85  # the accelerator must be done by then for a launch to show unselected
CLIP_PERCENTILE = 97  # longer launches are pauses of the host
DECODE_LAUNCH_S = 2e-3  # where nothing shows it: a captured graph's launch, scheduling and taking in results
KNEE = 0.03
CELL_MOST = 60
LAUNCHES_FEW = 10


class LaunchFit(msgspec.Struct, frozen=True, eq=False):
    """Seconds that the CPU is busy with one step: by kind (decode-only, within CUDA graphs, beyond them), per request."""

    kind_s: Floats
    request_s: float

    def seconds(self, log: StepLog, kinds: npt.NDArray[np.int64]) -> Floats:
        return self.kind_s[kinds] + self.request_s * (log.decode_requests + log.chunks)


class MixedFit(msgspec.Struct, frozen=True, eq=False):
    knots: Floats
    base: Floats
    kv_s: float
    attention_s: float
    chunk_s: float
    decode_request_s: float
    head_s: float

    def seconds(self, log: StepLog) -> Floats:
        slope = (self.base[-1] - self.base[-2]) / (self.knots[-1] - self.knots[-2])
        base = np.interp(log.tokens, self.knots, self.base) + np.maximum(log.tokens - self.knots[-1], 0) * slope
        return (
            base + self.kv_s * log.context + self.attention_s * log.prefill_work
            + self.chunk_s * log.chunks + self.decode_request_s * log.decode_requests
        )  # fmt: skip


class Observed(msgspec.Struct, frozen=True, eq=False):
    """One log with what is known about it; arrays of shape (steps,)."""

    log: StepLog
    kinds: npt.NDArray[np.int64]
    decode_s: Floats
    caching_s: float


def observe(log: StepLog, limits: EngineLimits, decode: DecodeFit) -> Observed:
    kinds = np.where(log.tokens > graph_tokens(limits), EAGER, np.where(log.pure_decode, DECODE, GRAPH))
    caching = limits.enable_prefix_caching
    return Observed(log, kinds, decode.seconds(log, caching), decode.caching_s if caching else 0.0)


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
    found = [np.median(t) if len(t) >= LAUNCHES_FEW else (np.percentile(b, 10) if b else 0.0) for t, b in zip(times, bounds, strict=True)]
    found[DECODE] = min(np.percentile(bounds[DECODE], 0.5), DECODE_LAUNCH_S) if bounds[DECODE] else DECODE_LAUNCH_S
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


def fit_launch(seen: Sequence[Observed], start: LaunchFit, mixed: MixedFit | None) -> LaunchFit:
    """Mean launch times by kind, from the steps whose launch is what the result before them waited for."""
    rows: list[Floats] = []
    for one in seen:
        log, s, u = one.log, one.log.scheduled_s, one.log.finished_s
        usual = start.seconds(log, one.kinds)
        end = ends(one, waited_for(one, usual))
        k = np.arange(2, len(s) - 1)
        work = one.decode_s if mixed is None else np.where(log.pure_decode, one.decode_s, mixed.seconds(log) + one.caching_s)
        before = np.where(log.pure_decode[k - 1], end[k - 1], end[k - 2] + work[k - 1])
        shows = (s[k] < u[k - 1]) & (s[k - 1] < u[k - 2])  # two in flight
        shows &= (before - u[k - 2] < FREE_FRACTION * usual[k]) & (u[k - 1] - before > SURE_S)
        shows &= log.pure_decode[k - 1] | (mixed is not None)
        k = k[shows]
        rows.append(np.column_stack([one.kinds[k], log.decode_requests[k] + log.chunks[k], u[k - 1] - u[k - 2]]))
    found = np.concatenate(rows)
    kind, seconds = found[:, 0].astype(int), found[:, 2].copy()
    enough = [i for i in range(KINDS) if (kind == i).sum() >= LAUNCHES_FEW]
    if not enough:
        return start
    for i in enough:
        seconds[kind == i] = np.minimum(seconds[kind == i], np.percentile(seconds[kind == i], CLIP_PERCENTILE))
    use = np.isin(kind, enough)
    columns = np.column_stack([*(kind[use] == i for i in range(KINDS)), found[use, 1]]).astype(float)
    solved = solve(columns, seconds[use] / MILLI, seconds[use] / MILLI, np.zeros((0, KINDS + 1)))  # absolute errors
    result = start.kind_s.copy()
    result[enough] = solved[enough] * MILLI
    return LaunchFit(np.maximum.accumulate(result), float(solved[KINDS] * MILLI))


def work_samples(one: Observed, launch: LaunchFit) -> tuple[npt.NDArray[np.int64], Floats, npt.NDArray[np.bool_]]:
    """Steps with prefill whose work on the accelerator is seen: their indices, seconds, and whether it had been idle."""
    s, u = one.log.scheduled_s, one.log.finished_s
    usual = launch.seconds(one.log, one.kinds)
    waited = waited_for(one, usual)
    end = ends(one, waited)
    k = np.flatnonzero(waited & ~one.log.pure_decode)
    k = k[(k >= 2) & (k < len(s) - 1)]
    idle = u[k - 1] < s[k]
    began = np.where(idle, s[k], end[k - 1])
    took = np.where(idle, s[k + 1] - s[k], np.minimum(u[k - 1] - s[k], 2 * usual[k]))  # its launch, at most
    seen = ~np.isnan(began) & (u[k] > s[k] + took + MARGIN_S)
    return k[seen], (u[k] - began)[seen], idle[seen]


def fit_mixed(seen: Sequence[Observed], launch: LaunchFit) -> MixedFit | None:
    """Fit the accelerator's work in steps with prefill; ``None`` if too few show it."""
    columns, work, cells, tokens_most = [], [], [], 0.0
    samples = [work_samples(one, launch) for one in seen]
    tokens_most = max((float(o.log.tokens[k].max()) for o, (k, _, _) in zip(seen, samples, strict=True) if len(k)), default=0.0)
    if sum(len(k) for k, _, _ in samples) < 2 * LAUNCHES_FEW:
        return None
    knots = KNOTS[: max(int(np.searchsorted(KNOTS, tokens_most)) + 1, 3)]
    for number, (one, (k, seconds, idle)) in enumerate(zip(seen, samples, strict=True)):
        log = one.log
        columns.append(np.column_stack([
            rises(log.tokens[k], knots), log.context[k] / 1e3, log.prefill_work[k] / 1e6, log.chunks[k],
            log.decode_requests[k], idle.astype(float),
        ]))  # fmt: skip
        work.append(seconds - one.caching_s)
        cells.append(np.searchsorted(knots, log.tokens[k]) * 100 + number)
    matrix, target = np.concatenate(columns), np.concatenate(work) / MILLI
    weights = balanced(np.concatenate(cells), CELL_MOST)
    found = solve(matrix, target, weights, bends(knots, matrix.shape[1], 1.0), KNEE)
    n = len(knots)
    base = found[0] + np.concatenate([[0.0], np.cumsum(found[1:n] * np.diff(knots))])
    kv, attention, chunk, request, head = found[n:] * MILLI
    return MixedFit(knots, base * MILLI, float(kv / 1e3), float(attention / 1e6), float(chunk), float(request), float(head))
