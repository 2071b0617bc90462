"""Whether this machine keeps up with the engine that it emulates."""

from collections import deque
from typing import Any, Final

import msgspec

KEPT: Final = 10_000
LATE_S: Final = 0.002  # a step that is this late shows in a client's latencies


class LatenessSummary(msgspec.Struct, frozen=True):
    """Seconds by which steps were late, over the last ``KEPT`` steps (``max`` and ``steps`` over all)."""

    steps: int
    p50_s: float | None
    p99_s: float | None
    max_s: float | None
    late_fraction: float | None


class Lateness:
    """Actual minus due times of steps: when the last token of a step was handed over, and when it should have been."""

    def __init__(self, histogram: Any) -> None:
        self._histogram = histogram
        self._recent: deque[float] = deque(maxlen=KEPT)
        self._steps = 0
        self._max_s = 0.0

    def observe(self, late_s: float) -> None:
        self._steps += 1
        self._recent.append(late_s)
        self._max_s = max(self._max_s, late_s)
        self._histogram.observe(late_s)

    def summary(self) -> LatenessSummary:
        if not self._recent:
            return LatenessSummary(0, None, None, None, None)
        ordered = sorted(self._recent)
        late = sum(1 for s in ordered if s > LATE_S)
        last = len(ordered) - 1
        return LatenessSummary(
            self._steps, ordered[last // 2], ordered[round(last * 0.99)], self._max_s, late / len(ordered)
        )
