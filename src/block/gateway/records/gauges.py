"""Gauges are read from the state when someone asks for the metrics."""

import asyncio
import time
from typing import TYPE_CHECKING

from block.gateway.deciding.residuals import InstanceResiduals
from block.gateway.members.pool import Instance, State
from block.gateway.records.metrics import Metrics

if TYPE_CHECKING:
    from block.gateway.app import App


def read_gauges(app: "App") -> None:
    """Set them all."""
    app.dispatcher.books.settle()
    metrics, now_s = app.metrics, time.time()
    metrics.ready.set(len(app.pool.ready()))
    metrics.queue_size.set(len(app.dispatcher.queue))
    metrics.held.set(len(app.dispatcher.holding))
    metrics.tasks.set(len(asyncio.all_tasks(app.loop)))
    metrics.connections.set(len(app.connections))
    for instance in app.pool.instances.values():
        _read_instance(metrics, instance)
        evidence = app.dispatcher.decider.evidence.get(instance.id)
        if evidence is not None and (instance.config.predictor or instance.config.profile):
            metrics.drift.labels(instance.id).set(instance.id in app.dispatcher.decider.drift.wrong)
            metrics.unseen.labels(instance.id).set(evidence.unseen)
            metrics.stale.labels(instance.id).set(evidence.age_s(now_s) if evidence.frames else float("inf"))
        residuals = app.dispatcher.lessons.residuals.instances.get(instance.id)
        if residuals is not None:
            _read_residuals(metrics, instance.id, residuals)


def _read_instance(metrics: Metrics, instance: Instance) -> None:
    name = instance.id
    metrics.health.labels(name).set(instance.state is State.READY)
    metrics.circuit.labels(name).set(1 if instance.circuit_open_until_s else 0 if instance.trial is None else 2)
    metrics.suspect.labels(name).set(instance.suspect is not None)
    metrics.in_flight.labels(name).set(instance.in_flight)
    metrics.in_flight_tokens.labels(name).set(instance.in_flight_tokens)


def _read_residuals(metrics: Metrics, name: str, residuals: InstanceResiduals) -> None:
    for of, ring in (("ttft", residuals.ttft), ("e2e", residuals.e2e)):
        if (coverage := ring.coverage) is not None:
            metrics.coverage.labels(name, of).set(coverage)
        if (middle := ring.quantile(0.5)) is not None:
            metrics.bias.labels(name, of).set(middle)
