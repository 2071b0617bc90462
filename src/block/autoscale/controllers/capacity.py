"""How many requests miss the SLO on these instances under so much load, for the traffic as it is? By replaying recent arrivals
faster and slower.

As many of the replayed arrivals come in every ``level_s``, with their bunches inside of it: what rises and falls more slowly
is the forecast's to tell, and would be counted twice if it were in here too.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from block.autoscale.controllers.mixes import Counts
from block.autoscale.controllers.stage import Arrivals, Floats, Recent, Stage
from block.autoscale.controllers.work import Work
from block.autoscale.terms import Observation

PER_INSTANCE = 2_000
LEAST_REQUESTS, MOST_REQUESTS = 6_000, 24_000
"""Requests of one replay: so many an instance, within these bounds. A short one flatters: an overload first fills batches."""
WARM_FRACTION = 0.3
"""The part of a replay, which starts from idle engines, that is not judged."""
TRIED_MOST = 5
"""More instances than that of one kind are said to bear as much each as so many do (they bear a little more)."""
GRID = 1.1
"""Loads that are tried stand in this ratio; between two of them the missed fraction is interpolated."""
FINE, OVERLOADED = 0.0005, 0.9
"""Below and beyond these missed fractions no further load is tried."""
LEAST_LOAD, MOST_LOAD = 0.01, 20.0
"""Seconds of work a second and instance between which loads are tried."""


class Curve(NamedTuple):
    """(loads,) seconds of work a second, ascending, and the fraction of requests that miss the SLO under each, rising."""

    load: Floats
    missed: Floats

    def at(self, load: Floats) -> Floats:
        """Missed fractions under other loads: interpolated; beyond the last all miss."""
        log = np.log(np.maximum(load, 1e-9))
        return np.interp(log, np.log(self.load), self.missed, right=1.0)

    def bears(self, allowed: float) -> float:
        """The highest load under which at most ``allowed`` miss; 0: none of those tried."""
        if self.missed[0] > allowed:
            return 0.0
        return float(np.exp(np.interp(allowed, self.missed + 1e-9 * np.arange(len(self.load)), np.log(self.load))))


NONE = Curve(np.array([LEAST_LOAD]), np.ones(1))
"""No instance: all miss."""


class Capacities:
    """Remembers the curve of every candidate until it is due again. The clock is the observations', and what is replayed ends
    where that clock passed a multiple of ``renew_s``, so that two controllers with the same window find the same."""

    def __init__(
        self, stage: Stage, work: Work, allowed: float, *, recent_s: float, renew_s: float, level_s: float
    ) -> None:  # fmt: skip
        self._stage, self._work = stage, work
        self._recent_s, self._renew_s, self._level_s = recent_s, renew_s, level_s
        self.allowed = self._least_allowed = allowed
        self._recent = Recent()
        self._arrivals: Arrivals | None = None
        self._due: float | None = None
        self._tried: dict[tuple[str, int, int], Curve] = {}  # by kind, count and part
        self._mixed: dict[tuple[int, ...], Curve] = {}
        self.each_s = 1.0
        """Mean work of a recent request, in seconds."""
        self.alone = 0.0
        """The fraction that would miss even on idle instances."""
        self._none = dict.fromkeys(stage.one_of_each(), 0)
        self._guess = dict(self._none)  # by kind: the power of GRID from which on the last candidate was overloaded

    def renew(self, window: Sequence[Observation]) -> bool:
        """Take in a window; whether there is anything to replay."""
        due = window[-1].at_s // self._renew_s
        if self._arrivals is not None and due == self._due:
            return True
        until_s = due * self._renew_s
        before = [
            seen for seen in window[-_intervals(window, self._recent_s + self._renew_s) :] if seen.at_s <= until_s
        ]
        arrivals = self._recent.arrivals(before or window, self._recent_s, 2 * MOST_REQUESTS)
        if len(arrivals.at_s) == 0:
            arrivals = self._recent.arrivals(window, self._recent_s, 2 * MOST_REQUESTS)
        if len(arrivals.at_s) == 0:
            self._arrivals = None
            return False
        # The first bucket is short: it is taken again with every observation until it is whole.
        whole = bool(before) and before[-1].at_s - before[0].at_s > 0.2 * self._recent_s
        self.each_s = float(self._work.of(arrivals.prompts, arrivals.outputs).mean())
        arrivals = arrivals.even(self._level_s)
        self._arrivals, self._due = arrivals, due if whole else None
        self._tried, self._mixed = {}, {}
        # Requests that miss the SLO even on idle instances (long prompts) are no reason for more of them.
        self.alone = self._missed(self._stage.one_of_each(), arrivals, LEAST_LOAD / self.each_s)
        self.allowed = 1 - (1 - self._least_allowed) * (1 - self.alone)
        return True

    def of(self, want: Counts) -> Curve:
        """What ``want`` instances would miss under every load. A mix bears what its kinds bear: each takes the part of the load
        that is its part of what all bear, which is what a dispatcher that sees their speeds does."""
        alone = [self._of_one_kind(name, count) for name, count in want.items() if count > 0]
        if len(alone) < 2 or self._arrivals is None:
            return alone[0] if alone and self._arrivals is not None else NONE
        key = tuple(want.values())
        if key not in self._mixed:
            self._mixed[key] = _together(alone, self.allowed)
        return self._mixed[key]

    def _of_one_kind(self, name: str, count: int) -> Curve:
        """Of many instances a few are tried, with their share of the requests (every so-manieth)."""
        if self._arrivals is None:
            return NONE
        tried, part = (count, 1) if count <= TRIED_MOST else (TRIED_MOST, round(count / TRIED_MOST))
        key = name, tried, part
        if key not in self._tried:
            powers, missed = self._walk(name, tried, self._arrivals.share(1 / part))
            self._tried[key] = Curve(tried * GRID ** np.array(powers, dtype=float), np.maximum.accumulate(missed))
        curve = self._tried[key]
        return Curve(count / tried * curve.load, curve.missed)

    def _walk(self, name: str, count: int, arrivals: Arrivals) -> tuple[list[int], list[float]]:
        """Up from the guess until they are overloaded, down until hardly any miss: powers of ``GRID`` an instance, missed."""
        want = {**self._none, name: count}

        def missed(power: int) -> float:
            return self._missed(want, arrivals, count * GRID**power / self.each_s)

        guess = self._guess[name]
        found = {guess: missed(guess)}
        lowest, highest = _power(LEAST_LOAD), _power(MOST_LOAD)
        power = guess
        while found[power] < OVERLOADED and power < highest:
            power += 1
            found[power] = missed(power)
        top, power = power, guess
        while found[power] > self.alone + FINE and power > lowest:
            power -= 1
            found[power] = missed(power)
        self._guess[name] = next(power for power in sorted(found) if found[power] >= 0.5 or power == top)
        powers = sorted(found)
        return powers, [found[power] for power in powers]

    def _missed(self, want: Counts, arrivals: Arrivals, rate_rps: float) -> float:
        requests = min(max(PER_INSTANCE * sum(want.values()), LEAST_REQUESTS), MOST_REQUESTS)
        stream = arrivals.again(0.0, rate_rps, requests / rate_rps, requests)
        return self._stage.missed_afresh(want, stream, WARM_FRACTION * stream.span_s)


def _together(curves: Sequence[Curve], allowed: float) -> Curve:
    """One curve of several pools that share the load as they bear it."""
    bear = np.array([max(curve.bears(allowed), LEAST_LOAD) for curve in curves])
    parts = bear / bear.sum()
    loads = np.unique(np.concatenate([curve.load / part for curve, part in zip(curves, parts, strict=True)]))
    missed = sum(part * curve.at(part * loads) for curve, part in zip(curves, parts, strict=True))
    return Curve(loads, np.asarray(missed, dtype=float))


def _power(load: float) -> int:
    return round(math.log(load) / math.log(GRID))


def _intervals(window: Sequence[Observation], span_s: float) -> int:
    """How many observations lie in the last ``span_s`` seconds, and one more."""
    for number, seen in enumerate(reversed(window)):
        if seen.at_s <= window[-1].at_s - span_s:
            return number + 1
    return len(window)
