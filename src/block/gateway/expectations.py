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


class Expectations:
    """Estimates of this gateway's requests in flight, by key. Written by dispatch; asked by all instances' evidence."""

    def __init__(self, estimator: Any) -> None:
        self._estimator = estimator
        self._bank: Bank | None = getattr(estimator, "bank", None)
        self._own: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._own)

    def expect(self, key: int, estimate: Any) -> None:
        """A request goes out with this estimate."""
        self._own[key] = (estimate.row, estimate.cap) if self._bank is not None else estimate

    def forget(self, key: int) -> None:
        """Its answer is over."""
        self._own.pop(key, None)

    def totals(self, snapshot: EngineSnapshot, keys: list[int], model: str) -> Ints:
        """Expected total output tokens of every request in a snapshot, above what it has generated. Shape (n,)."""
        rows, own, bank = snapshot.requests, self._own, self._bank
        generated, cap = rows[OUTPUT], rows[MAX_TOKENS]
        foreign = self._foreign(model)
        if bank is None:
            guesses = [_expected(own.get(key, foreign), int(g)) for key, g in zip(keys, generated, strict=True)]
            totals = np.array(guesses, dtype=np.int32)
        else:
            pair = (foreign.row, foreign.cap)
            pairs = np.array([own.get(key, pair) for key in keys], dtype=np.int32).reshape(len(keys), 2)
            totals = bank.expected_totals(pairs[:, 0], generated, np.maximum(np.minimum(pairs[:, 1], cap), 1))
        totals = np.where(rows[FLAGS] & EXACT, cap, np.minimum(totals, cap))
        above: Ints = np.maximum(totals, generated + 1).astype(np.int32)
        return above

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
        if now_s < self._until_s:
            kept = self._kept
            totals = np.array([kept.get(key, 0) for key in keys], dtype=np.int32)
            if bool((totals > snapshot.requests[OUTPUT]).all()):
                return totals
        totals = self._expectations.totals(snapshot, keys, model)
        self._kept, self._until_s = dict(zip(keys, totals.tolist(), strict=True)), now_s + KEPT_S
        return totals


def _expected(estimate: LengthEstimate, generated: int) -> int:
    return round(estimate.expected_total(generated))
