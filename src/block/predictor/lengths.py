"""How long an engine's requests will be, learned from watching them leave.

A predictor sees no text. A request that was running in one snapshot and is gone in the next has, within a token or
two, the length that it then had; those lengths make a running history, and each running request's total is expected
from it, given what it has generated. A length that the client fixed is what it is.
"""

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from block.core import Request
from block.length.table import make_estimator
from block.predict.snapshot import EXACT, FLAGS, MAX_TOKENS, OUTPUT, SAMPLES_1, SAMPLES_2, EngineSnapshot

Ints = npt.NDArray[np.int32]
_NEARLY = 8  # tokens that a request may have got unseen before it left
SCENARIOS = 9  # lengths that stand for a distribution, each as likely


class LengthHistory:
    """Of one engine; ``watch`` every snapshot in order."""

    def __init__(self, estimator: str = "history") -> None:
        self._estimator = make_estimator(estimator)
        self._epoch: int | None = None
        self._present: dict[int, tuple[int, int]] = {}  # key: (output when last seen, max_tokens), length not fixed
        self.observed = 0

    def watch(self, snapshot: EngineSnapshot) -> None:
        """Learn from what has left since the last snapshot of the same engine process."""
        rows, running = snapshot.requests, snapshot.running
        flags = rows[FLAGS]
        output = rows[OUTPUT] + ((flags & SAMPLES_1) > 0) + ((flags & SAMPLES_2) > 0)
        present = {
            key: (tokens, most)
            for key, tokens, most, exact in zip(
                snapshot.keys.tolist(),
                output.tolist(),
                rows[MAX_TOKENS].tolist(),
                (flags & EXACT).tolist(),
                strict=True,
            )
            if not exact
        }
        if snapshot.epoch == self._epoch and int(snapshot.header["waiting_total"]) <= len(rows[0]) - running:
            for key in self._present.keys() - present.keys():
                tokens, most = self._present[key]
                if 0 < tokens < most - _NEARLY:  # one that was cut off at its bound says too little
                    self._estimator.observe(_unknown(most), tokens)
                    self.observed += 1
        self._epoch, self._present = snapshot.epoch, present

    def totals(self, snapshot: EngineSnapshot) -> Ints:
        """Expected total output tokens of every request in a snapshot, above what it has. Shape (n,)."""
        rows = snapshot.requests
        generated, cap = rows[OUTPUT], np.maximum(rows[MAX_TOKENS], 1)
        row = self._estimator.estimate(_unknown(None)).row
        guess = self._estimator.bank.expected_totals(np.full(len(cap), row, np.int32), generated, cap)
        totals = np.where(rows[FLAGS] & EXACT, cap, np.minimum(guess, cap))
        above: Ints = np.maximum(totals, generated + 1).astype(np.int32)
        return above

    def scenarios(self, max_tokens: int) -> list[int]:
        """Equally likely total lengths of a request of which nothing else is known."""
        estimate = self._estimator.estimate(_unknown(max_tokens))
        return [max(1, round(estimate.quantile((i + 0.5) / SCENARIOS))) for i in range(SCENARIOS)]


def scenarios_of(quantiles: list[tuple[float, int]], max_tokens: int) -> list[int]:
    """Equally likely lengths of a distribution told by (q, tokens) pairs, linear in between and flat outside them.

    Raises:
        ValueError: they do not rise.
    """
    qs, tokens = [q for q, _ in quantiles], [t for _, t in quantiles]
    if any(b <= a for a, b in pairwise(qs)) or any(b < a for a, b in pairwise(tokens)):
        raise ValueError("quantiles must rise")
    middles = (np.arange(SCENARIOS) + 0.5) / SCENARIOS
    return [min(max(1, round(t)), max_tokens) for t in np.interp(middles, qs, tokens).tolist()]


def _unknown(max_tokens: int | None) -> Request:
    return Request(id="", arrived_s=0.0, prompt_tokens=1, max_tokens=max_tokens)
