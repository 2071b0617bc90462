"""How long until there is room, and whether a request can still meet its targets: what is told to those who are refused."""

import math
from collections.abc import Collection
from time import monotonic
from typing import TYPE_CHECKING, Final

from block.core import Decision, Prediction, Slo
from block.gateway.deciding.residuals import Residuals

if TYPE_CHECKING:
    from block.gateway.exchange import Exchange

WAIT_MAX_S: Final = 600.0
REMEMBERED_S: Final = 0.25


class Waits:
    """When the next slots get free: by the predicted ends of the requests in flight, else by the pace of the last ends."""

    def __init__(self) -> None:
        self._ends: list[float] = []
        self._until_s = -math.inf

    def expected_s(self, active: "Collection[Exchange]", ahead: int, finished: Collection[float]) -> float:
        """Seconds until a request behind ``ahead`` others has a slot. ``finished``: times of the last ends, oldest first."""
        now_s = monotonic()
        if now_s > self._until_s:
            self._ends = sorted(
                each.decided_s + each.prediction.e2e_s
                for each in active
                if each.prediction is not None and each.instance
            )
            self._until_s = now_s + REMEMBERED_S
        if ahead < len(self._ends):
            return min(max(self._ends[ahead] - now_s, 0.0), WAIT_MAX_S)
        oldest_s = next(iter(finished), now_s)
        if len(finished) < 2 or now_s <= oldest_s:
            return 1.0
        return min((ahead + 1) * (now_s - oldest_s) / len(finished), WAIT_MAX_S)


def retry_lines(wait_s: float, reason: str) -> bytes:
    """When to come again, in whole seconds for all and in milliseconds for those who read it; and why not now."""
    dropped = "evicted-priority" if reason == "evicted" else f"rejected-{reason.replace('_', '-')}"
    return b"retry-after: %d\r\nretry-after-ms: %d\r\nx-llm-d-request-dropped-reason: %b\r\n" % (
        max(1, math.ceil(wait_s)), max(1, math.ceil(wait_s * 1e3)), dropped.encode(),
    )  # fmt: skip


def shortfall_s(
    slo: Slo, decision: Decision, residuals: Residuals, confidence: float, waited_s: float
) -> float | None:  # fmt: skip
    """By how much the best candidate is expected to miss the targets; ``None``: one meets them, or nobody can tell.

    A prediction is corrected by how wrong its instance's were lately: it shall hold with probability ``confidence``.
    """
    least_s = math.inf
    for candidate in decision.candidates:
        prediction = candidate.prediction
        if prediction is None:
            return None
        rings = residuals.of(candidate.instance)
        miss_s = _miss_s(slo, prediction, rings.ttft.scale(confidence), rings.e2e.scale(confidence), waited_s)
        if miss_s <= 0:
            return None
        least_s = min(least_s, miss_s)
    return least_s if least_s < math.inf else None


def _miss_s(slo: Slo, prediction: Prediction, ttft_scale: float, e2e_scale: float, waited_s: float) -> float:
    miss_s = -math.inf
    if slo.ttft_s is not None:
        miss_s = waited_s + prediction.ttft_s * ttft_scale - slo.ttft_s
    if slo.e2e_s is not None:
        miss_s = max(miss_s, waited_s + prediction.e2e_s * e2e_scale - slo.e2e_s)
    if slo.tpot_s is not None and prediction.tpot_s is not None and prediction.tpot_s * e2e_scale > slo.tpot_s:
        miss_s = max(miss_s, prediction.e2e_s)  # it gets quicker when those that run now are done
    return miss_s
