"""How long will every request of a snapshot go on? The gateway's own have their estimate, others what history says."""

from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from block.core import LengthEstimate, Request
from block.predict.snapshot import EXACT, FLAGS, MAX_TOKENS, OUTPUT, EngineSnapshot

KEPT_S: Final = 0.25
"""For this long an expected total stands while the request stays below it: it moves slowly with the tokens that come."""

Ints = npt.NDArray[np.int32]


class Bank(Protocol):
    """The vectorized side of an estimator (`block.length.distribution.DistributionBank`)."""

    def expected_totals(self, rows: Ints, generated: Ints, caps: Ints) -> Ints: ...

    def quantiles(self, q: float, rows: Ints, generated: Ints, caps: Ints) -> Ints: ...


class Expectations:
    """Estimates of this gateway's requests in flight, by key. Written by dispatch; asked by all instances' evidence.

    ``belief``: requests are taken to end at this quantile (0-1) of what is still possible for each; ``None``: at its mean.
    """

    def __init__(self, estimator: Any) -> None:
        self._estimator = estimator
        self._bank: Bank | None = getattr(estimator, "bank", None)
        self._own: dict[int, Any] = {}
        self.belief: float | None = None

    def __len__(self) -> int:
        return len(self._own)

    def expect(self, key: int, estimate: Any) -> None:
        """A request goes out with this estimate."""
        self._own[key] = (estimate.row, estimate.cap) if self._bank is not None else estimate

    def believed(self, estimate: Any, expected_total: int) -> int:
        """The total output tokens at which a request that begins now is taken to end."""
        return expected_total if self.belief is None else max(1, round(estimate.quantile(self.belief)))

    def forget(self, key: int) -> None:
        """Its answer is over."""
        self._own.pop(key, None)

    def totals(self, rows: Ints, keys: list[int], model: str) -> Ints:
        """Expected total output tokens of requests, above what each has generated. ``rows``: (FIELDS, n) of a snapshot."""
        own, bank = self._own, self._bank
        generated, cap = rows[OUTPUT], rows[MAX_TOKENS]
        foreign = self._foreign(model)
        if bank is None:
            guesses = [self._guess(own.get(key, foreign), int(g)) for key, g in zip(keys, generated, strict=True)]
            totals = np.array(guesses, dtype=np.int32)
        else:
            pair = (foreign.row, foreign.cap)
            pairs = np.array([own.get(key, pair) for key in keys], dtype=np.int32).reshape(len(keys), 2)
            caps = np.maximum(np.minimum(pairs[:, 1], cap), 1)
            if self.belief is None:
                totals = bank.expected_totals(pairs[:, 0], generated, caps)
            else:
                totals = bank.quantiles(self.belief, pairs[:, 0], generated, caps)
        totals = np.where(rows[FLAGS] & EXACT, cap, np.minimum(totals, cap))
        above: Ints = np.maximum(totals, generated + 1).astype(np.int32)
        return above

    def _guess(self, estimate: LengthEstimate, generated: int) -> int:
        if self.belief is None:
            return round(estimate.expected_total(generated))
        return round(estimate.quantile(self.belief, generated))

    def _foreign(self, model: str) -> Any:
        """What to expect of a request that someone else sent."""
        return self._estimator.estimate(Request(id="", arrived_s=0.0, prompt_tokens=1, model=model))


class KeptTotals:
    """The expected totals of one instance's snapshots: looked up anew for a newcomer, an outlived one, and now and then."""

    def __init__(self, expectations: Expectations) -> None:
        self._expectations = expectations
        self._kept: dict[int, int] = {}
        self._until_s = 0.0

    def of(self, snapshot: EngineSnapshot, model: str, now_s: float) -> Ints:
        """As ``Expectations.totals``."""
        keys = snapshot.keys.tolist()
        rows = snapshot.requests
        if now_s < self._until_s:
            kept = self._kept
            totals = np.array([kept.get(key, 0) for key in keys], dtype=np.int32)
            short = np.flatnonzero(totals <= rows[OUTPUT])
            if len(short):  # some are new, some go on for longer than was thought
                which = [keys[n] for n in short.tolist()]
                totals[short] = found = self._expectations.totals(rows[:, short], which, model)
                kept.update(zip(which, found.tolist(), strict=True))
            return totals
        totals = self._expectations.totals(rows, keys, model)
        self._kept, self._until_s = dict(zip(keys, totals.tolist(), strict=True)), now_s + KEPT_S
        return totals
