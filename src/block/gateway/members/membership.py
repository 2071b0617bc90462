"""Who is a member and what follows each: health checks, a predictor's snapshots, or a modelled engine.

Members come from three origins that do not touch each other's: the configuration, discovery, and the admin API. Where two
name the same instance, the first one has it. Who is gone from its origin's list is drained: nothing new, and removed once its
last answer is over.
"""

import asyncio
from collections.abc import Iterable
from enum import StrEnum
from random import Random

import aiohttp
import msgspec

from block.core import InstanceId
from block.gateway.config import GatewayConfig, InstanceConfig
from block.gateway.deciding.blackbox import BlackBox
from block.gateway.deciding.decider import Decider
from block.gateway.deciding.evidence import Evidence
from block.gateway.deciding.residuals import Residuals
from block.gateway.members.health import HealthChecks
from block.gateway.members.pool import Instance, Pool, State
from block.gateway.members.subscription import Subscription
from block.gateway.processes.workers import Changes
from block.gateway.records.metrics import Metrics
from block.steptime.profile import load_profile


class Origin(StrEnum):
    CONFIG = "config"
    DISCOVERY = "discovery"
    ADMIN = "admin"


class Membership:
    """Adds and removes instances while the gateway runs. Owns their tasks."""

    def __init__(
        self, config: GatewayConfig, pool: Pool, decider: Decider, residuals: Residuals, metrics: Metrics, rng: Random
    ) -> None:
        self.config = config
        self.checks: dict[str, HealthChecks] = {}
        self.origins: dict[InstanceId, Origin] = dict.fromkeys(pool.instances, Origin.CONFIG)
        self.dismissed: set[InstanceId] = set()
        self._pool, self._decider, self._residuals = pool, decider, residuals
        self._metrics, self._rng = metrics, rng
        self._session: aiohttp.ClientSession | None = None
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}
        self._going: set[InstanceId] = set()

    def begin(self, session: aiohttp.ClientSession) -> None:
        """Follow everyone that is in the pool."""
        self._session = session
        for instance in self._pool.instances.values():
            self._follow(instance)

    def join(self, config: InstanceConfig, origin: Origin = Origin.ADMIN) -> Instance:
        """Add an instance."""
        instance = self._pool.add(config)
        self.origins[instance.id] = origin
        self.dismissed.discard(instance.id)
        self._follow(instance)
        return instance

    def catch_up(self, changes: Changes | None) -> None:
        """Do what the admin API did at other workers before this one started."""
        if changes is None:
            return
        self.dismissed.update(InstanceId(name) for name in changes.dismissed)
        for instance in [self._pool.instances[i] for i in self.dismissed if i in self._pool.instances]:
            self.leave(instance)
        for raw in changes.joined:
            config = msgspec.json.decode(raw, type=InstanceConfig)
            if config.id not in self._pool.instances:
                self.join(config)
        for name in changes.draining:
            if name in self._pool.instances:
                self._pool.drain(self._pool.instances[InstanceId(name)])

    def changes(self) -> Changes:
        """What the admin API did here, for another worker."""
        ours = [i for i in self._pool.instances.values() if self.origins.get(i.id) is Origin.ADMIN]
        draining = [
            i.id for i in self._pool.instances.values() if i.state is State.DRAINING and i.id not in self._going
        ]
        joined = [msgspec.Raw(msgspec.json.encode(i.config)) for i in ours]
        return Changes(joined=joined, draining=[str(i) for i in draining], dismissed=[str(i) for i in self.dismissed])

    def dismiss(self, instance: Instance) -> None:
        """Remove one for good: its origin's lists do not bring it back, only the admin API does."""
        if self.origins.get(instance.id) is not Origin.ADMIN:
            self.dismissed.add(instance.id)
        self.leave(instance)

    def leave(self, instance: Instance) -> None:
        """Remove one at once; requests at it finish."""
        self._pool.remove(instance)
        for task in self._tasks.pop(instance.id, []):
            task.cancel()
        self.origins.pop(instance.id, None)
        self._going.discard(instance.id)
        self.checks.pop(instance.id, None)
        self._decider.forget(instance.id)
        self._residuals.forget(instance.id)
        self._metrics.forget(instance.id)

    def reconcile(self, origin: Origin, wanted: Iterable[InstanceConfig]) -> tuple[int, int]:
        """Make the members of one origin those of a list; (how many came, how many went)."""
        by_id = {config.id: config for config in wanted}
        came = went = 0
        for instance in [i for i in self._pool.instances.values() if self.origins.get(i.id) is origin]:
            listed = by_id.get(instance.id)
            if listed is None:
                went += instance.id not in self._going
                self._let_go(instance)
            elif listed != instance.config or instance.id in self._going:
                self.leave(instance)
        for name, config in by_id.items():
            if name not in self._pool.instances and name not in self.dismissed:
                self.join(config, origin)
                came += 1
        return came, went

    def _let_go(self, instance: Instance) -> None:
        if instance.in_flight:
            self._going.add(instance.id)
            self._pool.drain(instance)
        else:
            self.leave(instance)

    def sweep(self) -> None:
        """Remove those that are gone and idle by now."""
        for name in [name for name in self._going if not self._pool.instances[name].in_flight]:
            self.leave(self._pool.instances[name])

    def tasks(self) -> list[asyncio.Task[None]]:
        return [task for group in self._tasks.values() for task in group]

    def _follow(self, instance: Instance) -> None:
        """Health checks, and the predictor's stream or a modelled engine where there is one."""
        assert self._session is not None
        loop, config = asyncio.get_running_loop(), self.config
        evidence = Evidence(
            instance.id,
            self._decider.expectations,
            stale_after_s=config.stale_after_s,
            unseen_after_s=config.unseen_after_s,
        )
        self._decider.evidence[instance.id] = evidence
        checks = self.checks[instance.id] = HealthChecks(instance, self._pool, self._session, config, self._rng)
        tasks = [loop.create_task(checks.run())]
        if instance.config.predictor is not None:
            stream = Subscription(instance.config.predictor, evidence, self._session, self._rng, self._pool.tls)
            tasks.append(loop.create_task(stream.run()))
        elif instance.config.profile is not None:
            box = BlackBox(
                evidence, load_profile(instance.config.profile), instance.config.limits,
                url=instance.config.url if instance.config.num_gpu_blocks is None else None, watched=instance.config.url,
            )  # fmt: skip
            self._decider.boxes[instance.id] = box
            tasks.append(loop.create_task(box.run(self._session)))
        self._tasks[instance.id] = tasks
