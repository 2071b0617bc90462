"""Ours: replay the last minutes of real arrivals through the engine model, with fewer and more instances, at the rate to come.

Theory of operation. Of every decision:

1. *What can n instances bear?* The recent arrivals, bunches and lengths as they were, are squeezed or stretched in time until
   the model of n instances just still meets the SLO for the target fraction of them: that rate is the capacity of n, for the
   traffic as it is now. It is found by bisection, for the few n (or mixes of kinds) that come into question, anew every
   ``renew_s`` seconds of the observations' clock.
2. *What comes?* A forecast of the highest rate, over a minute, from one cold start from now on (`forecast`: level, trend or
   season, raised by the quantile of its own past errors). Fewer instances must bear more than what makes more of them start: a
   shortage is mended only a cold start later, a surplus at once.
3. *Does something wait already?* Then the present state counts too: the recent arrivals are served on as many instances as
   were ready then, and from what is left queued the forecast goes on with candidates that are ready a cold start from now.

The fewest that will do (by price, over mixes) are chosen. One replay costs about a microsecond a request.
"""

from collections.abc import Callable, Sequence
from functools import cache

from block.autoscale.controllers.capacity import Capacities
from block.autoscale.controllers.forecast import Forecast, Forecaster
from block.autoscale.controllers.mixes import Counts, cheapest
from block.autoscale.controllers.stage import Recent, Stage
from block.autoscale.controllers.window import counts, last
from block.autoscale.terms import Kind, Observation, Phase, Plan
from block.core import Slo
from block.errors import ConfigError

REPLAYED_MOST = 20_000
"""Requests of one replay from the present state."""
JUDGED_S = 120.0
"""How long a replay from the present state goes on after the cold start; the first quarter is not judged."""
QUEUED_CALM = 4
"""With at most so many requests waiting an instance, the present state does not matter."""


class Replay:
    """``target``: the fraction of requests that must meet the SLO in a replay. ``quantile``: how often the forecast rate must be
    high enough; ``caution``: fewer instances must do at a rate that is too low only so many times as often. ``margin``: the
    part of the capacity that is not used. ``worth`` above 0 sets the quantile by what a miss is worth, in instance-hours (at price
    1), instead: 1 - price / (3600 s x worth x requests/s that an instance bears), the newsvendor's ratio.
    ``recent_s``: what is replayed; ``renew_s``: how often capacities are found anew. ``beyond_s``: how long, after a cold
    start, the count must do; ``level_s``: rates are means over so long; ``period_s``: the season's length. ``spare``:
    instances added to the answer. ``zero`` 1: none after ``idle_s`` without a request.
    """

    name = "replay"

    def __init__(
        self, kinds: Sequence[Kind], slo: Slo | None = None, *, target: float = 0.99, quantile: float = 0.9,
        caution: float = 0.5, margin: float = 0.0, worth: float = 0.0, recent_s: float = 900.0, renew_s: float = 600.0,
        beyond_s: float = 60.0, level_s: float = 60.0, period_s: float = 86_400.0, spare: int = 0, zero: int = 0,
        idle_s: float = 900.0,
    ) -> None:  # fmt: skip
        if not (0 < target < 1 and 0 < quantile < 1 and 0 < caution <= 1 and 0 <= margin < 1):
            raise ConfigError("target and quantile must be between 0 and 1, caution in (0, 1], margin in [0, 1).")
        if min(recent_s, renew_s, beyond_s, level_s, period_s, idle_s) <= 0 or min(spare, worth) < 0:
            raise ConfigError("The times of replay must be above 0, spare and worth not negative.")
        self._kinds, self._slo = tuple(kinds), slo or Slo(ttft_s=3.0)
        self._cheapest = min(self._kinds, key=lambda kind: kind.price)
        self._quantile, self._caution, self._worth = quantile, caution, worth
        self._margin, self._beyond_s, self._level_s = margin, beyond_s, level_s
        self._recent_s, self._spare, self._zero, self._idle_s = recent_s, spare, bool(zero), idle_s
        self._stage = Stage(self._kinds, self._slo)
        self._recent = Recent()
        self._forecaster = Forecaster(level_s=level_s, mean_s=level_s, period_s=period_s, renew_s=renew_s)
        self._capacities = Capacities(self._stage, 1 - target, recent_s, renew_s)
        self.history_s = 2 * period_s

    def decide(self, window: Sequence[Observation]) -> Plan:
        have = counts(window[-1], self._kinds)
        if not self._capacities.renew(window):
            return self._idle(window, have)
        cold_s = max(kind.cold_start_s for kind in self._kinds)
        rises, stays = self._forecasts(window, cold_s, self._ratio(have))
        more, _ = cheapest(self._kinds, have, self._shortage(rises.peak_rps), 0.0)
        fewer, _ = cheapest(self._kinds, have, self._shortage(stays.peak_rps), 0.0)
        want = more if self._price(more) >= self._price(have) else fewer
        if self._price(more) < self._price(have) < self._price(fewer):
            want = have  # between the two: neither more are needed nor can fewer be risked
        ready = counts(window[-1], self._kinds, Phase.READY)
        if not calm(window[-1], ready):
            relieved = self._relief(window, rises, have, cold_s)
            want = relieved if self._price(relieved) > self._price(want) else want
        want = {**want, self._cheapest.name: min(want[self._cheapest.name] + self._spare, self._cheapest.most)}
        bears_rps = self._capacities.of(want)
        return Plan(want, _reason(want, have, bears_rps, rises), _evidence(bears_rps, rises, stays))

    def _price(self, want: Counts) -> float:
        return sum(kind.price * want[kind.name] for kind in self._kinds)

    def _ratio(self, have: Counts) -> float:
        if self._worth == 0:
            return self._quantile
        one = {name: int(name == self._cheapest.name) for name in have}
        bears_rps = self._capacities.of(one)
        return min(max(1 - self._cheapest.price / (3600 * self._worth * max(bears_rps, 1e-6)), 0.05), 0.995)

    def _forecasts(self, window: Sequence[Observation], cold_s: float, quantile: float) -> tuple[Forecast, Forecast]:
        """The rate for which more would come in time, and the one that fewer would have to bear."""
        fall = 1 - self._caution * (1 - quantile)
        until_s = max(cold_s - self._level_s, 0.0) + self._beyond_s
        rises = self._forecaster.tell(window, max(cold_s - self._level_s, 0.0), until_s, quantile)
        stays = self._forecaster.tell(window, 0.0, until_s, fall)
        return rises, stays._replace(peak_rps=max(stays.peak_rps, rises.peak_rps))

    def _shortage(self, rate_rps: float) -> Callable[[Counts], float]:
        """How much of the rate a candidate cannot bear, as a fraction; 0: it can."""
        return lambda want: max(0.0, 1 - (1 - self._margin) * self._capacities.of(want) / max(rate_rps, 1e-9))

    def _relief(self, window: Sequence[Observation], rises: Forecast, have: Counts, cold_s: float) -> Counts:
        """The fewest, not fewer than now, that are within the SLO again one cold start from now."""
        now_s, span_s = window[-1].at_s, cold_s + JUDGED_S
        arrivals = self._recent.arrivals(window, max(0.5 * self._recent_s, 2 * cold_s), REPLAYED_MOST)
        self._stage.set(last(window, arrivals.span_s), arrivals, now_s)
        coming = arrivals.again(now_s, max(rises.peak_rps, rises.mean_rps), span_s, REPLAYED_MOST)

        @cache
        def missed(values: tuple[int, ...]) -> float:
            want = dict(zip(have, values, strict=True))
            return self._stage.missed(want, coming, now_s, now_s + cold_s + 0.25 * JUDGED_S)

        want, _ = cheapest(self._kinds, have, lambda want: missed(tuple(want.values())), self._capacities.allowed)
        return want if self._price(want) >= self._price(have) else have

    def _idle(self, window: Sequence[Observation], have: Counts) -> Plan:
        quiet_s = window[-1].at_s - window[0].at_s
        idle = quiet_s >= self._idle_s and not any(seen.count or seen.queued for seen in last(window, self._idle_s))
        if not idle:
            return Plan(have, "No single requests to replay yet.")
        least = {kind.name: kind.least for kind in self._kinds}
        if self._zero:
            return Plan(least, f"Not a request for {self._idle_s:g} s.")
        kept = {**least, self._cheapest.name: max(self._cheapest.least, 1)}
        return Plan(kept, f"Not a request for {self._idle_s:g} s; one is kept.")


def calm(seen: Observation, ready: Counts) -> bool:
    """Whether hardly anything waits."""
    return sum(ready.values()) > 0 and (seen.queued or 0) <= QUEUED_CALM * sum(ready.values())


def _reason(want: Counts, have: Counts, bears_rps: float, rises: Forecast) -> str:
    change = sum(want.values()) - sum(have.values())
    verb = "keep" if want == have else f"{change:+d}" if change else "another mix"
    counted = ", ".join(f"{count} {name}" for name, count in want.items())
    return (
        f"{counted} ({verb}): they bear {bears_rps:.2f} requests/s within the SLO; "
        f"{rises.peak_rps:.2f} are to be expected ({rises.mean_rps:.2f} now, {rises.by} x {rises.safety:.2f})."
    )


def _evidence(bears_rps: float, rises: Forecast, stays: Forecast) -> dict[str, float]:
    return {
        "bears_rps": bears_rps, "rate_rps": rises.mean_rps, "forecast_rps": rises.peak_rps, "hold_rps": stays.peak_rps,
        "safety": rises.safety,
    }  # fmt: skip
