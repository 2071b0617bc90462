"""The autoscaler's Prometheus metrics."""

from collections import Counter as Count
from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from block.autoscale.live.cold_start import ColdStarts
from block.autoscale.terms import Kind, Member, Phase

_SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Figures:
    """One registry per autoscaler."""

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self._kinds = [kind.name for kind in kinds]
        self.registry = registry = CollectorRegistry()
        n = "block_autoscale_"
        self._desired = Gauge(
            "block_desired_instances", "How many instances of a kind there should be.", ["kind"], registry=registry
        )
        self._instances = Gauge(
            n + "instances", "Instances that are there, by phase.", ["kind", "phase"], registry=registry
        )
        self._blind = Gauge(n + "blind_sources", "Sources that did not answer at the last look.", registry=registry)
        self.leads = Gauge(n + "leader", "1: this autoscaler acts; 0: it stands by.", registry=registry)
        self.unmet = Gauge(
            n + "unmet_seconds", "For how long there have been more or fewer instances than ordered.", registry=registry
        )
        self._cold_start = Gauge(
            n + "cold_start_seconds", "From order to ready, exponentially averaged.", ["kind"], registry=registry
        )
        self._starts = Counter(n + "starts", "Instances that became ready.", ["kind"], registry=registry)
        self.decisions = Counter(n + "decisions", "Decisions by what was done.", ["action"], registry=registry)
        self.actuator_failures = Counter(
            n + "actuator_failures",
            "Orders that the actuator did not carry out, by reason.",
            ["reason"],
            registry=registry,
        )
        self.controller_failures = Counter(
            n + "controller_failures", "Decisions that could not be made.", registry=registry
        )
        self.look_time = Histogram(n + "look_seconds", "Time to observe.", buckets=_SECONDS, registry=registry)
        self.decide_time = Histogram(n + "decide_seconds", "Time to decide.", buckets=_SECONDS, registry=registry)
        self.act_time = Histogram(
            n + "act_seconds", "Time for an order to the actuator.", buckets=_SECONDS, registry=registry
        )

    def show_members(self, members: Sequence[Member], blind: int) -> None:
        """What there is."""
        found = Count((member.kind, member.phase) for member in members)
        for kind in self._kinds:
            for phase in Phase:
                self._instances.labels(kind, phase.value).set(found[kind, phase])
        self._blind.set(blind)

    def show_desired(self, want: Mapping[str, int]) -> None:
        """What there should be."""
        for kind, count in want.items():
            self._desired.labels(kind).set(count)

    def show_starts(self, ended: Sequence[tuple[str, float]], cold_starts: ColdStarts) -> None:
        """Starts that ended."""
        for kind, _ in ended:
            self._starts.labels(kind).inc()
            self._cold_start.labels(kind).set(cold_starts.measured_s[kind])

    def render(self) -> bytes:
        """Prometheus text."""
        return generate_latest(self.registry)
