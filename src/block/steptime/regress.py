"""Regression helpers of the fits: monotone piecewise-linear columns, balanced weights, robust non-negative least squares."""

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

Floats = npt.NDArray[np.float64]
REWEIGHTINGS = 8
BEND_SCALE = 256.0  # tokens at which the work has about doubled


def rises(x: Floats, knots: Floats) -> Floats:
    """Columns whose non-negative combinations are the non-decreasing piecewise-linear functions with these knots.

    Shape (len(x), len(knots)): a constant, then per segment how far ``x`` has come in it; the last segment does not end.
    """
    lengths = np.diff(knots)
    lengths[-1] = np.inf
    return np.column_stack(
        [np.ones(len(x)), *(np.clip(x - low, 0, length) for low, length in zip(knots, lengths, strict=False))]
    )


def bends(knots: Floats, columns: int, strength: float) -> Floats:
    """Penalty rows that pull the slopes of neighbouring segments (columns 1 ... of ``rises``) together.

    A bend counts by how far it leads apart over the shorter of its segments, relative to how far along it is.
    """
    lengths = np.diff(knots)
    rows = np.zeros((max(len(knots) - 2, 0), columns))
    for i in range(len(rows)):
        weight = strength * min(lengths[i], lengths[i + 1]) / (1 + knots[i + 1] / BEND_SCALE)
        rows[i, i + 1], rows[i, i + 2] = weight, -weight
    return rows


def balanced(cells: npt.NDArray[np.int64], most: int) -> Floats:
    """Weights under which each cell counts as much as up to ``most`` of its rows, however many it has."""
    _, which, counts = np.unique(cells, return_inverse=True, return_counts=True)
    n = counts[which]
    return np.sqrt(np.minimum(n, most) / n)


def solve(columns: Floats, target: Floats, weights: Floats, penalty: Floats, knee: float | None = None) -> Floats:
    """Non-negative coefficients that minimise sum (weight x error)^2, plus the penalty rows.

    ``knee``: weighted errors beyond it count linearly, not squared (iteratively reweighted); ``None``: all squared.
    """
    found = _least_squares(columns, target, weights, penalty)
    if knee is None:
        return found
    for _ in range(REWEIGHTINGS):
        error = (columns @ found - target) * weights
        found = _least_squares(columns, target, weights / np.sqrt(np.sqrt(1 + (error / knee) ** 2)), penalty)
    return found


def solve_cleaned(
    columns: Floats, target: Floats, weights: Floats, penalty: Floats, knee: float, off: float, measured: int
) -> Floats:
    """``solve`` twice: robustly, then all squared without those of the first ``measured`` rows that the first solution misses
    by more than ``off`` x target."""
    found = solve(columns, target, weights, penalty, knee)
    kept = np.abs(columns @ found - target) <= off * np.abs(target)
    kept[measured:] = True
    return solve(columns[kept], target[kept], weights[kept], penalty)


def _least_squares(columns: Floats, target: Floats, weights: Floats, penalty: Floats) -> Floats:
    rows = np.vstack([columns * weights[:, None], penalty])
    right = np.concatenate([target * weights, np.zeros(len(penalty))])
    q, r = np.linalg.qr(rows)  # the same problem with as many rows as columns
    found: Floats = nnls(r, q.T @ right)[0]
    return found
