"""How much work may come: what came next, whenever the past looked like now.

The window answers by its own past (an analog forecast). Every past moment is described by how far its level (the mean rate of
work over a minute) stood from its base (the mean over an hour), and by how restless that hour was; the ``NEAR`` moments most
like now are taken, and the minutes that came after each, relative to its base, are what may come now. Nothing is assumed of
the traffic: bursts that end, bunches that nobody can follow, and a quiet service are told apart by what they did. Minutes
count by the work in them, as a request is as likely to meet a busy minute as there are many in it.

Where the window holds a period (a day), the same is done relative to the base times the rise one period before; the answer that was
the less wrong for these moments (pinball loss) is believed.
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
PAST_PART, NEAR = 7, 400
"""Of the past moments one in so many is taken for alike, at most ``NEAR``."""
CALMEST = 0.02
"""Hours calmer than this (root mean square of level / base - 1) are equally calm."""
ALLOWANCE = 1.25
"""Multiplies the level while there is no past to answer by."""
EACH_PART = 0.25
"""What a request brings is a mean over this part of ``base_s``."""
RISE_MOST, SMOOTH = 20.0, 10
JUDGED_PART = 0.05
"""Answers are compared by the rate above which this part of the work came."""


class Forecast(NamedTuple):
    """Rates are in seconds of work a second. ``rates``: (n,) of minutes that may come, ``weights``: (n,) of each, adding up to 1.
    ``level``: that of the last minute; ``base``: of the last hour; ``by``: "past", "season" or, too early for both, "level"."""

    rates: Floats
    weights: Floats
    level: float
    base: float
    by: str

    def exceeded_by(self, part: float) -> float:
        """The rate above which no more than this part of the work comes."""
        return exceeded_by(self.rates, self.weights, part)


class Forecaster:
    """Makes forecasts from windows. ``level_s``: rates are means over so long; ``base_s``: and are told relative to a mean over
    so long; ``period_s``: the season's length."""

    def __init__(
        self, work: Work, *, level_s: float = 60.0, base_s: float = 3600.0, period_s: float = 86_400.0
    ) -> None:
        self._brought, self._base_s, self._period_s = Brought(work), base_s, period_s
        self.step_s = level_s / 2

    def course(self, window: Sequence[Observation]) -> "Course":
        """The window's work on an even grid that ends now, once for all questions of a decision."""
        at_s, requests, brought = self._brought.of(window)
        come, work = on_grid(at_s, requests, self.step_s), on_grid(at_s, brought, self.step_s)
        # How long requests are wanders about its mean from minute to minute, however many there are: a rush of short ones is one
        # of usual ones soon. So requests are counted by the minute, and what each brings is a mean over longer.
        width = max(round(self._base_s * EACH_PART / self.step_s), 2)
        rates = come * moving_mean(work, width) / np.maximum(moving_mean(come, width), 1e-9)
        level, base = moving_mean(rates, 2), moving_mean(rates, max(round(self._base_s / self.step_s), 2))
        base = np.maximum(base, 1e-9)
        away = level / base
        restless = np.sqrt(moving_mean((away - 1) ** 2, max(round(self._base_s / self.step_s), 2)))
        period = round(self._period_s / self.step_s)
        return Course(rates, level, base, np.log(np.maximum(away, 1e-3)), np.log(restless + CALMEST), period)

    def tell(self, course: "Course", from_s: float, to_s: float) -> Forecast:
        """The minutes that may begin between ``from_s`` and ``to_s`` from now (0 <= from_s <= to_s)."""
        first, last = round(from_s / self.step_s), round(to_s / self.step_s)
        leads = np.arange(first, last + 1) + 2  # a mean over two steps is known at its end
        now, level, base = len(course.level) - 1, float(course.level[-1]), float(course.base[-1])
        count = now + 1 - leads[-1]  # moments whose future is known
        if count < PAST_LEAST:
            return Forecast(np.array([level * ALLOWANCE]), np.ones(1), level, base, "level")
        alike = course.alike(count)
        flat = np.ones((1, len(leads)))
        answers = {"past": (alike, course.base[alike][:, None] * flat, base * flat)}
        if (seasoned := alike[alike >= course.period]).size >= PAST_LEAST:
            answers["season"] = seasoned, course.risen(seasoned, leads), course.risen(np.array([now]), leads)
        told: list[tuple[float, Floats, Floats, str]] = []
        for by, (moments, answer, here) in answers.items():
            actual = course.level[moments[:, None] + leads]
            ratios = actual / answer
            loss = _loss(actual, answer * exceeded_by(ratios, actual, JUDGED_PART), JUDGED_PART)
            told.append((loss, (ratios * here).ravel(), actual.ravel(), by))
        _, rates, weights, by = min(told, key=lambda one: one[0])
        return Forecast(rates, weights / max(weights.sum(), 1e-12), level, base, by)


class Course(NamedTuple):
    """(steps,) arrays that end now: the rate of work, its mean over a minute and over an hour, how far the one is from the other
    (logarithm), how restless the hour was (logarithm); and the period in steps."""

    rates: Floats
    level: Floats
    base: Floats
    away: Floats
    restless: Floats
    period: int

    def alike(self, count: int) -> Ints:
        """Of the first ``count`` moments those most like now, ascending."""
        near = min(max(count // PAST_PART, PAST_LEAST), NEAR)
        distance = np.abs(self.away[:count] - self.away[-1]) + np.abs(self.restless[:count] - self.restless[-1])
        return np.sort(np.argpartition(distance, near - 1)[:near])

    def risen(self, moments: Ints, leads: Ints) -> Floats:
        """(moments, leads): the base times how the rate (over ``SMOOTH`` steps around) rose above it one period before."""
        smooth = moving_mean(self.rates, SMOOTH)
        then = moments - self.period
        rise = smooth[np.minimum(then[:, None] + leads + SMOOTH // 2, len(smooth) - 1)] / self.base[then][:, None]
        return np.asarray(self.base[moments][:, None] * np.clip(rise, 1 / RISE_MOST, RISE_MOST))


def exceeded_by(ratios: Floats, weights: Floats, part: float) -> float:
    """The ratio above which no more than this part of the weights lies."""
    order = np.argsort(ratios, axis=None)[::-1]
    above = np.cumsum(weights.ravel()[order])
    place = int(np.searchsorted(above, part * above[-1], side="right"))
    return float(ratios.ravel()[order[min(place, len(order) - 1)]])


def _loss(actual: Floats, said: Floats, part: float) -> float:
    """Pinball loss of an answer that should be exceeded in this part of the cases."""
    over = actual - said
    return float(np.mean(np.maximum((1 - part) * over, -part * over)))


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
