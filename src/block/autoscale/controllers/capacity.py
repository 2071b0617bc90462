"""What can these instances bear, for the traffic as it is? By replaying recent arrivals faster and slower.

The replayed arrivals bring the same work every ``level_s``, with their bunches inside of it: what rises and falls more slowly is the
forecast's to tell, and would be counted twice if it were in here too.
"""

import math
from collections.abc import Sequence

from block.autoscale.controllers.mixes import Counts
from block.autoscale.controllers.stage import Arrivals, Recent, Stage
from block.autoscale.controllers.work import Work
from block.autoscale.terms import Observation

PER_INSTANCE = 2_000
LEAST_REQUESTS, MOST_REQUESTS = 6_000, 24_000
"""Requests of one replay: so many an instance, within these bounds. A short one flatters: an overload first fills batches."""
WARM_FRACTION = 0.3
"""The part of a replay, which starts from idle engines, that is not judged."""
TRIED_MOST = 5
"""More instances than that of one kind are said to bear as much each as so many do (they bear a little more)."""
GRID = 1.03
"""Capacities are found to 3 %."""
LOWEST_RPS, HIGHEST_RPS = 1e-3, 1e4
"""What an instance may bear: the search ends there."""


class Capacities:
    """Remembers the capacity of every candidate until it is due again. The clock is the observations', and what is replayed ends
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
        self._known: dict[tuple[int, ...], float] = {}
        self.each_s = 1.0
        """Mean work of a recent request, in seconds."""
        self._guess_rps = 1.0  # what one instance bore last: where the search begins

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
        work_s = self._work.of(arrivals.prompts, arrivals.outputs)
        self.each_s = float(work_s.mean())
        arrivals = arrivals.even(work_s, self._level_s)
        self._arrivals, self._due, self._known = arrivals, due if whole else None, {}
        # Requests that miss the SLO even on idle instances (long prompts) are no reason for more of them.
        alone = self._missed(self._stage.one_of_each(), arrivals, LOWEST_RPS)
        self.allowed = 1 - (1 - self._least_allowed) * (1 - alone)
        return True

    def of(self, want: Counts) -> float:
        """The highest rate of work that ``want`` bears, in seconds of work a second."""
        count = sum(want.values())
        if count == 0 or self._arrivals is None:
            return 0.0
        key = tuple(want.values())
        if key not in self._known:
            self._known[key] = self._by_parts(want, count) * self.each_s
        return self._known[key]

    def _by_parts(self, want: Counts, count: int) -> float:
        """Requests/s. Of many instances of one kind a few are tried, with their share of the requests (every so-manieth)."""
        assert self._arrivals is not None
        share = 1.0
        if count > TRIED_MOST and count in want.values():
            share = TRIED_MOST / count
            want = {name: TRIED_MOST if number else 0 for name, number in want.items()}
        rate_rps = self._find(want, self._arrivals.share(share), self._guess_rps * share * count)
        self._guess_rps = max(rate_rps / (share * count), LOWEST_RPS)
        return rate_rps / share

    def _find(self, want: Counts, arrivals: Arrivals, guess_rps: float) -> float:
        """The highest power of ``GRID`` that is borne: the same whatever the guess, as far as more is always harder."""
        count = sum(want.values())
        lowest, highest = _power(LOWEST_RPS * count), _power(HIGHEST_RPS * count)
        low: int | None = None
        high: int | None = None
        power, step = _power(guess_rps), 2
        while low is None or high is None or high - low > 1:
            if self._missed(want, arrivals, GRID**power) <= self.allowed:
                low = power
            else:
                high = power
            if low is not None and high is not None:
                power = (low + high) // 2
                continue
            power, step = (power + step if high is None else power - step), min(2 * step, 64)
            if not lowest < power < highest:
                break
        return 0.0 if low is None else float(GRID**low)

    def _missed(self, want: Counts, arrivals: Arrivals, rate_rps: float) -> float:
        requests = min(max(PER_INSTANCE * sum(want.values()), LEAST_REQUESTS), MOST_REQUESTS)
        stream = arrivals.again(0.0, rate_rps, requests / rate_rps, requests)
        return self._stage.missed_afresh(want, stream, WARM_FRACTION * stream.span_s)


def _power(rate_rps: float) -> int:
    return round(math.log(rate_rps) / math.log(GRID))


def _intervals(window: Sequence[Observation], span_s: float) -> int:
    """How many observations lie in the last ``span_s`` seconds, and one more."""
    for number, seen in enumerate(reversed(window)):
        if seen.at_s <= window[-1].at_s - span_s:
            return number + 1
    return len(window)
