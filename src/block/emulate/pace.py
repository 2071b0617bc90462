"""The engine's time: the monotonic clock, less the pauses."""

from block.clock import Clock


class PausableClock:
    """Seconds that run with another clock except while paused: after a hang the engine goes on where it was."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lost_s = 0.0
        self._paused_at_s: float | None = None

    @property
    def paused(self) -> bool:
        return self._paused_at_s is not None

    def now_s(self) -> float:
        at_s = self._clock.now_s() if self._paused_at_s is None else self._paused_at_s
        return at_s - self._lost_s

    def pause(self) -> None:
        if self._paused_at_s is None:
            self._paused_at_s = self._clock.now_s()

    def resume(self) -> None:
        if self._paused_at_s is not None:
            self._lost_s += self._clock.now_s() - self._paused_at_s
            self._paused_at_s = None

    def under_s(self, at_s: float) -> float:
        """The time of the clock below at which this one will show ``at_s``, if it is not paused till then."""
        return at_s + self._lost_s
