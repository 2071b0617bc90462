"""Fit of decode-only steps: a non-decreasing table over the (graph-padded) batch size plus seconds per context token.

Between two decode-only steps the accelerator never waits, so the distance of their results is one step's time.
"""

from collections.abc import Sequence

import msgspec
import numpy as np

from block.steptime.regress import Floats, balanced, bends, rises, solve
from block.steptime.steplog import StepLog, cuda_graph_sizes

KNOTS = np.array([1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512], dtype=float)
CONTEXT_CELLS = np.array([64, 200, 500, 1000, 2000, 4000])  # tokens a request
CELL_MOST = 30  # rows of one (batch size, context) cell that count fully
GPU_BOUND_S = 1e-3  # the CPU must have waited this long for a step to be the accelerator's time
PAUSE_S = 0.2  # longer steps are pauses of the engine, not work
SMOOTH = 5.0  # how strongly the slopes of neighbouring segments pull together
MILLI = 1e-3


class DecodeFit(msgspec.Struct, frozen=True, eq=False):
    """``base``: seconds per batch size at the knots; see ``seconds``."""

    knots: Floats
    base: Floats
    request_s: float
    kv_s: float
    caching_s: float

    def base_s(self, requests: Floats) -> Floats:
        """Seconds by batch size, without context; padded to the sizes of the CUDA graphs."""
        sizes = cuda_graph_sizes(int(max(requests.max(), 1)))
        padded = sizes[np.searchsorted(sizes, requests)].astype(float)
        slope = (self.base[-1] - self.base[-2]) / (self.knots[-1] - self.knots[-2])
        beyond = np.maximum(padded - self.knots[-1], 0) * slope
        return np.interp(padded, self.knots, self.base) + beyond + self.request_s * requests

    def seconds(self, log: StepLog, caching: bool) -> Floats:
        """Modelled decode time of every step's decoding part, shape (steps,)."""
        more_s = self.caching_s if caching else 0.0
        return self.base_s(log.decode_requests) + self.kv_s * log.context + more_s

    def table(self, most: int) -> list[tuple[float, float]]:
        """Profile knots: the steps of padding, up to ``most`` requests."""
        sizes = cuda_graph_sizes(most)
        ends = sorted({1, *(int(s) + 1 for s in sizes[:-1]), *(int(s) for s in sizes)})
        values = self.base_s(np.array(ends, dtype=float))
        return [(float(n), round(float(v), 9)) for n, v in zip(ends, values, strict=True)]


def steady(log: StepLog) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Indices of steps whose time is seen exactly: decode-only between decode-only steps, the CPU waiting for each."""
    plain = log.pure_decode
    u, s = log.finished_s, log.scheduled_s
    k = np.arange(2, len(log) - 1)
    if len(k) == 0:
        return k
    step_s = u[k] - u[k - 1]
    ok = plain[k - 1] & plain[k] & plain[k + 1] & (u[k - 1] - s[k] > GPU_BOUND_S) & (step_s > 0) & (step_s < PAUSE_S)
    return k[ok]


def fit_decode(logs: Sequence[tuple[StepLog, bool]]) -> DecodeFit | None:
    """Fit (log, prefix caching on) pairs; ``None`` if they hold too few decode-only steps."""
    picked = [steady(log) for log, _ in logs]
    if sum(map(len, picked)) < 2 * len(KNOTS):
        return None
    n = np.concatenate([log.decode_requests[k] for (log, _), k in zip(logs, picked, strict=True)])
    context = np.concatenate([log.context[k] for (log, _), k in zip(logs, picked, strict=True)])
    step_s = np.concatenate([log.finished_s[k] - log.finished_s[k - 1] for (log, _), k in zip(logs, picked, strict=True)])
    caching = np.concatenate([np.full(len(k), on) for (_, on), k in zip(logs, picked, strict=True)])
    which = np.concatenate([np.full(len(k), i) for i, k in enumerate(picked)])
    knots = KNOTS[: int(np.searchsorted(KNOTS, n.max())) + 1]
    sizes = cuda_graph_sizes(int(n.max()))
    padded = sizes[np.searchsorted(sizes, n)].astype(float)
    both = caching.any() and not caching.all()
    columns = np.column_stack([rises(padded, knots), n, context / 1e3, (caching & both).astype(float)])
    cells = np.searchsorted(KNOTS, n) * 1000 + np.searchsorted(CONTEXT_CELLS, context / n) * 100 + which
    weights = balanced(cells, CELL_MOST)
    weights[context / n < CONTEXT_CELLS[0]] *= 0.5  # real batches are not that short; the sweep's are
    penalty = bends(knots, columns.shape[1], SMOOTH * MILLI / float(step_s.mean()))
    found = solve(columns, step_s / MILLI, weights / (step_s / MILLI), penalty)
    segments = len(knots)
    base = found[0] + np.concatenate([[0.0], np.cumsum(found[1:segments] * np.diff(knots))])
    return DecodeFit(
        knots=knots,
        base=base * MILLI,
        request_s=float(found[segments] * MILLI),
        kv_s=float(found[segments + 1] * MILLI / 1e3),
        caching_s=float(found[segments + 2] * MILLI),
    )
