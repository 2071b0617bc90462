"""Ours: replay the last minutes of real arrivals through the engine model, with fewer and more instances, for the work to come.

Theory of operation. Load is counted in work (`work`: seconds that tokens take), so that a change of the mix is one of load.
Of every decision:

1. *What do n instances miss?* The recent arrivals, with lengths and bunches as they were, are squeezed or stretched in time and
   served by the model of n instances: which fraction of them misses the SLO under every load. That is done for the few n (or
   mixes of kinds) that come into question, anew every ``renew_s`` seconds of the observations' clock (`capacity`).
2. *What may come?* The rate since it last changed, grown as it ever grew within so long in the past (`forecast`): for one more
   instance, from the moment it would be ready; for one fewer, from now on until it could be had again.
   Both together give the fraction of requests that each n is expected to miss, in minutes that go well and in those that do not.
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
from block.autoscale.controllers.work import work_on
from block.autoscale.terms import Kind, Observation, Phase, Plan
from block.core import Slo
from block.errors import ConfigError

REPLAYED_MOST = 20_000
"""Requests of one replay from the present state."""
JUDGED_S = 120.0
"""How long a replay from the present state goes on after the cold start; the first quarter is not judged."""
RARE = 0.01
"""Told is the rate above which this part of the work may come."""
QUEUED_CALM = 4
"""With at most so many requests waiting an instance, the present state does not matter."""


class Replay:
    """``target``: the fraction of requests that must be expected to meet the SLO, beside those that would miss it alone.
    ``margin``: the part of the capacity that is not used. ``recent_s``: what is replayed; ``renew_s``: how often capacities are
    found anew. ``beyond_s``: how long, after a cold start, the count must do; ``level_s``: rates are means over so long;
    ``base_s``: the longest mean; ``past_s``: how far back is looked for how rates grew; ``period_s``: the season's length.
    ``spare``: instances added to the answer. ``zero`` 1: none after ``idle_s`` without a request.
    """

    name = "replay"

    def __init__(
        self, kinds: Sequence[Kind], slo: Slo | None = None, *, target: float = 0.99,
        margin: float = 0.0, recent_s: float = 3600.0, renew_s: float = 1800.0, beyond_s: float = 30.0,
        level_s: float = 60.0, base_s: float = 3600.0, past_s: float = 172_800.0, period_s: float = 86_400.0,
        spare: int = 0, zero: int = 0, idle_s: float = 900.0,
    ) -> None:  # fmt: skip
        if not (0 < target < 1 and 0 <= margin < 1):
            raise ConfigError("target must be between 0 and 1, margin in [0, 1).")
        times_s = (recent_s, renew_s, beyond_s, level_s, base_s, past_s, period_s, idle_s)
        if min(times_s) <= 0 or spare < 0:
            raise ConfigError("The times of replay must be above 0, spare not negative.")
        self._kinds, self._slo = tuple(kinds), slo or Slo(ttft_s=3.0)
        self._cheapest = min(self._kinds, key=lambda kind: kind.price)
        self._margin, self._beyond_s = margin, beyond_s
        self._recent_s, self._spare, self._zero, self._idle_s = recent_s, spare, bool(zero), idle_s
        self._stage = Stage(self._kinds, self._slo)
        self._recent = Recent()
        work = work_on(self._kinds[0])
        self._forecaster = Forecaster(work, level_s=level_s, base_s=base_s, period_s=period_s)
        self._capacities = Capacities(
            self._stage, work, 1 - target, recent_s=recent_s, renew_s=renew_s, level_s=level_s
        )  # fmt: skip
        self.history_s = past_s

    def decide(self, window: Sequence[Observation]) -> Plan:
        have = counts(window[-1], self._kinds)
        if (idle := self._idle(window)) is not None:
            return idle
        if not self._capacities.renew(window):
            return Plan(have, "No single requests to replay yet.")
        cold_s = max(kind.cold_start_s for kind in self._kinds)
        course = self._forecaster.course(window)
        rises = self._forecaster.tell(course, cold_s, cold_s + self._beyond_s)
        stays = self._forecaster.tell(course, 0.0, cold_s + self._beyond_s)
        allowed = self._capacities.allowed
        more, _ = cheapest(self._kinds, have, self._missed(rises), allowed)
        fewer, _ = cheapest(self._kinds, have, self._missed(rises, stays), allowed)
        want = more if self._price(more) >= self._price(have) else fewer
        if self._price(more) < self._price(have) < self._price(fewer):
            want = have  # between the two: neither more are needed nor can fewer be risked
        ready = counts(window[-1], self._kinds, Phase.READY)
        if not calm(window[-1], ready):
            relieved = self._relief(window, rises, have, cold_s)
            want = relieved if self._price(relieved) > self._price(want) else want
        want = {**want, self._cheapest.name: min(want[self._cheapest.name] + self._spare, self._cheapest.most)}
        told = self._told(want, rises, stays)
        return Plan(want, _reason(want, have, told, rises), told)

    def _price(self, want: Counts) -> float:
        return sum(kind.price * want[kind.name] for kind in self._kinds)

    def _missed(self, *coming: Forecast) -> Callable[[Counts], float]:
        """The fraction of requests that a candidate is expected to miss in the worst of what may come."""

        @cache
        def missed(values: tuple[int, ...]) -> float:
            curve = self._capacities.of(dict(zip(names, values, strict=True)))
            return max(float(curve.at(one.rates / (1 - self._margin)) @ one.weights) for one in coming)

        names = [kind.name for kind in self._kinds]
        return lambda want: missed(tuple(want[name] for name in names))

    def _told(self, want: Counts, rises: Forecast, stays: Forecast) -> dict[str, float]:
        """The numbers behind a plan; rates as requests/s like the recent ones."""
        each_s, allowed = self._capacities.each_s, self._capacities.allowed
        fewer = {**want, self._cheapest.name: max(want[self._cheapest.name] - 1, 0)}
        return {
            "missed": self._missed(rises, stays)(want), "missed_with_fewer": self._missed(rises, stays)(fewer),
            "bears_rps": self._capacities.of(want).bears(allowed) / each_s, "rate_rps": rises.level / each_s,
            "base_rps": rises.base / each_s, "forecast_rps": rises.exceeded_by(RARE) / each_s, "work_s": each_s,
        }  # fmt: skip

    def _relief(self, window: Sequence[Observation], rises: Forecast, have: Counts, cold_s: float) -> Counts:
        """The fewest, not fewer than now, that are within the SLO again one cold start from now."""
        now_s, span_s = window[-1].at_s, cold_s + JUDGED_S
        arrivals = self._recent.arrivals(window, max(0.125 * self._recent_s, 2 * cold_s), REPLAYED_MOST)
        if not len(arrivals.at_s):
            return have
        self._stage.set(last(window, arrivals.span_s), arrivals, now_s)
        likely = float(rises.rates @ rises.weights)
        coming = arrivals.again(now_s, max(likely, rises.level) / self._capacities.each_s, span_s, REPLAYED_MOST)

        @cache
        def missed(values: tuple[int, ...]) -> float:
            want = dict(zip(have, values, strict=True))
            return self._stage.missed(want, coming, now_s, now_s + cold_s + 0.25 * JUDGED_S)

        want, _ = cheapest(self._kinds, have, lambda want: missed(tuple(want.values())), self._capacities.allowed)
        return want if self._price(want) >= self._price(have) else have

    def _idle(self, window: Sequence[Observation]) -> Plan | None:
        """What there should be after ``idle_s`` without a request; ``None``: it is not as long as that."""
        quiet_s = window[-1].at_s - window[0].at_s
        if quiet_s < self._idle_s or any(seen.count or seen.queued for seen in last(window, self._idle_s)):
            return None
        least = {kind.name: kind.least for kind in self._kinds}
        if self._zero:
            return Plan(least, f"Not a request for {self._idle_s:g} s.")
        kept = {**least, self._cheapest.name: max(self._cheapest.least, 1)}
        return Plan(kept, f"Not a request for {self._idle_s:g} s; one is kept.")


def calm(seen: Observation, ready: Counts) -> bool:
    """Whether hardly anything waits."""
    return sum(ready.values()) > 0 and (seen.queued or 0) <= QUEUED_CALM * sum(ready.values())


def _reason(want: Counts, have: Counts, told: dict[str, float], rises: Forecast) -> str:
    change = sum(want.values()) - sum(have.values())
    verb = "keep" if want == have else f"{change:+d}" if change else "another mix"
    counted = ", ".join(f"{count} {name}" for name, count in want.items())
    return (
        f"{counted} ({verb}): {told['missed']:.2%} of the requests may miss the SLO, {told['missed_with_fewer']:.2%} with one "
        f"fewer; {told['rate_rps']:.2f} requests/s now, up to {told['forecast_rps']:.2f} to come (by {rises.by}), "
        f"{told['bears_rps']:.2f} borne."
    )
