"""How much work may come: the rate since it last changed, times how much it ever grew within such a time.

*Where it stands.* A mean over an hour is steady but late, one over a minute is soon there but wanders. So at every moment the
longest window that ends there is taken whose mean agrees with those of all shorter ones (Lepski 1991; ADWIN, Bifet and Gavalda
2007, does alike): after a jump that is the last half minute, in a quiet hour the hour. How far two means of the same
traffic differ by chance is measured in the window's past, for every length: where requests come in bunches that nobody can
follow, short windows agree with everything and the hour remains.

*What may follow.* How much more came, at every moment of the past, than the rate then: all moments alike, since what is missed is
decided by a few bursts a day, and of moments that look like now too few came before one. Minutes count by the work in them,
as a request is as likely to meet a busy minute as there are many in it.

Where the window holds a good part of a period (a day) twice, the same is done relative to that rate times the rise one period
before; the answer that was the less wrong (pinball loss) is believed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from block.autoscale.controllers.work import Brought, Work
from block.autoscale.terms import Observation

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
PAST_LEAST = 20
"""Past moments needed to answer by."""
SEASON_PART = 3
"""Of a period one part in so many must lie one period back for the season to be asked."""
ALLOWANCE = 1.25
"""Multiplies the level while there is no past to answer by."""
EACH_PART = 0.25
"""What a request brings is a mean over this part of ``base_s``."""
AGREE = 4.0
"""Two means agree if they differ by no more than so many standard deviations."""
RISE_MOST, SMOOTH = 20.0, 10
JUDGED_PART = 0.05
"""Answers are compared by the rate above which this part of the work came."""
GROWN = 0.02
"""Growths are told apart in steps of so much (logarithm)."""


class Forecast(NamedTuple):
    """Rates are in seconds of work a second. ``rates``: (n,) of minutes that may come, ``weights``: (n,) of each, adding up to 1.
    ``level``: that of the last minute; ``base``: since it last changed; ``by``: "past", "season" or, too early, "level"."""

    rates: Floats
    weights: Floats
    level: float
    base: float
    by: str

    def exceeded_by(self, part: float) -> float:
        """The rate above which no more than this part of the work comes."""
        return exceeded_by(self.rates, self.weights, part)


class Course(NamedTuple):
    """(steps,) arrays that end now: the rate of work, its mean over a minute and since it last changed; the period in steps."""

    rates: Floats
    level: Floats
    base: Floats
    period: int

    def risen(self, moments: Ints, leads: Ints) -> Floats:
        """(leads, moments): the base times how the rate (over ``SMOOTH`` steps around) rose above it one period before."""
        smooth = moving_mean(self.rates, SMOOTH)
        then = moments - self.period
        rise = smooth[np.minimum(then + leads[:, None] + SMOOTH // 2, len(smooth) - 1)] / self.base[then]
        return np.asarray(self.base[moments] * np.clip(rise, 1 / RISE_MOST, RISE_MOST))


class Forecaster:
    """Makes forecasts from windows. ``level_s``: rates are means over so long; ``base_s``: the longest mean; ``period_s``: the
    season's length."""

    def __init__(
        self, work: Work, *, level_s: float = 60.0, base_s: float = 3600.0, period_s: float = 86_400.0
    ) -> None:
        self._brought, self._base_s, self._period_s = Brought(work), base_s, period_s
        self.step_s = level_s / 2

    def course(self, window: Sequence[Observation]) -> Course:
        """The window's work on an even grid that ends now, once for all questions of a decision."""
        at_s, requests, brought = self._brought.of(window)
        come, work = on_grid(at_s, requests, self.step_s), on_grid(at_s, brought, self.step_s)
        # How long requests are wanders about its mean from minute to minute, however many there are: a rush of short ones is one
        # of usual ones soon. So requests are counted by the minute, and what each brings is a mean over longer.
        each = max(round(self._base_s * EACH_PART / self.step_s), 2)
        usual_s = max(float(work.sum()) / max(float(come.sum()), 1e-9), 1e-9)
        each_s = (moving_mean(work, each) + 1e-9 * usual_s) / (moving_mean(come, each) + 1e-9)
        widest = max(round(self._base_s / self.step_s), 2)
        since = since_change(come * self.step_s, widest) / self.step_s
        # No less than a request in the longest window, so that growth is told relative to something.
        base = np.maximum(since, 1 / self._base_s) * each_s
        rates = come * each_s
        return Course(rates, moving_mean(rates, 2), base, round(self._period_s / self.step_s))

    def tell(self, course: Course, from_s: float, to_s: float) -> Forecast:
        """The minutes that may begin between ``from_s`` and ``to_s`` from now (0 <= from_s <= to_s)."""
        first, last = round(from_s / self.step_s), round(to_s / self.step_s)
        leads = np.arange(first, last + 1) + 2  # a mean over two steps is known at its end
        now, level, base = len(course.level) - 1, float(course.level[-1]), float(course.base[-1])
        count = now + 1 - leads[-1]  # moments whose future is known
        if count < PAST_LEAST:
            return Forecast(np.array([level * ALLOWANCE]), np.ones(1), level, base, "level")
        moments, here = np.arange(count), np.full(len(leads), base)
        came = course.level[moments + leads[:, None]]
        expected = np.broadcast_to(course.base[moments], came.shape)
        by = "past"
        if count - course.period >= max(course.period // SEASON_PART, PAST_LEAST):
            later = moments[course.period :]
            seasoned = course.risen(later, leads)
            if _wrong(came[-1, later], seasoned[-1]) < _wrong(came[-1, later], expected[-1, later]):
                came, expected, by = came[:, later], seasoned, "season"
                here = course.risen(np.array([now]), leads)[:, 0]
        rates, weights = _grown(came, expected, here)
        return Forecast(rates, weights, level, base, by)


def since_change(come: Floats, widest: int) -> Floats:
    """(steps,) requests of each step -> at each step their mean over the longest window, up to ``widest`` steps, that ends there
    and agrees with all shorter ones."""
    widths = sorted({max(round(widest / 2**power), 1) for power in range(widest.bit_length() + 1)})
    means = [moving_mean(come, width) for width in widths]
    spread = [AGREE * np.sqrt(dispersion(mean, width)) for mean, width in zip(means, widths, strict=True)]
    since, agree = means[0].copy(), np.ones(len(come), np.bool_)
    for number in range(1, len(widths)):
        chance = np.sqrt(means[number])
        for shorter in range(number):
            differ = spread[shorter] * (1 / widths[shorter] - 1 / widths[number]) ** 0.5
            agree &= np.abs(means[number] - means[shorter]) <= differ * chance
        since[agree] = means[number][agree]
    return since


def dispersion(mean: Floats, width: int) -> float:
    """Variance of counts over ``width`` steps relative to that of a Poisson process, at least 1, from how neighbours differ.

    ``mean``: (steps,) counts a step, each a mean over ``width``.
    """
    before, after = mean[width - 1 : -width], mean[2 * width - 1 :]
    total = float((before + after).sum())
    return max(width * float(((after - before) ** 2).sum()) / total, 1.0) if total > 0 else 1.0


def _grown(came: Floats, expected: Floats, here: Floats) -> tuple[Floats, Floats]:
    """(leads, moments) rates that came and were expected, (leads,) rates expected now -> rates that may come, their weights."""
    powers = np.rint((np.log(np.maximum(came, 1e-9) / expected) + np.log(here)[:, None]) / GROWN).astype(np.int64)
    lowest = int(powers.min())
    weights = np.bincount((powers - lowest).ravel(), weights=came.ravel())
    some = np.flatnonzero(weights)
    if len(some) == 0:
        return np.zeros(1), np.ones(1)
    return np.exp(GROWN * (some + lowest)), weights[some] / weights.sum()


def _wrong(came: Floats, expected: Floats) -> float:
    """Pinball loss of saying by how much what is expected is exceeded in ``JUDGED_PART`` of the work."""
    over = came - expected * exceeded_by(came / expected, came, JUDGED_PART)
    return float(np.mean(np.maximum((1 - JUDGED_PART) * over, -JUDGED_PART * over)))


def exceeded_by(ratios: Floats, weights: Floats, part: float) -> float:
    """The ratio above which no more than this part of the weights lies."""
    order = np.argsort(ratios, axis=None)[::-1]
    above = np.cumsum(weights.ravel()[order])
    place = int(np.searchsorted(above, part * above[-1], side="right"))
    return float(ratios.ravel()[order[min(place, len(order) - 1)]])


def on_grid(at_s: Floats, brought: Floats, step_s: float) -> Floats:
    """(n,) ends of intervals and the work in each -> rates on steps of ``step_s`` that end with the newest observation; on one
    shorter step where all of them together are.

    An interval that nobody saw is taken to be like the one before.
    """
    spans_s = np.diff(at_s, prepend=at_s[0] - (at_s[1] - at_s[0] if len(at_s) > 1 else step_s))
    spans_s = np.maximum(spans_s, 1e-6)
    rates = brought / spans_s
    known = np.flatnonzero(np.isfinite(rates))
    if len(known) == 0:
        return np.zeros(1)
    filled = np.maximum.accumulate(np.where(np.isfinite(rates), np.arange(len(rates)), known[0]))
    total = np.concatenate(([0.0], np.cumsum(rates[filled] * spans_s)))
    ends_s = np.concatenate(([0.0], np.cumsum(spans_s)))
    count = max(int(ends_s[-1] / step_s + 1e-6), 1)
    grid_s = ends_s[-1] - step_s * np.arange(count, -1, -1)
    return np.asarray(np.diff(np.interp(grid_s, ends_s, total)) / min(step_s, float(ends_s[-1])))


def moving_mean(values: Floats, width: int) -> Floats:
    """Mean of each value and the ``width - 1`` before it (of those there are)."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))
