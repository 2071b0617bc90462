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
STALL_S = 2.5e-3  # launches this much longer than usual are pauses of the host
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
    """Launch times to start from: of steps scheduled right after another when nothing else was in flight."""
    times: list[list[float]] = [[] for _ in range(KINDS)]
    bounds: list[list[float]] = [[] for _ in range(KINDS)]
    for one in seen:
        s, u = one.log.scheduled_s, one.log.finished_s
        for k in range(2, len(s) - 1):
            if u[k - 1] < s[k] and s[k + 1] < u[k]:
                times[one.kinds[k]].append(s[k + 1] - s[k])
            elif s[k] < u[k - 1]:
                bounds[one.kinds[k]].append(u[k - 1] - u[k - 2])
    found = np.array([
        np.median(t) if len(t) >= LAUNCHES_FEW else (np.percentile(b, 10) if b else 0.0) for t, b in zip(times, bounds, strict=True)
    ])  # fmt: skip
    if bounds[DECODE]:
        found[DECODE] = np.percentile(bounds[DECODE], 0.5)
    return LaunchFit(np.maximum.accumulate(found), 0.0)


def ends(one: Observed, launch: Floats, work_s: Floats | None = None) -> Floats:
    """When the accelerator finished each step, shape (steps,); NaN where nothing shows it."""
    s, u = one.log.scheduled_s, one.log.finished_s
    plain = one.log.pure_decode
    found = np.full(len(s), np.nan)
    waited = np.zeros(len(s), bool)
    waited[:-1] = (s[1:] < u[:-1]) & (u[:-1] - s[1:] > launch[1:] + MARGIN_S)
    for k in range(len(s)):
        if k and u[k - 1] >= s[k] and not np.isnan(found[k - 1]) and plain[k] and not waited[k]:
            found[k] = found[k - 1] + one.decode_s[k]
        elif waited[k] and not (k + 1 < len(s) and one.kinds[k + 1] != DECODE and plain[k] and k and not np.isnan(found[k - 1])):
            found[k] = u[k]
        elif waited[k]:
            # The next step's launch may have been what was waited for: believe the earlier of model and measurement.
            found[k] = min(u[k], found[k - 1] + one.decode_s[k])
    return found


def fit_launch(seen: Sequence[Observed], start: LaunchFit, mixed: MixedFit | None) -> LaunchFit:
    """Mean launch times by kind, from the steps whose launch is what the result before them waited for."""
    rows: list[Floats] = []
    for one in seen:
        log, s, u = one.log, one.log.scheduled_s, one.log.finished_s
        usual = start.seconds(log, one.kinds)
        end = ends(one, usual)
        k = np.arange(2, len(s) - 1)
        work = one.decode_s if mixed is None else np.where(log.pure_decode, one.decode_s, mixed.seconds(log) + one.caching_s)
        before = np.where(np.isnan(end[k - 1]), end[k - 2] + work[k - 1], end[k - 1])
        in_flight = (s[k] < u[k - 1]) & (s[k - 1] < u[k - 2])
        shows = in_flight & (before - u[k - 2] < 0.85 * usual[k]) & (u[k - 1] - before > SURE_S)
        k = k[shows]
        rows.append(np.column_stack([one.kinds[k], log.decode_requests[k] + log.chunks[k], u[k - 1] - u[k - 2]]))
    found = np.concatenate(rows)
    kind = found[:, 0].astype(int)
    clipped = found[:, 2].copy()
    result = start.kind_s.copy()
    for i in range(KINDS):
        if (kind == i).sum() >= LAUNCHES_FEW:
            clipped[kind == i] = np.minimum(clipped[kind == i], np.percentile(clipped[kind == i], 95))
    use = np.isin(kind, [i for i in range(KINDS) if (kind == i).sum() >= LAUNCHES_FEW])
    if not use.any():
        return start
    columns = np.column_stack([*(kind[use] == i for i in range(KINDS)), found[use, 1]]).astype(float)
    solved = solve(columns, clipped[use] / MILLI, balanced(kind[use], 10**9) / 1, np.zeros((0, KINDS + 1)))
    for i in range(KINDS):
        if (kind == i).sum() >= LAUNCHES_FEW:
            result[i] = solved[i] * MILLI
    return LaunchFit(np.maximum.accumulate(result), float(solved[KINDS] * MILLI))


def work_samples(one: Observed, launch: LaunchFit) -> tuple[npt.NDArray[np.int64], Floats, npt.NDArray[np.bool_]]:
    """Steps with prefill whose work on the accelerator is seen: their indices, seconds, and whether it had been idle."""
    s, u = one.log.scheduled_s, one.log.finished_s
    usual = launch.seconds(one.log, one.kinds)
    end = ends(one, usual)
    index, work, idle = [], [], []
    for k in range(2, len(s) - 1):
        if one.log.pure_decode[k] or s[k + 1] >= u[k] or u[k] - s[k + 1] < usual[k + 1] + MARGIN_S:
            continue
        was_idle = u[k - 1] < s[k]
        took = s[k + 1] - s[k] if was_idle else u[k - 1] - s[k]
        start = s[k] if was_idle else end[k - 1]
        if np.isnan(start) or (not was_idle and one.log.pure_decode[k - 1] and took > usual[k] + STALL_S and u[k - 1] > start + SURE_S):
            continue
        if u[k] < s[k] + min(took, usual[k] + STALL_S) + MARGIN_S:
            continue
        index.append(k)
        work.append(u[k] - start)
        idle.append(was_idle)
    return np.array(index, dtype=np.int64), np.array(work), np.array(idle, dtype=bool)


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
