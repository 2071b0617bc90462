"""How many requests a second to be ready for: level, trend, season, and a quantile of the forecasts' own past errors.

The question is always the same: what is the mean rate over ``mean_s`` seconds, begun at some moment between ``from_s`` and
``to_s`` from now, at its highest? Simple answers are made for now and for every past moment of the window: the level of
``level_s`` stays, that of ``mean_s`` does, the trend goes on, it goes as one period before. The one with the smallest past
error (pinball loss at the quantile) is believed, and is multiplied by the ``quantile`` of actual / answer in the past, so
that the share of times it falls short is known whatever the traffic (the idea of conformal prediction). With
too little past, a fixed allowance is used instead.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from block.autoscale.controllers.window import interval_s
from block.autoscale.terms import Observation

Floats = npt.NDArray[np.float64]
PAST_LEAST = 20
"""Past answers needed to judge a forecast by."""
PAST_MOST = 6000
SIMILAR, SIMILAR_LEAST = 1.5, 200
"""Past answers within this factor of the newest are alike; so many of them are enough."""
ALLOWANCE = 1.25
"""Multiplies the answer while there is no past to judge it by."""


class Forecast(NamedTuple):
    """``peak_rps``: the rate to be ready for; ``mean_rps``: the recent level; ``by``: which answer; ``safety``: its factor."""

    peak_rps: float
    mean_rps: float
    by: str
    safety: float


def rates(window: Sequence[Observation], step_s: float) -> Floats:
    """Requests a second in each observation's interval; a blind interval repeats the one before."""
    counts = np.array([np.nan if seen.blind else seen.count for seen in window], dtype=float)
    known = np.flatnonzero(np.isfinite(counts))
    if len(known) == 0:
        return np.zeros(len(counts))
    filled = np.maximum.accumulate(np.where(np.isfinite(counts), np.arange(len(counts)), known[0]))
    return np.asarray(counts[filled] / step_s)


class Forecaster:
    """Makes forecasts from windows. The errors of the past are looked at anew whenever the observations' clock passes a multiple
    of ``renew_s``; the answers are always those of now. ``level_s``: the quick level's span."""

    def __init__(
        self, *, level_s: float = 60.0, mean_s: float = 300.0, trend_s: float = 900.0, period_s: float = 86_400.0,
        renew_s: float = 600.0,
    ) -> None:  # fmt: skip
        self._level_s, self._mean_s, self._trend_s = level_s, mean_s, trend_s
        self._period_s, self._renew_s = period_s, renew_s
        self._due: float | None = None
        self._scored: dict[tuple[float, float, float], Scores] = {}

    def tell(self, window: Sequence[Observation], from_s: float, to_s: float, quantile: float) -> Forecast:
        """The highest mean over ``mean_s`` that begins between ``from_s`` and ``to_s`` seconds from now (0 <= from_s <= to_s)."""
        step_s = interval_s(window)
        mean = max(round(self._mean_s / step_s), 1)
        spans = Spans(
            max(round(self._level_s / step_s), 1), mean, max(round(self._trend_s / step_s), 1),
            max(round(self._period_s / step_s), 1), round(from_s / step_s) + mean, round(to_s / step_s) + mean,
        )  # fmt: skip
        scores = self._scores(window, spans, (from_s, to_s, quantile))
        answers = _answers(rates(window[-(spans.mean + spans.trend) - 1 :], step_s), spans)
        now = {by: float(answer[-1]) for by, answer in answers.items()}
        then = len(window) - 1 - spans.period
        if "season" in scores and then >= 0:
            past = rates(window[max(then - spans.mean, 0) : then + spans.last + 1], step_s)
            past = moving_mean(past, spans.mean)[-(spans.last + 1) :]
            now["season"] = now["mean"] * _rise(past[0], past[spans.first :].max())
        usable = {by: score for by, score in scores.items() if by in now}
        if not usable:
            return Forecast(max(now["trend"], now["level"]) * ALLOWANCE, now["level"], "trend", ALLOWANCE)
        by = min(usable, key=lambda name: usable[name][1])
        return Forecast(now[by] * usable[by][0], now["level"], by, usable[by][0])

    def _scores(self, window: Sequence[Observation], spans: "Spans", key: tuple[float, float, float]) -> "Scores":
        due = window[-1].at_s // self._renew_s
        if due != self._due:
            self._due, self._scored = due, {}
        if key not in self._scored:
            until_s, upto = due * self._renew_s, len(window)
            while upto > 1 and window[upto - 1].at_s > until_s:
                upto -= 1
            past = window[:upto] if upto > spans.last + 2 * PAST_LEAST else window  # the very first ones: all there is
            scores = _scored(rates(past[-PAST_MOST:], interval_s(window)), spans, key[2])
            if past is window:
                return scores
            self._scored[key] = scores
        return self._scored[key]


class Spans(NamedTuple):
    """Lengths in intervals: of the quick level, of a mean, a trend, a period; the first and last end of the mean asked about."""

    level: int
    mean: int
    trend: int
    period: int
    first: int
    last: int


Scores = dict[str, tuple[float, float]]
"""By answer: the factor that it needs, and its past loss with it."""


def _scored(rps: Floats, spans: Spans, quantile: float) -> Scores:
    """How good each answer was at every past moment; empty: too few to say."""
    mean = moving_mean(rps, spans.mean)
    actual = _highest_ahead(mean, spans)
    if len(actual) < PAST_LEAST:
        return {}
    answers = _answers(rps, spans)
    season = _season(mean, spans)
    if season is not None:
        answers["season"] = season
    return {by: _safety(answer, actual, quantile) for by, answer in answers.items()}


def _answers(rps: Floats, spans: Spans) -> dict[str, Floats]:
    """All but the season's, for every moment."""
    level, mean = moving_mean(rps, spans.level), moving_mean(rps, spans.mean)
    index = np.arange(len(rps))
    slope = (mean - mean[np.maximum(index - spans.trend, 0)]) / np.maximum(np.minimum(index, spans.trend), 1)
    trend = np.maximum(mean + np.maximum(slope * spans.first, slope * spans.last), 0.1 * mean)
    return {"level": level, "mean": mean, "trend": trend}


def moving_mean(values: Floats, width: int) -> Floats:
    """Mean of each value and the ``width - 1`` before it (of those there are)."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))


def _season(mean: Floats, spans: Spans) -> Floats | None:
    """The mean times how it rose one period before; ``None``: the window holds no period and a past to judge by."""
    if len(mean) < spans.period + spans.last + PAST_LEAST:
        return None
    highest = _highest_ahead(mean, spans)
    rose = np.array([_rise(*pair) for pair in zip(mean[: len(highest)], highest, strict=True)])
    out = np.full(len(mean), np.nan)
    count = min(len(mean) - spans.period, len(rose))
    out[spans.period : spans.period + count] = mean[spans.period : spans.period + count] * rose[:count]
    return out


def _rise(before_rps: float, after_rps: float) -> float:
    return float(min(max(after_rps / max(before_rps, 1e-9), 0.05), 20.0))


def _highest_ahead(mean: Floats, spans: Spans) -> Floats:
    """For every moment that has them: the highest mean that ends ``first`` to ``last`` intervals later."""
    if len(mean) <= spans.last:
        return np.zeros(0)
    ahead = np.lib.stride_tricks.sliding_window_view(mean[spans.first :], spans.last - spans.first + 1)
    return np.asarray(ahead.max(axis=1))


def _safety(answer: Floats, actual: Floats, quantile: float) -> tuple[float, float]:
    """The factor that the newest answer needs to be high enough ``quantile`` of the time, and its loss with that factor.

    ``answer`` goes on to now, ``actual`` only as far as it is known. Where there are enough of them only the past answers of
    about the same rate count: a small rate is relatively noisier than a large one.
    """
    now = answer[-1]
    answer = answer[: len(actual)]
    known = np.isfinite(answer) & (answer > 0)
    near = known & (answer > now / SIMILAR) & (answer < now * SIMILAR)
    if near.sum() >= SIMILAR_LEAST:
        known = near
    if known.sum() < PAST_LEAST:
        return ALLOWANCE, np.inf
    said, was = answer[known], actual[known]
    factor = float(np.clip(np.quantile(was / said, quantile), 0.5, 3.0))
    over = was - said * factor
    return factor, float(np.mean(np.maximum(quantile * over, (quantile - 1) * over)))
