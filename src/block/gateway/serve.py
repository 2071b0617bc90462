"""A running gateway: puts the parts together, starts and stops them, reloads the configuration."""

import asyncio
import contextlib
import errno
import logging
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any, Final

import aiohttp

from block.errors import BlockError, ConfigError
from block.gateway.app import App, Membership
from block.gateway.blackbox import BlackBox
from block.gateway.config import RELOADABLE, GatewayConfig, InstanceConfig
from block.gateway.decider import Decider
from block.gateway.dispatch import Dispatcher
from block.gateway.evidence import Evidence
from block.gateway.health import HangWatch, HealthChecks
from block.gateway.lengths import HeaderLengths
from block.gateway.lessons import Lessons
from block.gateway.metrics import Metrics
from block.gateway.openai import PromptRatio
from block.gateway.pool import Instance, Pool, State
from block.gateway.proxy import ClientConnection
from block.gateway.remote import RemotePredictors
from block.gateway.selftest import self_test
from block.gateway.subscription import Subscription
from block.length.table import make_estimator
from block.policy.rank import Evidence as Needs
from block.policy.table import Policy, policy_from
from block.steptime.profile import load_profile

SWEEP_S: Final = 0.25
WATCH_S: Final = 0.1
FILE_CHECK_S: Final = 2.0
BACKLOG: Final = 4096

log = logging.getLogger("block.gateway")


class Gateway(Membership):
    """Start with ``start``, stop with ``drain`` (graceful) and ``close``; both may be called in any state."""

    def __init__(self, config: GatewayConfig, reload: Callable[[], GatewayConfig] | None = None) -> None:
        self.config = config
        self._reload = reload
        self._policy = policy_from(config.policy)
        self._rng = Random(config.seed)
        self._checks: dict[str, HealthChecks] = {}
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}
        self._background: list[asyncio.Task[None]] = []
        self._server: asyncio.Server | None = None
        self._session: aiohttp.ClientSession | None = None
        self._estimator = (
            HeaderLengths() if self._policy.name.startswith("block-oracle") else _estimator(config.length_estimator)
        )
        self.app: App
        self.port = 0

    # Start and stop

    async def start(self) -> None:
        """Listen and begin to watch the instances.

        Raises:
            ConfigError: the address is taken or cannot be bound, an instance cannot be used.
        """
        loop, config = asyncio.get_running_loop(), self.config
        metrics, pool = Metrics(), Pool(config)
        metrics.set_policy(self._policy.name)
        self.ratio = PromptRatio()
        decider = Decider(config, pool, self._policy, self._estimator, metrics, self._rng)
        dispatcher = Dispatcher(config, pool, decider, Lessons(self._estimator, self.ratio, metrics), metrics, loop)
        self.pool, self.dispatcher, self.decider, self.metrics = pool, dispatcher, decider, metrics
        self.app = App(config, pool, dispatcher, self.ratio, metrics, loop)
        self.app.membership = self
        self.app.self_test = (
            self_test() if self._policy.rank.needs is Needs.PREDICTION and config.predict == "local" else None
        )
        self._watch = HangWatch(pool, decider.evidence, self._checks, config.hang_after_s)
        await self._listen(loop)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False)
        if config.predict == "remote":
            decider.remote = RemotePredictors(pool, self._session, config.predict_timeout_s)
        for instance in pool.instances.values():
            self._follow(instance)
        self._background = [loop.create_task(self._sweep()), loop.create_task(self._look())]
        if self._reload is not None and config.config_file is not None:
            self._background.append(loop.create_task(self._watch_file(config.config_file)))

    async def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        config = self.config
        try:
            self._server = await loop.create_server(
                lambda: ClientConnection(self.app), config.host, config.port, backlog=BACKLOG
            )
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"Port {config.port} on {config.host} is in use: choose another with --port."
                ) from error
            raise ConfigError(f"Cannot listen on {config.host}:{config.port}: {error.strerror or error}.") from error
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def drain(self) -> None:
        """Ready says no, connections without a request close, answers finish; after the grace period no more is waited."""
        self.dispatcher.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.shutdown_grace_period_s):
                await self.dispatcher.idle()

    async def close(self) -> None:
        """Stop listening and end everything at once."""
        if self._server is not None:
            self._server.close()
        for client in list(self.app.connections):
            client.close_if_idle() if self.dispatcher.draining else client.abort()
        await asyncio.sleep(0)
        for client in list(self.app.connections):
            client.abort()
        tasks = [
            *self._background,
            *(task for group in self._tasks.values() for task in group),
            *self.dispatcher.tasks(),
        ]
        for task in tasks:
            task.cancel()
        self._watch.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.pool.close()
        if self._session is not None:
            await self._session.close()

    # Membership

    def join(self, config: InstanceConfig) -> Instance:
        """Add an instance while running."""
        instance = self.pool.add(config)
        self._follow(instance)
        return instance

    def leave(self, instance: Instance) -> None:
        """Remove one; requests at it finish."""
        self.pool.remove(instance)
        for task in self._tasks.pop(instance.id, []):
            task.cancel()
        self._checks.pop(instance.id, None)
        self.decider.forget(instance.id)

    def _follow(self, instance: Instance) -> None:
        """Health checks, and the predictor's stream or a modelled engine where there is one."""
        assert self._session is not None
        loop, config = asyncio.get_running_loop(), self.config
        evidence = Evidence(
            instance.id,
            self.decider.expectations,
            stale_after_s=config.stale_after_s,
            unseen_after_s=config.unseen_after_s,
        )
        self.decider.evidence[instance.id] = evidence
        checks = self._checks[instance.id] = HealthChecks(instance, self.pool, self._session, config, self._rng)
        tasks = [loop.create_task(checks.run())]
        if instance.config.predictor is not None:
            stream = Subscription(instance.config.predictor, evidence, self._session, self._rng)
            tasks.append(loop.create_task(stream.run()))
        elif instance.config.profile is not None:
            box = BlackBox(
                evidence, load_profile(instance.config.profile), instance.config.limits,
                url=instance.config.url if instance.config.num_gpu_blocks is None else None,
            )  # fmt: skip
            self.decider.boxes[instance.id] = box
            tasks.append(loop.create_task(box.run(self._session)))
        self._tasks[instance.id] = tasks

    # Reload

    def reload(self) -> None:
        """Read the configuration again; a wrong one changes nothing, is logged and counted."""
        if self._reload is None:
            return
        try:
            config = self._reload()
            policy = policy_from(config.policy)
            config.all_keys()
        except BlockError as error:
            self.metrics.reloads.labels("invalid").inc()
            log.error("the configuration was not reloaded: %s", error)
            return
        fixed = [
            n
            for n in GatewayConfig.__struct_fields__
            if n not in RELOADABLE and getattr(config, n) != getattr(self.config, n)
        ]
        if fixed:
            log.warning("a restart is needed for changes of: %s", ", ".join(fixed))
        self._apply(config, policy)
        self.metrics.reloads.labels("ok").inc()
        log.info("the configuration was reloaded: %d instances, policy %s", len(config.instances), config.policy)

    def _apply(self, config: GatewayConfig, policy: Policy) -> None:
        if config.policy != self.config.policy:
            self._policy = self.decider.policy = policy
            self.metrics.set_policy(policy.name)
        self.config = self.dispatcher.config = config
        self.app.configure(config)
        self.pool.configure(config)
        wanted = {instance.id: instance for instance in config.instances}
        for instance in list(self.pool.instances.values()):
            if wanted.get(instance.id) != instance.config:
                self.leave(instance)
        for name, instance_config in wanted.items():
            if name not in self.pool.instances:
                self.join(instance_config)

    async def _watch_file(self, file: str) -> None:
        seen = _stamp(file)
        while True:
            await asyncio.sleep(FILE_CHECK_S)
            now = _stamp(file)
            if now is not None and now != seen:
                self.reload()
                seen = now

    # Ticks

    async def _sweep(self) -> None:
        turn = 0
        while True:
            due_s = monotonic() + SWEEP_S
            await asyncio.sleep(SWEEP_S)
            now_s = monotonic()
            self.metrics.loop_delay.observe(max(0.0, now_s - due_s))
            self.pool.close_circuits(now_s)
            self.dispatcher.sweep()
            turn += 1
            if turn % 4 == 0 or self.dispatcher.draining:
                self._sweep_clients(now_s)

    def _sweep_clients(self, now_s: float) -> None:
        for client in [c for c in self.app.connections if c.overdue(now_s)]:
            client.time_out()
        if self.dispatcher.draining:
            for client in list(self.app.connections):
                client.close_if_idle()

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            self._watch.look(monotonic(), time.time())


async def run(
    config: GatewayConfig, reload: Callable[[], GatewayConfig] | None, started: Callable[[Gateway], None]
) -> None:
    """Serve until SIGTERM or SIGINT (drain; a second one ends at once); SIGHUP reloads.

    Raises:
        ConfigError: as ``Gateway.start``.
    """
    gateway = Gateway(config, reload)
    await gateway.start()
    loop = asyncio.get_running_loop()
    stop, again = asyncio.Event(), asyncio.Event()

    def on_stop() -> None:
        (again if stop.is_set() else stop).set()

    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, on_stop)
    loop.add_signal_handler(signal.SIGHUP, gateway.reload)
    try:
        await _first_checks(gateway)
        started(gateway)
        await stop.wait()
        log.info("draining: %d requests in flight", len(gateway.dispatcher.active))
        waiters = [loop.create_task(gateway.drain()), loop.create_task(again.wait())]
        await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
        for waiter in waiters:
            waiter.cancel()
    finally:
        await gateway.close()


def _stamp(file: str) -> tuple[int, int, int] | None:
    """What changes when a file does, also behind a link that is swapped (as Kubernetes does); ``None``: not there."""
    try:
        status = Path(file).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


async def _first_checks(gateway: Gateway) -> None:
    """Give the first health checks a moment, so that the first line printed is true."""
    for _ in range(int(1.0 / 0.02)):
        if all(i.state is not State.STARTING for i in gateway.pool.instances.values()):
            return
        await asyncio.sleep(0.02)


def _estimator(name: str) -> Any:
    if name == "header":
        raise ConfigError("The length estimator 'header' belongs to the policy block-oracle alone.")
    return make_estimator(name)
