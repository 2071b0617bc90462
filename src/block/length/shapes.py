"""Survival functions to fill a bank with: from a formula, from a histogram, around a location."""

import numpy as np
from numpy.typing import NDArray

from block.length.distribution import Floats
from block.length.grid import EDGES, TOKENS_MAX

TAIL_WEIGHT = 0.001
"""Share of a thin, wide tail in every row: what is left to say of a request that outlived all that was seen."""

TAIL_SIGMA = 1.5
PRIOR_MEDIAN_TOKENS = 220.0
PRIOR_SIGMA = 1.1
"""The prior of an unknown model: chat answers of the public sets have medians of 100-400 tokens, widely spread."""

_LOG_EDGES = np.log(np.maximum(EDGES, 0.5))
_LOG_NEXT = np.log(EDGES + 0.5)  # a length is a whole number: above an edge is what rounds to more than it


def lognormal(median_tokens: float, sigma: float) -> Floats:
    """P(T > edge) of a log-normal length, with the thin tail mixed in. Shape (edges,)."""
    core = _normal_above((_LOG_EDGES - np.log(median_tokens)) / max(sigma, 1e-3))
    tail = _normal_above((_LOG_EDGES - np.log(median_tokens)) / max(TAIL_SIGMA, 1.25 * sigma))
    return finished(core, tail)


def prior() -> Floats:
    """What to believe of a model that nobody has seen."""
    return lognormal(PRIOR_MEDIAN_TOKENS, PRIOR_SIGMA)


def from_counts(counts: Floats) -> Floats:
    """P(T > edge) of a histogram over the grid's buckets (a length T counts in bucket BUCKET[T - 1]).

    ``counts``: (buckets,), non-negative, some positive. The thin tail is as wide as a log-normal at their median.
    """
    below = np.concatenate([[0.0], np.cumsum(counts)])
    core = 1.0 - below / below[-1]
    median = float(EDGES[int(np.searchsorted(-core, -0.5))])
    return finished(core, _normal_above((_LOG_EDGES - np.log(max(median, 1.0))) / TAIL_SIGMA))


def around(residuals: Floats, above: Floats, log_locations: Floats) -> Floats:
    """Rows of one shape at many places: T = exp(location + residual), rounded.

    ``residuals``: (m,) rising knots of log(T) - location; ``above``: (m,) P(residual > knot), linear in between;
    ``log_locations``: (n,). Returns (n, edges).
    """
    z = _LOG_NEXT[None, :] - log_locations[:, None]
    core = np.interp(z, residuals, above, left=1.0, right=0.0)
    return finished(core, _normal_above(z / TAIL_SIGMA))


def finished(core: Floats, tail: Floats) -> Floats:
    """Mix in the tail, start at 1 and end at 0 on the grid, never rise."""
    mixed = (1.0 - TAIL_WEIGHT) * core + TAIL_WEIGHT * tail
    mixed = np.where(EDGES == 0, 1.0, np.where(EDGES >= TOKENS_MAX, 0.0, mixed))
    falling: NDArray[np.float64] = np.minimum.accumulate(mixed, axis=-1)
    return falling


def _normal_above(z: Floats) -> Floats:
    from scipy.special import ndtr

    above: Floats = ndtr(-z)
    return above
