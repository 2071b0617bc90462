"""Kernel tables to a step-time profile.

A decode-only step = linear(n) + head(n) + attention(n, context); a step with prefill adds its chunks' attention. Attention is
fitted as a + b x requests + c x context (decode) and a + b x tokens + c x tokens x (before + tokens / 2) (prefill);
the linear operations and the head stay tables. Kernel tables know no host: the launch times are those of vLLM on our H200 host, by
layer, and so are the delays to the caller.
"""

import msgspec
import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression, nnls

from block.errors import BadInputError
from block.steptime.profile import StepTimeProfile
from block.steptime.regress import Floats

TOKENS = (
    1,
    2,
    4,
    *range(8, 33, 8),
    48,
    64,
    96,
    *range(128, 257, 32),
    *range(320, 513, 64),
    640,
    768,
    1024,
    1536,
    2048,
    3072,
    4096,
)
LEAST_FRACTION = 0.5  # a value below this part of one at fewer tokens is impossible
POINTS_FEW = 4
NEIGHBOURS = 5

# Measured on our H200 host (vLLM 0.24, four models of 28 to 64 layers): see docs/engine-model.md.
LAUNCH_DECODE_S = 1.9e-3
LAUNCH_GRAPH_LAYER_S = 0.23e-3
LAUNCH_EAGER_LAYER_S = 0.54e-3
LAUNCH_REQUEST_S = 5e-6
INPUT_S = 0.9e-3
OUTPUT_S = 0.9e-3
OUTPUT_REQUEST_S = 20e-6


class LayerTables(msgspec.Struct, frozen=True, eq=False):
    """Seconds of all layers together. ``decode``: rows (requests, context each, seconds); ``prefill``: rows (tokens, tokens
    before, seconds); ``uneven``, of batches whose contexts are as unlike as in traffic: rows (requests, mean context, seconds,
    seconds if all were of the mean).
    """

    layers: int
    tokens: Floats
    linear_s: Floats
    sequences: Floats
    head_s: Floats
    decode: Floats
    prefill: Floats
    uneven: Floats = np.zeros((0, 4))


def clean(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """A table by ``x`` (medians of equal ones), without NaN and impossible rows, never falling.

    Raises:
        BadInputError: too few rows are left.
    """
    keep = np.isfinite(x) & np.isfinite(y) & (y > 0)
    x, which = np.unique(x[keep], return_inverse=True)
    y = np.array([np.median(y[keep][which == i]) for i in range(len(x))])
    possible: list[int] = []
    for i in range(len(y)):
        if not possible or y[i] >= LEAST_FRACTION * np.median(y[possible[-NEIGHBOURS:]]):
            possible.append(i)
    after = [
        np.median(y[possible[j + 1 : j + 1 + NEIGHBOURS]]) if j + 1 < len(possible) else np.inf
        for j in range(len(possible))
    ]
    possible = [i for i, median in zip(possible, after, strict=True) if y[i] * LEAST_FRACTION <= median]
    if len(possible) < POINTS_FEW:
        raise BadInputError(f"A table has only {len(possible)} usable rows.")
    x, y = x[possible], y[possible]
    return x, np.asarray(isotonic_regression(y).x)


def at(x: Floats, y: Floats, where: Floats) -> Floats:
    """The table at ``where``: linear between its points, its last slope beyond."""
    slope = (y[-1] - y[-2]) / (x[-1] - x[-2])
    return np.asarray(np.interp(where, x, y) + np.maximum(where - x[-1], 0) * max(slope, 0.0))


def relative_nnls(columns: list[Floats], y: Floats) -> Floats:
    """Non-negative coefficients of least relative error."""
    scale = [max(float(np.max(c)), 1e-12) for c in columns]
    matrix = np.column_stack([c / s / y for c, s in zip(columns, scale, strict=True)])
    found: Floats = nnls(matrix, np.ones(len(y)))[0] / np.array(scale)
    return found


def to_profile(
    tables: LayerTables, *, name: str, gpu: str, model: str, tensor_parallel: int, source: str, licence: str
) -> StepTimeProfile:
    """The profile that a model's kernel tables imply."""
    n, each, seconds = tables.decode.T
    decode_s, request_s, kv_s = relative_nnls([np.ones(len(n)), n, n * each], seconds)
    tile_s, tile_requests = _tile(tables.uneven)
    tokens, before, seconds = tables.prefill.T
    chunk_s, token_s, work_s = relative_nnls([np.ones(len(tokens)), tokens, tokens * (before + tokens / 2)], seconds)
    grid = np.array([t for t in TOKENS if t <= tables.tokens.max()], dtype=float)
    linear = at(tables.tokens, tables.linear_s, grid)
    head = at(tables.sequences, tables.head_s, grid)
    head_slope = float((head[-1] - head[0]) / (grid[-1] - grid[0]))
    decode = linear + head + decode_s + request_s * grid
    mixed = linear + head[0] + decode_s + token_s * grid
    return StepTimeProfile(
        name=name,
        gpu=gpu,
        model=model,
        tensor_parallel=tensor_parallel,
        source=source,
        licence=licence,
        decode_knots=_knots(grid, decode),
        mixed_knots=_knots(grid, mixed),
        kv_s=float(kv_s),
        attention_s=float(work_s),
        chunk_s=float(chunk_s) + head_slope,
        request_s=float(request_s) + head_slope,
        tile_s=tile_s,
        tile_requests=tile_requests,
        launch_decode_s=LAUNCH_DECODE_S,
        launch_graph_s=LAUNCH_GRAPH_LAYER_S * tables.layers,
        launch_eager_s=LAUNCH_EAGER_LAYER_S * tables.layers,
        launch_request_s=LAUNCH_REQUEST_S,
        head_s=LAUNCH_DECODE_S,
        input_s=INPUT_S,
        output_s=OUTPUT_S,
        output_request_s=OUTPUT_REQUEST_S,
    )


def _tile(uneven: Floats) -> tuple[float, float]:
    """``tile_s`` and ``tile_requests`` that make up best for the longer contexts of uneven batches, by least relative error."""
    n, each, seconds, even_s = uneven.T
    found = []
    for requests in np.unique(n):
        share, late = each * np.minimum(n / requests, 1) / even_s, seconds / even_s - 1
        tile_s = max(float(share @ late / (share @ share)), 0.0)
        found.append((float(((late - tile_s * share) ** 2).sum()), tile_s, float(requests)))
    return min(found)[1:] if found else (0.0, 1.0)


def _knots(x: Floats, y: Floats) -> list[tuple[float, float]]:
    return [(float(a), round(float(b), 9)) for a, b in zip(x, np.maximum.accumulate(y), strict=True)]


def column(rows: list[dict[str, str]], name: str) -> npt.NDArray[np.float64]:
    """A column of text rows as floats; what is empty or no number is NaN."""

    def number(text: str | None) -> float:
        try:
            return float(text or "nan")
        except ValueError:
            return float("nan")

    return np.array([number(row.get(name)) for row in rows])
