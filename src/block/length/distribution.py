"""Distributions over output lengths: survival functions on one shared grid, kept as rows of one bank.

Theory of operation. The output length T is a whole number of tokens. A row holds S(x) = P(T > x) at the grid's
edges, linear between them, and J(x), the sum of S over all whole numbers from x on. Then, for a request that has
generated g tokens and goes on, and can have ``cap`` at most,

    E[min(T, cap) | T > g] = g + (J(g) - J(cap)) / S(g)          (the mean residual life of survival analysis)
    P(T <= x | T > g)      = 1 - S(x) / S(g)

Both are look-ups: the cost depends neither on g nor on the distribution. J is summed from the far end, so that it
keeps its relative precision where S is tiny, and rows are made with a thin tail that ends with the grid and not
before (`block.length.shapes`): a request that outlives its estimate is estimated anew from what is left, not patched.

A gateway asks about all requests of a snapshot at once; `DistributionBank.expected_totals` answers for arrays of
(row, tokens generated, cap). Row ``EXACT`` is no distribution but a number: the cap itself.
"""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from block.length.grid import BUCKET, EDGES, TOKENS_MAX

EXACT = 0
"""The row of a length that is known (an oracle's, or one that the client fixed): it is the request's cap."""

OUTLIVED_TOKENS = 10
"""What a known length that was wrong is raised by when it is passed (the rule of Block's prototype)."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]
Functional = Literal["mean", "p30", "median", "p70", "sampled"]
FUNCTIONALS: dict[Functional, float | None] = {"mean": None, "p30": 0.3, "median": 0.5, "p70": 0.7, "sampled": None}
"""What one number to take from a distribution, and the quantile that it is, if it is one."""

_EDGES = EDGES.astype(np.float64)
_LAST = TOKENS_MAX - 1
_TINY = 1e-300  # keeps 0/0 of a row without a tail from being a NaN


class DistributionBank:
    """Rows of survival functions, asked about many requests at once.

    Owned by one estimator, which adds and replaces rows; everyone else reads. Not for several threads.
    """

    def __init__(self) -> None:
        self._survival = np.zeros((8, len(EDGES)))
        self._tail = np.zeros((8, len(EDGES)))
        self._rows = 0
        self.extend(np.where(EDGES < TOKENS_MAX, 1.0, 0.0)[None, :])  # EXACT

    def __len__(self) -> int:
        return self._rows

    @property
    def nbytes(self) -> int:
        """Memory of the rows."""
        return self._survival.nbytes + self._tail.nbytes

    def add(self, survival: Floats) -> int:
        """Append a row and return its index. ``survival``: (edges,), P(T > edge), 1 at edge 0, never rising."""
        return self.extend(survival[None, :])

    def extend(self, survivals: Floats) -> int:
        """Append rows, shape (n, edges), and return the index of the first."""
        first, needed = self._rows, self._rows + len(survivals)
        if needed > len(self._survival):
            grown = max(needed - len(self._survival), len(self._survival) // 8, 8)
            more = np.zeros((grown, len(EDGES)))
            self._survival, self._tail = np.vstack([self._survival, more]), np.vstack([self._tail, more])
        self._rows = needed
        self._survival[first:needed] = survivals
        self._tail[first:needed] = _tail_sums(survivals)
        return first

    def replace(self, row: int, survival: Floats) -> None:
        """Overwrite a row: what refers to it means the new distribution from then on."""
        self._survival[row] = survival
        self._tail[row] = _tail_sums(survival[None, :])[0]

    def survival(self, row: int) -> Floats:
        """A copy of P(T > edge) of a row, shape (edges,)."""
        copied: Floats = self._survival[row].copy()
        return copied

    def expected_totals(self, rows: Ints, generated: Ints, caps: Ints) -> Ints:
        """Expected total output tokens, above ``generated``, of n requests that go on. All shapes (n,)."""
        g = np.minimum(generated, _LAST)
        cap = np.minimum(np.maximum(caps, g + 1), _LAST)
        survival, tail = self._at(rows, g)
        residual = (tail - self._at(rows, cap)[1]) / np.maximum(survival, _TINY)
        totals = np.where(rows == EXACT, _known(caps, generated), np.minimum(g + residual, cap))
        whole: Ints = np.maximum(np.rint(totals), generated + 1.0).astype(np.int32)
        return whole

    def expected_total(self, row: int, generated: int, cap: int) -> float:
        """The same for one request, unrounded."""
        if row == EXACT:
            return float(cap if generated < cap else generated + OUTLIVED_TOKENS)
        g = min(generated, _LAST)
        cap = min(max(cap, g + 1), _LAST)
        survival, tail = self._at_one(row, g)
        residual = (tail - self._at_one(row, cap)[1]) / max(survival, _TINY)
        return max(min(g + residual, float(cap)), generated + 1.0)

    def quantiles(self, q: float | Floats, rows: Ints, generated: Ints, caps: Ints) -> Ints:
        """The q-quantiles (0-1) of the total output tokens given that they are above ``generated``. Shapes (n,)."""
        g = np.minimum(generated, _LAST)
        target = self._at(rows, g)[0] * (1.0 - q)
        low, high = np.zeros(len(rows), dtype=np.intp), np.full(len(rows), len(EDGES) - 1)
        while np.any(high - low > 1):  # the bucket where the survival function falls to the target
            middle = (low + high) // 2
            above = self._survival[rows, middle] > target
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        s_low, s_high = self._survival[rows, low], self._survival[rows, low + 1]
        into = np.clip((s_low - target) / np.maximum(s_low - s_high, _TINY), 0.0, 1.0)
        x = np.minimum(np.ceil(_EDGES[low] + into * (_EDGES[low + 1] - _EDGES[low]) - 1e-9), caps)
        x = np.maximum(np.where(rows == EXACT, _known(caps, generated), x), generated + 1.0)
        whole: Ints = x.astype(np.int32)
        return whole

    def quantile(self, q: float, row: int, generated: int, cap: int) -> float:
        """The same for one request, in a hundredth of the time."""
        if row == EXACT:
            return float(max(cap if generated < cap else generated + OUTLIVED_TOKENS, generated + 1))
        survival = self._survival[row]
        at = survival.item
        target = (self._at_one(row, min(generated, _LAST))[0] if generated > 0 else 1.0) * (1.0 - q)
        low, high = 0, len(EDGES) - 1
        while high - low > 1:
            middle = (low + high) >> 1
            if at(middle) > target:
                low = middle
            else:
                high = middle
        s_low, s_high = at(low), at(low + 1)
        into = min(max((s_low - target) / max(s_low - s_high, _TINY), 0.0), 1.0)
        left, right = _EDGES.item(low), _EDGES.item(low + 1)
        return float(max(min(math.ceil(left + into * (right - left) - 1e-9), cap), generated + 1))

    def totals(
        self, functional: Functional, rows: Ints, generated: Ints, caps: Ints, rng: np.random.Generator | None = None
    ) -> Ints:
        """One number per request by name: mean, median, P70 or a random draw (needs ``rng``). Shapes (n,)."""
        if functional == "mean":
            return self.expected_totals(rows, generated, caps)
        q = FUNCTIONALS[functional]
        if q is not None:
            return self.quantiles(q, rows, generated, caps)
        if rng is None:
            raise ValueError("sampled lengths need an rng")
        return self.quantiles(rng.random(len(rows)), rows, generated, caps)

    def above(self, row: int, x: Ints) -> Floats:
        """P(T > x) of one row, for scores and pictures. ``x``: (n,) whole tokens."""
        return self._at(np.full(len(x), row, dtype=np.int32), np.minimum(x, _LAST))[0]

    def _at_one(self, row: int, x: int) -> tuple[float, float]:
        b = BUCKET.item(x)
        low, high = EDGES.item(b), EDGES.item(b + 1)
        s_low, s_high = self._survival.item(row, b), self._survival.item(row, b + 1)
        s = s_high + (s_low - s_high) * (high - x) / (high - low)
        return s, self._tail.item(row, b + 1) + 0.5 * ((high - x) * (s + s_high) + s - s_high)

    def _at(self, rows: Ints, x: Ints) -> tuple[Floats, Floats]:
        """S(x) and J(x), x whole numbers below ``TOKENS_MAX``."""
        b = BUCKET[x]
        high = _EDGES[b + 1]
        s_low, s_high = self._survival[rows, b], self._survival[rows, b + 1]
        s = s_high + (s_low - s_high) * (high - x) / (high - _EDGES[b])
        return s, self._tail[rows, b + 1] + 0.5 * ((high - x) * (s + s_high) + s - s_high)


class Estimate:
    """One request's distribution: a row of a bank and the cap of its output. A `core.LengthEstimate`."""

    __slots__ = ("bank", "cap", "row", "source")

    def __init__(self, bank: DistributionBank, row: int, cap: int = TOKENS_MAX, source: str = "") -> None:
        self.bank, self.row, self.cap, self.source = bank, row, max(1, min(cap, TOKENS_MAX)), source

    def expected_total(self, generated: int) -> float:
        """Expected total output tokens given that ``generated`` came and it goes on; above ``generated``."""
        return self.bank.expected_total(self.row, max(generated, 0), self.cap)

    def quantile(self, q: float, generated: int = 0) -> float:
        """The q-quantile (0-1) of the total output tokens given that it outlived ``generated``."""
        return self.bank.quantile(q, self.row, max(generated, 0), self.cap)

    def capped(self, max_tokens: int | None = None, context_left: int | None = None) -> "Estimate":
        """The same distribution cut at the client's ``max_tokens`` and the tokens left in the context."""
        cap = min(self.cap, *(limit for limit in (max_tokens, context_left) if limit is not None), TOKENS_MAX)
        return self if cap == self.cap else Estimate(self.bank, self.row, cap, self.source)

    def __repr__(self) -> str:
        p10, p50, p90 = (int(self.quantile(q)) for q in (0.1, 0.5, 0.9))
        return f"Estimate({p10}-{p50}-{p90} tokens, cap {self.cap}, {self.source or 'row'} {self.row})"


def _known(caps: Ints, generated: Ints) -> Ints:
    return np.where(generated < caps, caps, generated + np.int32(OUTLIVED_TOKENS))


def _tail_sums(survivals: Floats) -> Floats:
    """J at the edges: sums of S over the whole numbers from each edge on, S linear in between. Shapes (n, edges)."""
    s_low, s_high = survivals[:, :-1], survivals[:, 1:]
    sums = 0.5 * (np.diff(_EDGES) * (s_low + s_high) + s_low - s_high)
    tail = np.zeros_like(survivals, dtype=np.float64)
    tail[:, :-1] = np.cumsum(sums[:, ::-1], axis=1)[:, ::-1]
    return tail
