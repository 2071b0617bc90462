"""The one grid of output lengths that all distributions share: 0, 1, 2, ... 32, then eight steps an octave.

A distribution is then one row of numbers, many requests are one table look-up, and a factor is a shift.
"""

import numpy as np
from numpy.typing import NDArray

LINEAR = 32
STEPS_PER_OCTAVE = 8
OCTAVES = 13

EDGES: NDArray[np.int32] = np.unique(
    np.concatenate(
        [
            np.arange(LINEAR + 1),
            np.round(LINEAR * 2.0 ** (np.arange(1, OCTAVES * STEPS_PER_OCTAVE + 1) / STEPS_PER_OCTAVE)),
        ]
    ).astype(np.int32)
)
"""Edges in tokens, rising from 0; the last is the longest output that a distribution can tell of (262,144)."""

TOKENS_MAX = int(EDGES[-1])

BUCKET: NDArray[np.int16] = (
    np.searchsorted(EDGES, np.arange(TOKENS_MAX), side="right").astype(np.int16) - np.int16(1)
)  # fmt: skip
"""For every token count below ``TOKENS_MAX`` the index i with EDGES[i] <= count < EDGES[i + 1]."""

BUCKETS = len(EDGES) - 1
"""Buckets between the edges."""
