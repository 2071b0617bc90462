"""Membership and health: which instances may get a request. The sole writer of instance state.

An instance is *starting* until its first health check, *ready*, *down* (checks fail or nobody listens) or *draining*.
Over a ready one stand three cautions: an open *circuit* (requests to it failed in a row), *suspicion* (it should have
sent bytes and did not: see ``health``) and *trial* (it just came back and earns its share success by success).
"""

import ssl
from collections.abc import Container, Mapping
from enum import StrEnum
from typing import Final
from urllib.parse import urlsplit

from block.core import InstanceId
from block.gateway.config import GatewayConfig, InstanceConfig
from block.gateway.wire.relay import Heard
from block.gateway.wire.tls import UpstreamTls
from block.gateway.wire.upstream import Connections

TRIAL_START: Final = 2
TRIAL_DONE: Final = 64
MINUTE: Final = 60
MODELS_MAX: Final = 1024


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DOWN = "down"
    DRAINING = "draining"


class LastMinute:
    """A count over the last sixty whole seconds in constant memory."""

    __slots__ = ("_counts", "_second", "total")

    def __init__(self) -> None:
        self._counts = [0] * MINUTE
        self._second = 0
        self.total = 0

    def note(self, now_s: float) -> None:
        self.advance(now_s)
        self._counts[self._second % MINUTE] += 1
        self.total += 1

    def advance(self, now_s: float) -> int:
        """Forget what is older than a minute; the count."""
        second = int(now_s)
        if second != self._second:
            for passed in range(self._second + 1, min(second, self._second + MINUTE) + 1):
                self.total -= self._counts[passed % MINUTE]
                self._counts[passed % MINUTE] = 0
            self._second = second
        return self.total


class Instance(Heard):
    """One engine as the gateway knows it. Read by everyone, written by the pool."""

    def __init__(
        self, config: InstanceConfig, *, connect_timeout_s: float, in_flight_max: int, counts_usage: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        parts = urlsplit(config.url)
        assert parts.hostname is not None
        self.id = InstanceId(config.id)
        self.config = config
        self.counts_usage = counts_usage
        """Its streams are asked for usage (see ``usage``)."""
        self.prefix = parts.path.rstrip("/").encode()
        self.host_header = parts.netloc.encode()
        self.connections = Connections(
            parts.hostname, parts.port or (80 if tls is None else 443), connect_timeout_s=connect_timeout_s, tls=tls
        )
        self.state = State.STARTING
        self.reason = "not checked yet"
        self.models: dict[str, bytes] | None = None
        """Model name -> its entry in ``/v1/models`` as JSON; ``None``: not known."""
        self.in_flight = 0
        self.in_flight_max = in_flight_max
        self.in_flight_tokens = 0
        self.streaming = 0
        """Answers that have begun to stream and are not whole."""
        self.failures_in_row = 0
        self.check_failures = 0
        self.circuit_open_until_s = 0.0
        self.suspect: str | None = None
        self.trial: int | None = None
        """Requests that it may have in flight while on trial."""
        self.silent_s = 0.0
        """For how long it has been listened to since the last byte."""
        self._heard_s = 0.0
        name = self.id.encode()
        self.header_lines = b"x-gateway-destination-endpoint: %b\r\nx-gateway-destination-endpoint-served: %b\r\n" % (
            name,
            name,
        )
        self.sent = LastMinute()

    def listened(self, for_s: float, now_s: float) -> None:
        """It was listened to for so long until now."""
        before_s = self.silent_s if self._heard_s == self.last_byte_s else 0.0
        self._heard_s = self.last_byte_s
        self.silent_s = min(before_s + for_s, now_s - self.last_byte_s)

    def limit(self) -> int:
        return self.in_flight_max if self.trial is None else min(self.trial, self.in_flight_max)


class Pool:
    """All instances. Time is given in loop seconds."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self.tls = UpstreamTls(config)
        self.instances: dict[InstanceId, Instance] = {}
        self._eligible: dict[str, tuple[InstanceId, ...]] = {}
        self._left_out: dict[str, Mapping[InstanceId, str]] = {}
        for instance in config.instances:
            self.add(instance)

    # Membership

    def add(self, config: InstanceConfig) -> Instance:
        """A new member; it gets requests once it answers a health check (or when there is nobody else)."""
        instance = Instance(
            config,
            connect_timeout_s=self._config.connect_timeout_s,
            in_flight_max=self._config.instance_in_flight_max,
            counts_usage=config.profile is not None and self._config.count_tokens == "usage",
            tls=self.tls.context_for(config.url),
        )
        self.instances[instance.id] = instance
        self._changed()
        return instance

    def drain(self, instance: Instance) -> None:
        """No new requests; those in flight finish."""
        instance.state, instance.reason = State.DRAINING, "draining"
        self._changed()

    def remove(self, instance: Instance) -> None:
        """Forget it; its idle connections close, requests in flight keep theirs."""
        self.instances.pop(instance.id, None)
        instance.state, instance.reason = State.DRAINING, "removed"
        instance.connections.close_idle()
        self._changed()

    def configure(self, config: GatewayConfig) -> None:
        """New limits after a reload."""
        self._config = config
        for instance in self.instances.values():
            instance.in_flight_max = config.instance_in_flight_max
        self._changed()

    # Who may get a request

    def eligible(self, model: str) -> tuple[InstanceId, ...]:
        """Instances for a model (``""``: any), the most trusted kind of which there is one: ready; those that have as many
        requests as their trial allows; suspect ones; those not checked yet; those whose circuit is open (rather try than
        refuse). Empty: none, or all at their limit (``full`` tells which)."""
        found = self._eligible.get(model)
        if found is None:
            found = self._find(model)
            if len(self._eligible) < MODELS_MAX:
                self._eligible[model] = found
        return found

    def _find(self, model: str) -> tuple[InstanceId, ...]:
        served = [i for i in self.instances.values() if self._serves(i, model)]
        sound = [i for i in served if not i.circuit_open_until_s]
        able = [i for i in sound if i.in_flight < i.limit()]
        for kind in (
            [i for i in able if i.state is State.READY and not i.suspect],
            [i for i in sound if i.state is State.READY and not i.suspect and i.in_flight < i.in_flight_max],
            [i for i in able if i.state is State.READY],
            [i for i in able if i.state is State.STARTING],
            [i for i in served if i.state is State.READY and i.in_flight < i.limit()],
        ):
            if kind:
                return tuple(i.id for i in kind)
        return ()

    def left_out(self, model: str) -> Mapping[InstanceId, str]:
        """Why the other instances are not eligible for a model, as of the last time that anything changed about it."""
        found = self._left_out.get(model)
        if found is None:
            eligible = self.eligible(model)
            found = {i.id: self._why_not(i, model) for i in self.instances.values() if i.id not in eligible}
            if len(self._left_out) < MODELS_MAX:
                self._left_out[model] = found
        return found

    def _why_not(self, instance: Instance, model: str) -> str:
        if not self._serves(instance, model):
            return "it does not serve the model"
        if instance.state is not State.READY:
            return f"{instance.state}: {instance.reason}"
        if instance.suspect:
            return f"suspect: {instance.suspect}"
        if instance.circuit_open_until_s:
            return instance.reason
        return f"it has {instance.in_flight} of {instance.limit()} requests that it may have"

    def _changed(self) -> None:
        """Who is eligible has to be found out again."""
        self._eligible.clear()
        self._left_out.clear()

    @staticmethod
    def _serves(instance: Instance, model: str) -> bool:
        return not model or instance.models is None or model in instance.models

    def knows(self, model: str) -> bool:
        """Whether some instance serves the model, or may (its list is not known)."""
        return not model or any(self._serves(i, model) for i in self.instances.values())

    def full(self, model: str, only: Container[InstanceId] | None = None) -> bool:
        """There are ready instances for the model (among ``only``), all at their limit."""
        return any(
            i.state is State.READY and self._serves(i, model) and (only is None or i.id in only)
            for i in self.instances.values()
        )

    def ready(self) -> list[Instance]:
        """Ready and not suspect."""
        return [i for i in self.instances.values() if i.state is State.READY and not i.suspect]

    def why_none(self) -> str:
        """One line on why nobody is ready."""
        if not self.instances:
            return "no instance is configured"
        return "; ".join(f"{i.id}: {i.reason}" for i in list(self.instances.values())[:8])

    # What requests say about health

    def started(self, instance: Instance, tokens: int, now_s: float) -> None:
        """A request was sent."""
        if instance.in_flight == 0:
            instance.last_byte_s = now_s
        instance.in_flight += 1
        instance.in_flight_tokens += tokens
        instance.sent.note(now_s)
        if instance.in_flight >= instance.limit():
            self._changed()

    def ended(self, instance: Instance, tokens: int) -> None:
        """A request is over on it, whatever its end."""
        if instance.in_flight >= instance.limit():
            self._changed()
        instance.in_flight -= 1
        instance.in_flight_tokens -= tokens

    def succeeded(self, instance: Instance) -> None:
        """It answered a request to its end."""
        instance.failures_in_row = 0
        if instance.trial is not None:
            instance.trial = instance.trial * 2 if instance.trial < TRIAL_DONE else None
            self._changed()

    def failed(self, instance: Instance, reason: str, now_s: float, *, refused: bool) -> None:
        """It failed a request. ``refused``: there was no connection, which takes it out until a check succeeds."""
        instance.failures_in_row += 1
        if refused:
            self.down(instance, reason)
        elif 0 < self._config.cb_failure_threshold <= instance.failures_in_row:
            instance.circuit_open_until_s = now_s + self._config.cb_open_s
            instance.reason = f"circuit open: {reason}"
            self._changed()

    # What checks say about health

    def up(self, instance: Instance) -> None:
        """A health check succeeded."""
        instance.check_failures = 0
        if instance.suspect and instance.in_flight == 0:
            self.set_suspect(instance, None)
        if instance.state is State.DRAINING or instance.state is State.READY:
            return
        returned = instance.state is State.DOWN
        instance.state, instance.reason, instance.failures_in_row = State.READY, "ready", 0
        instance.circuit_open_until_s = 0.0
        instance.trial = TRIAL_START if returned else None
        self._changed()

    def down(self, instance: Instance, reason: str) -> None:
        """It is out until a health check succeeds."""
        if instance.state is State.DRAINING:
            return
        instance.state, instance.reason, instance.suspect = State.DOWN, reason, None
        instance.connections.close_idle()
        self._changed()

    def check_failed(self, instance: Instance, reason: str) -> None:
        """A health check failed; several in a row take it out (a busy one may miss one), the first if it never was up."""
        instance.check_failures += 1
        if instance.state is not State.READY or instance.check_failures >= self._config.health_failure_threshold:
            self.down(instance, reason)

    def set_models(self, instance: Instance, models: dict[str, bytes] | None) -> None:
        if models != instance.models:
            instance.models = models
            self._changed()

    def set_suspect(self, instance: Instance, reason: str | None) -> None:
        """New requests go elsewhere while there is an elsewhere. ``None``: it moves again, and comes back on trial."""
        if instance.suspect != reason:
            if reason is None and instance.trial is None:
                instance.trial = instance.in_flight + TRIAL_START
            instance.suspect = reason
            self._changed()

    def close_circuits(self, now_s: float) -> None:
        """Circuits whose time is over: back on trial."""
        for instance in self.instances.values():
            if instance.circuit_open_until_s and instance.circuit_open_until_s <= now_s:
                instance.circuit_open_until_s, instance.failures_in_row = 0.0, 0
                instance.trial, instance.reason = TRIAL_START, "ready"
                self._changed()

    def close(self) -> None:
        for instance in self.instances.values():
            instance.connections.close()
