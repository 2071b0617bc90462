"""Time is an argument: the wall clock for processes, a manual one for tests and simulation."""

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds that never go back."""

    def now_s(self) -> float: ...


class MonotonicClock:
    """The machine's monotonic clock, the same for every process of this host."""

    def now_s(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that a test moves by hand."""

    def __init__(self, now_s: float = 0.0) -> None:
        self._now_s = now_s

    def now_s(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError("time does not go back")
        self._now_s += seconds
