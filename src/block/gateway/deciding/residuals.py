"""How wrong the predictions were lately, per instance: an interval around the next one, and whether those held.

Theory of operation. A prediction is a point; what is measured is that point times some ratio. The last ``KEPT`` ratios of
an instance are kept, and the interval of a new prediction is the prediction times two of their quantiles (split conformal
prediction: Vovk et al. 2005; with lengths, conformalized quantile regression: Romano et al. 2019). Nothing is assumed about
how the model errs, only that it will err as it did. So that the promised share lies inside even while that changes, the
quantiles move: every miss widens the next intervals, every hit narrows them a little (adaptive conformal inference: Gibbs
and Candès 2021, step ``GAIN``).

TTFT hardly depends on how long the answer gets; E2E mostly does. Its ratios are therefore not taken to the point but to the
E2E of a short and of a long answer, at the quantiles of the request's own length distribution: a request that may have ten
tokens at most gets a narrow interval, whatever others got.

Costs: one write into a ring an answer, one sort of a ring per ``EVERY`` answers, a few multiplications a decision.
"""

import math
from typing import Final

import msgspec

from block.core import InstanceId, LengthEstimate, Prediction
from block.length.distribution import EXACT, Estimate

KEPT: Final = 256
LEAST: Final = 24
"""Ratios before there are intervals; those of all instances together stand in for an instance that has fewer."""
EVERY: Final = 16
GAIN: Final = 0.01
LENGTHS_MAX: Final = 4096
LENGTHS_FOR_S: Final = 2.0
INSTANCES_MAX: Final = 4096
_FLOOR_S: Final = 1e-4
"""Predictions below it are taken as it: no clock here tells them apart."""


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """Where the measured TTFT and E2E of a request will lie with probability ``level``. Seconds from the decision.

    ``None``: too few answers were measured to say. ``short_e2e_s`` and ``long_e2e_s`` are the model's own E2E of a short and
    a long answer, before correction.
    """

    level: float
    short_e2e_s: float
    long_e2e_s: float
    ttft_low_s: float | None = None
    ttft_high_s: float | None = None
    e2e_low_s: float | None = None
    e2e_high_s: float | None = None


class Ring:
    """The last ratios of one quantity at one instance. ``note`` is the only change."""

    __slots__ = (
        "_alpha",
        "_factors",
        "_held",
        "_highs",
        "_issued",
        "_kept",
        "_lows",
        "_ratios",
        "_scale",
        "count",
        "last_s",
        "miss",
    )

    def __init__(self, level: float, kept: int = KEPT) -> None:
        self.miss = 1.0 - level
        """The share that may lie outside."""
        self.count = 0
        """Ratios noted ever."""
        self.last_s: float | None = None
        """When the last one was noted."""
        self._kept = kept
        self._alpha = self.miss
        self._ratios: list[float] = []
        self._lows: list[float] = []
        self._highs: list[float] = []
        self._held: list[bool] = []
        self._issued = 0
        self._factors: tuple[float, float] | None = None
        self._scale: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self._ratios)

    def note(self, ratio: float, low: float, high: float, now_s: float) -> None:
        """One measurement over its prediction, over the prediction's low end, over its high end."""
        if len(self._ratios) < self._kept:
            self._ratios.append(ratio)
            self._lows.append(low)
            self._highs.append(high)
        else:
            at = self.count % self._kept
            self._ratios[at], self._lows[at], self._highs[at] = ratio, low, high
        self.count += 1
        self.last_s = now_s
        if self.count % EVERY == 0 or self.count == LEAST:
            self._factors = self._scale = None

    def judge(self, held: bool) -> None:
        """Whether an interval that was issued from this ring held."""
        if len(self._held) < self._kept:
            self._held.append(held)
        else:
            self._held[self._issued % self._kept] = held
        self._issued += 1
        self._alpha = min(max(self._alpha + GAIN * (self.miss - (not held)), 0.002), 0.6)

    def factors(self) -> tuple[float, float] | None:
        """What to multiply the low and the high end of a prediction by; ``None``: too few ratios."""
        count = len(self._ratios)
        if count < LEAST:
            return None
        if self._factors is None:
            tail = self._alpha / 2 * (count + 1)
            lows, highs = sorted(self._lows), sorted(self._highs)
            low, high = lows[max(math.floor(tail) - 1, 0)], highs[min(math.ceil(count + 1 - tail) - 1, count - 1)]
            self._factors = low, high
        return self._factors

    def scale(self, q: float) -> float:
        """What a prediction is to be multiplied by to hold with probability ``q``; 1 while there are too few ratios."""
        if len(self._ratios) < LEAST:
            return 1.0
        if self._scale is None or self._scale[0] != q:
            self._scale = q, self.quantile(q) or 1.0
        return self._scale[1]

    def quantile(self, q: float) -> float | None:
        """The q-quantile (0-1) of measured over predicted; ``None``: nothing measured. Sorts: not for every request."""
        ratios = sorted(self._ratios)
        return ratios[min(int(q * len(ratios)), len(ratios) - 1)] if ratios else None

    def newest(self, most: int) -> list[float]:
        """Up to ``most`` ratios of measured over predicted, the newest last."""
        if len(self._ratios) < self._kept:
            return self._ratios[-most:]
        at = self.count % self._kept
        return (self._ratios[at:] + self._ratios[:at])[-most:]

    @property
    def judged(self) -> int:
        """Intervals that are counted in ``coverage``."""
        return len(self._held)

    @property
    def coverage(self) -> float | None:
        """The share of the last intervals that held; ``None``: none was issued yet."""
        return sum(self._held) / len(self._held) if self._held else None


class InstanceResiduals:
    """Both quantities of one instance."""

    __slots__ = ("e2e", "ttft")

    def __init__(self, level: float) -> None:
        self.ttft, self.e2e = Ring(level), Ring(level)


class Residuals:
    """Of all instances of one gateway. ``interval`` at every decision, ``observe`` at the end of every answer."""

    def __init__(self, level: float = 0.9) -> None:
        self.level = level
        self.everyone = InstanceResiduals(level)
        self.instances: dict[InstanceId, InstanceResiduals] = {}
        self._lengths = ShortAndLong(level)

    def of(self, instance: InstanceId) -> InstanceResiduals:
        """One instance's."""
        found = self.instances.get(instance)
        if found is None:
            found = InstanceResiduals(self.level)
            if len(self.instances) < INSTANCES_MAX:
                self.instances[instance] = found
        return found

    def forget(self, instance: InstanceId) -> None:
        """It left."""
        self.instances.pop(instance, None)

    def interval(
        self, instance: InstanceId, prediction: Prediction, estimate: LengthEstimate | None, expected_total: int,
        now_s: float,
    ) -> Interval:  # fmt: skip
        """Around one prediction. ``estimate``: of its length, ``None`` where the length is known to be ``expected_total``."""
        ttft_s, e2e_s, tpot_s = prediction.ttft_s, prediction.e2e_s, prediction.tpot_s
        short_s = long_s = e2e_s
        if estimate is not None and tpot_s:
            short, long = self._lengths.of(estimate, now_s)
            short_s = max(e2e_s - tpot_s * (expected_total - short), ttft_s) if short < expected_total else e2e_s
            long_s = e2e_s + tpot_s * (long - expected_total) if long > expected_total else e2e_s
        own = self.instances.get(instance)
        ttft = self._factors("ttft", own)
        e2e = self._factors("e2e", own)
        return Interval(
            level=self.level, short_e2e_s=short_s, long_e2e_s=long_s,
            ttft_low_s=ttft_s * ttft[0] if ttft else None, ttft_high_s=ttft_s * ttft[1] if ttft else None,
            e2e_low_s=short_s * e2e[0] if e2e else None, e2e_high_s=long_s * e2e[1] if e2e else None,
        )  # fmt: skip

    def _factors(self, what: str, own: InstanceResiduals | None) -> tuple[float, float] | None:
        found: tuple[float, float] | None = None if own is None else getattr(own, what).factors()
        return found or getattr(self.everyone, what).factors()

    def observe(
        self, instance: InstanceId, prediction: Prediction, interval: Interval | None, *,
        ttft_s: float | None, e2e_s: float | None, now_s: float,
    ) -> None:  # fmt: skip
        """What was measured, from the decision on; ``None``: it could not be. Truncated predictions teach nothing."""
        if prediction.truncated:
            return
        own = self.of(instance)
        if ttft_s is not None:
            ratio = max(ttft_s, _FLOOR_S) / max(prediction.ttft_s, _FLOOR_S)
            low, high = (None, None) if interval is None else (interval.ttft_low_s, interval.ttft_high_s)
            for ring in (own.ttft, self.everyone.ttft):
                ring.note(ratio, ratio, ratio, now_s)
                if low is not None and high is not None:
                    ring.judge(low <= ttft_s <= high)
        if e2e_s is not None:
            measured_s = max(e2e_s, _FLOOR_S)
            ratio = measured_s / max(prediction.e2e_s, _FLOOR_S)
            short, long, low, high = ratio, ratio, None, None
            if interval is not None:
                short = measured_s / max(interval.short_e2e_s, _FLOOR_S)
                long = measured_s / max(interval.long_e2e_s, _FLOOR_S)
                low, high = interval.e2e_low_s, interval.e2e_high_s
            for ring in (own.e2e, self.everyone.e2e):
                ring.note(ratio, short, long, now_s)
                if low is not None and high is not None:
                    ring.judge(low <= e2e_s <= high)


class ShortAndLong:
    """Two quantiles of length distributions, remembered per distribution for a moment: they cost more than a decision."""

    def __init__(self, level: float) -> None:
        self._low, self._high = (1 - level) / 2, (1 + level) / 2
        self._known: dict[int, tuple[float, float, float]] = {}

    def of(self, estimate: LengthEstimate, now_s: float) -> tuple[float, float]:
        """(short, long) total output tokens."""
        if not isinstance(estimate, Estimate):
            return estimate.quantile(self._low), estimate.quantile(self._high)
        row, cap = estimate.row, float(estimate.cap)
        if row == EXACT:
            return cap, cap
        short, long, until_s = self._known.get(row, (0.0, 0.0, 0.0))
        if now_s > until_s:
            whole = Estimate(estimate.bank, row)  # without this request's cap
            short, long = whole.quantile(self._low), whole.quantile(self._high)
            if len(self._known) >= LENGTHS_MAX:
                self._known.clear()
            self._known[row] = short, long, now_s + LENGTHS_FOR_S
        return min(short, cap), min(long, cap)
