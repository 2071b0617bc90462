"""Kubernetes' horizontal pod autoscaler on the three signals that are used for LLM serving, for comparison.

want = ceil(ready x metric / target), the metric averaged over ready instances; no change while the ratio is within 10 % of 1
(kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale). Instances that are starting count as idle when the ratio
is above 1. Its scale-down stabilisation window of 300 s is the guard's ``settle_s``.
"""

import math
from collections.abc import Callable, Sequence

from block.autoscale.controllers.window import counts, interval_s, last
from block.autoscale.terms import Kind, Observation, Phase, Plan
from block.core import Slo
from block.errors import ConfigError

Metric = Callable[[Sequence[Observation], int], float | None]
"""From the window's last ``average_s`` and the ready instances to the metric of a mean instance; ``None``: unknown."""


class Hpa:
    """One signal and its target. ``average_s``: the metric is the mean over so many seconds (metrics are scraped and averaged)."""

    def __init__(
        self, name: str, metric: Metric, kinds: Sequence[Kind], *, target: float, tolerance: float, average_s: float
    ) -> None:
        if not target > 0 or not 0 <= tolerance < 1 or not average_s > 0:
            raise ConfigError("target and average_s must be above 0, tolerance 0 to 1.")
        self.name, self.history_s = name, average_s
        self._metric, self._kinds, self._kind = metric, kinds, kinds[0].name
        self._target, self._tolerance, self._average_s = target, tolerance, average_s

    def decide(self, window: Sequence[Observation]) -> Plan:
        seen = window[-1]
        have = counts(seen, self._kinds)
        ready = sum(counts(seen, self._kinds, Phase.READY).values())
        total = sum(have.values())
        metric = self._metric(last(window, self._average_s), max(ready, 1))
        if metric is None:
            return Plan(have, "The metric is unknown.")
        evidence = {"metric": metric, "target": self._target}
        ratio = metric / self._target
        if abs(ratio - 1) <= self._tolerance + 1e-9:
            return Plan(have, f"{metric:.3g} is within {self._tolerance:.0%} of {self._target:g}.", evidence)
        if ratio > 1 and total > ready:
            # Those not ready yet count with no load; if that turns the direction, nothing is done.
            ratio = max(1.0, ratio * max(ready, 1) / total)
            want = total if ratio <= 1 + self._tolerance else math.ceil(ratio * total - 1e-9)
        else:
            want = math.ceil(ratio * max(ready, 1) - 1e-9)
        others = total - have[self._kind]
        plan = {**have, self._kind: max(want - others, 0)}
        return Plan(plan, f"{metric:.3g} an instance against a target of {self._target:g}.", evidence)


def queue_hpa(
    kinds: Sequence[Kind],
    slo: Slo | None = None,
    *,
    target: float = 5.0,
    tolerance: float = 0.1,
    average_s: float = 30.0,
) -> Hpa:
    """Requests waiting for each instance (vLLM's num_requests_waiting, as in the usual KEDA set-up)."""
    return Hpa("hpa-queue", _queued, kinds, target=target, tolerance=tolerance, average_s=average_s)


def kv_hpa(
    kinds: Sequence[Kind],
    slo: Slo | None = None,
    *,
    target: float = 0.8,
    tolerance: float = 0.1,
    average_s: float = 30.0,
) -> Hpa:
    """The used fraction of the KV cache."""
    return Hpa("hpa-kv", _kv_used, kinds, target=target, tolerance=tolerance, average_s=average_s)


def rate_hpa(
    kinds: Sequence[Kind],
    slo: Slo | None = None,
    *,
    target: float = 2.0,
    tolerance: float = 0.1,
    average_s: float = 60.0,
) -> Hpa:
    """Requests a second that come for each instance."""
    return Hpa("hpa-rps", _rate_rps, kinds, target=target, tolerance=tolerance, average_s=average_s)


def _queued(window: Sequence[Observation], ready: int) -> float | None:
    known = [seen.queued for seen in window if seen.queued is not None]
    return sum(known) / len(known) / ready if known else None


def _kv_used(window: Sequence[Observation], ready: int) -> float | None:
    known = [seen.kv_used for seen in window if seen.kv_used is not None]
    return sum(known) / len(known) if known else None


def _rate_rps(window: Sequence[Observation], ready: int) -> float | None:
    if any(seen.blind for seen in window):
        return None
    return sum(seen.count for seen in window) / (len(window) * interval_s(window)) / ready
