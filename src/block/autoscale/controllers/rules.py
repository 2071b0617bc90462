"""The published rules: a fixed count, adding on a predicted breach (`preempt`), adding on a measured one (`relief`)."""

from collections.abc import Sequence

from block.autoscale.controllers.window import counts, last
from block.autoscale.terms import Kind, Observation, Plan
from block.core import Slo
from block.errors import ConfigError


class Static:
    """Always the same count of the first kind."""

    name = "static"
    history_s = 0.0

    def __init__(self, kinds: Sequence[Kind], slo: Slo | None = None, *, count: int = 1) -> None:
        if count < 0:
            raise ConfigError(f"count must not be negative, not {count}.")
        self._want = {kinds[0].name: count}
        self._reason = f"Always {count}."

    def decide(self, window: Sequence[Observation]) -> Plan:
        return Plan(self._want, self._reason)


class Preempt:
    """Block's rule (arXiv 2508.03611): one more for every request whose best predicted E2E exceeds ``threshold_s``.

    ``per_request`` 0: one more an interval, however many requests triggered. ``waits`` 1: none while one is still starting (the
    published spares were warm, so it never had to). ``remove_below_s`` above 0: one fewer once no prediction of the last
    ``calm_s`` seconds exceeded that; 0, as published: never.
    """

    name = "preempt"

    def __init__(
        self, kinds: Sequence[Kind], slo: Slo | None = None, *, threshold_s: float = 70.0, per_request: int = 1,
        waits: int = 0, remove_below_s: float = 0.0, calm_s: float = 300.0,
    ) -> None:  # fmt: skip
        _positive(threshold_s=threshold_s, calm_s=calm_s)
        self._kind, self._kinds = kinds[0].name, kinds
        self._threshold_s, self._per_request, self._waits = threshold_s, per_request, waits
        self._remove_below_s, self._calm_s = remove_below_s, calm_s
        self.history_s = calm_s

    def decide(self, window: Sequence[Observation]) -> Plan:
        seen = window[-1]
        have = counts(seen, self._kinds)
        slowest = seen.slow_e2e_s or (() if seen.predicted_e2e_s is None else (seen.predicted_e2e_s,))
        triggers = sum(e2e_s > self._threshold_s for e2e_s in slowest)
        evidence = {"triggers": float(triggers), "predicted_e2e_s": max(slowest, default=0.0)}
        starting = _starting(seen)
        if triggers and not (self._waits and starting):
            more = triggers if self._per_request else 1
            return _changed(have, self._kind, more, f"{triggers} predicted above {self._threshold_s:g} s.", evidence)
        if self._calm(window):
            return _changed(have, self._kind, -1, f"None predicted above {self._remove_below_s:g} s lately.", evidence)
        return Plan(have, f"Best predicted E2E up to {evidence['predicted_e2e_s']:.1f} s.", evidence)

    def _calm(self, window: Sequence[Observation]) -> bool:
        if self._remove_below_s <= 0 or window[-1].at_s - window[0].at_s < self._calm_s * 0.9:
            return False
        return all((seen.predicted_e2e_s or 0.0) <= self._remove_below_s for seen in last(window, self._calm_s))


class Relief:
    """Reactive: one more (``step``) when a latency measured in the last interval exceeds its threshold.

    ``threshold_s`` on E2E as published; ``ttft_s`` above 0 watches TTFT instead. ``quantile``: of the interval's finished
    requests. ``remove_below``: one fewer once the same quantile over ``calm_s`` was below this fraction of the threshold;
    0, as published: never.
    """

    name = "relief"

    def __init__(
        self, kinds: Sequence[Kind], slo: Slo | None = None, *, threshold_s: float = 70.0, ttft_s: float = 0.0,
        quantile: float = 1.0, step: int = 1, waits: int = 0, remove_below: float = 0.0, calm_s: float = 300.0,
    ) -> None:  # fmt: skip
        _positive(threshold_s=threshold_s, calm_s=calm_s, step=step)
        if not 0 < quantile <= 1:
            raise ConfigError(f"quantile must be above 0 and at most 1, not {quantile}.")
        self._kind, self._kinds = kinds[0].name, kinds
        self._threshold_s, self._by_ttft = (ttft_s, True) if ttft_s > 0 else (threshold_s, False)
        self._quantile, self._more, self._waits = quantile, step, waits
        self._remove_below, self._calm_s = remove_below, calm_s
        self.history_s = calm_s

    def decide(self, window: Sequence[Observation]) -> Plan:
        have = counts(window[-1], self._kinds)
        worst_s = self._measured([window[-1]])
        evidence = {"measured_s": worst_s}
        if worst_s > self._threshold_s and not (self._waits and _starting(window[-1])):
            return _changed(
                have, self._kind, self._more, f"Measured {worst_s:.1f} s above {self._threshold_s:g} s.", evidence
            )
        if self._remove_below > 0 and window[-1].at_s - window[0].at_s >= self._calm_s * 0.9:
            calm_s = self._measured(last(window, self._calm_s))
            if calm_s < self._remove_below * self._threshold_s:
                return _changed(have, self._kind, -1, f"Measured only {calm_s:.1f} s for {self._calm_s:g} s.", evidence)
        return Plan(have, f"Measured {worst_s:.1f} s.", evidence)

    def _measured(self, window: Sequence[Observation]) -> float:
        """The quantile over what finished; a failed request counts as infinitely late; 0 of nothing."""
        seconds = sorted(
            float("inf") if value is None else value
            for seen in window
            for served in seen.served
            for value in (served.ttft_s if self._by_ttft else served.e2e_s,)
        )
        return seconds[min(int(self._quantile * len(seconds)), len(seconds) - 1)] if seconds else 0.0


def _starting(seen: Observation) -> bool:
    return any(member.phase == "starting" for member in seen.members)


def _changed(have: dict[str, int], kind: str, more: int, reason: str, evidence: dict[str, float]) -> Plan:
    return Plan({**have, kind: max(have[kind] + more, 0)}, reason, evidence)


def _positive(**options: float) -> None:
    for name, value in options.items():
        if not value > 0:
            raise ConfigError(f"{name} must be above 0, not {value}.")
