"""A running gateway: puts the parts together, starts and stops them, reloads the configuration."""

import asyncio
import contextlib
import errno
import gc
import logging
import signal
import time
from collections.abc import Callable
from random import Random
from time import monotonic
from typing import Any, Final

import aiohttp

from block.errors import BlockError, ConfigError
from block.gateway.app import App
from block.gateway.config import RELOADABLE, GatewayConfig
from block.gateway.deciding.decider import Decider
from block.gateway.deciding.lengths import HeaderLengths, LengthCollector
from block.gateway.deciding.lessons import Lessons
from block.gateway.deciding.remote import RemotePredictors
from block.gateway.deciding.residuals import Residuals
from block.gateway.dispatch import Dispatcher
from block.gateway.members.discovery import members_of
from block.gateway.members.discovery.follow import follow
from block.gateway.members.health import HangWatch
from block.gateway.members.membership import Membership, Origin
from block.gateway.members.pool import Pool, State
from block.gateway.processes.selftest import self_test
from block.gateway.processes.workers import Workers
from block.gateway.records.metrics import Metrics
from block.gateway.records.requestlog import RequestLog
from block.gateway.records.tracing import Tracing
from block.gateway.wire.openai import PromptRatio
from block.gateway.wire.proxy import ClientConnection, Surface
from block.gateway.wire.tls import UpstreamTls, server_certificates, stamp
from block.length.table import make_estimator
from block.policy.rank import Evidence as Needs
from block.policy.table import Policy, policy_from

SWEEP_S: Final = 0.25
WATCH_S: Final = 0.1
FILE_CHECK_S: Final = 2.0
CERTIFICATE_TURNS: Final = 8
BACKLOG: Final = 4096

log = logging.getLogger("block.gateway")


class Gateway:
    """Start with ``start``, stop with ``drain`` (graceful) and ``close``; both may be called in any state."""

    def __init__(
        self, config: GatewayConfig, reload: Callable[[], GatewayConfig] | None = None, workers: Workers | None = None
    ) -> None:  # fmt: skip
        self.config = config
        self._reload, self._workers = reload, workers
        self._policy = policy_from(config.policy)
        self._rng = Random(config.seed)
        self._background: list[asyncio.Task[None]] = []
        self._servers: list[asyncio.Server] = []
        self._certificates = server_certificates(config)
        self._session: aiohttp.ClientSession | None = None
        self._estimator = (
            HeaderLengths() if self._policy.name.startswith("block-oracle") else _estimator(config.length_estimator)
        )
        self._request_log: RequestLog | None = None
        self.app: App
        self.port = self.admin_port = self.prometheus_port = 0

    # Start and stop

    async def start(self) -> None:
        """Listen and begin to watch the instances.

        Raises:
            ConfigError: the address is taken or cannot be bound, an instance cannot be used.
        """
        loop, config = asyncio.get_running_loop(), self.config
        metrics, pool = Metrics(), Pool(config)
        metrics.set_policy(self._policy.name)
        metrics.registry.register(LengthCollector(self._estimator))
        if config.log_requests is not None:
            self._request_log = RequestLog(
                config.log_requests, metrics, prompts=config.log_prompts,
                bytes_max=config.log_requests_bytes_max, files_max=config.log_requests_files_max,
            )  # fmt: skip
        self.ratio = PromptRatio()
        decider = Decider(config, pool, self._policy, self._estimator, metrics, self._rng)
        dispatcher = Dispatcher(config, pool, decider, self._lessons(metrics), metrics, loop)
        self.pool, self.dispatcher, self.decider, self.metrics = pool, dispatcher, decider, metrics
        self.members = Membership(config, pool, decider, dispatcher.lessons.residuals, metrics, self._rng)
        self.app = App(config, pool, dispatcher, self.members, self.ratio, metrics, loop)
        self.app.workers = self._workers
        dispatcher.tracing = Tracing() if config.tracing else None
        self.app.self_test = (
            self_test() if self._policy.rank.needs is Needs.PREDICTION and config.predict == "local" else None
        )
        self._watch = HangWatch(pool, decider.evidence, self.members.checks, config.hang_after_s)
        await self._listen(loop)
        verify = pool.tls.certificates.context if pool.tls.configured else True
        connector = aiohttp.TCPConnector(limit=0, ssl=verify)
        self._session = aiohttp.ClientSession(connector=connector, auto_decompress=False)
        if config.predict == "remote":
            decider.remote = RemotePredictors(pool, self._session, config.predict_timeout_s)
        self.members.begin(self._session)
        if self._workers is not None:
            self.members.catch_up(await self._workers.changes())
        self._background = [loop.create_task(self._sweep()), loop.create_task(self._look())]
        if config.service_discovery != "static":
            self._background.append(loop.create_task(follow(members_of(config), self.members, metrics)))
        if self._reload is not None:
            self._background.append(loop.create_task(self._watch_files(self._stamps())))

    def _lessons(self, metrics: Metrics) -> Lessons:
        lessons = Lessons(self._estimator, self.ratio, metrics, self._request_log)
        lessons.residuals = Residuals(self.config.prediction_level)
        return lessons

    async def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        config = self.config
        self.port = await self._open(loop, Surface.PUBLIC, config.host, config.port, "--port")
        if config.admin_port is not None:
            self.admin_port = await self._open(
                loop, Surface.ADMIN, config.admin_host, config.admin_port, "--admin-port"
            )
        if config.prometheus_port is not None:
            self.prometheus_port = await self._open(
                loop, Surface.METRICS, config.prometheus_host, config.prometheus_port, "--prometheus-port"
            )
        if self._workers is not None:
            server = await loop.create_unix_server(
                lambda: ClientConnection(self.app, Surface.WORKER), str(self._workers.socket)
            )
            self._servers.append(server)

    async def _open(
        self, loop: asyncio.AbstractEventLoop, surface: Surface, host: str, port: int, flag: str
    ) -> int:  # fmt: skip
        tls: dict[str, Any] = {}
        if self._certificates is not None:
            tls = {"ssl": self._certificates.context, "ssl_handshake_timeout": self.config.header_timeout_s or None}
        try:
            server = await loop.create_server(
                lambda: ClientConnection(self.app, surface), host, port, backlog=BACKLOG,
                reuse_port=self._workers is not None, **tls,
            )  # fmt: skip
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(f"Port {port} on {host} is in use: choose another with {flag}.") from error
            raise ConfigError(f"Cannot listen on {host}:{port}: {error.strerror or error}.") from error
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def drain(self) -> None:
        """Ready says no, connections without a request close, answers finish; after the grace period no more is waited."""
        self.dispatcher.draining = True
        self.dispatcher.holding.release()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.shutdown_grace_period_s):
                await self.dispatcher.idle()

    async def close(self) -> None:
        """Stop listening and end everything at once."""
        for server in self._servers:
            server.close()
        for client in list(self.app.connections):
            client.close_if_idle() if self.dispatcher.draining else client.abort()
        await asyncio.sleep(0)
        for client in list(self.app.connections):
            client.abort()
        tasks = [
            *self._background,
            *self.members.tasks(),
            *self.app.tasks,
            *self.dispatcher.tasks(),
        ]
        for task in tasks:
            task.cancel()
        self._watch.close()
        self.dispatcher.holding.close()
        self.dispatcher.learning.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.pool.close()
        if self._session is not None:
            await self._session.close()
        if self._workers is not None:
            await self._workers.close()
        self.dispatcher.books.settle()
        if self.dispatcher.tracing is not None:
            await asyncio.get_running_loop().run_in_executor(None, self.dispatcher.tracing.close)
        if self._request_log is not None:
            self._request_log.close()

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
        self.members.config = config
        self.members.reconcile(Origin.CONFIG, config.instances)

    async def _watch_files(self, seen: list[object]) -> None:
        """The configuration's file and the one of keys."""
        while True:
            await asyncio.sleep(FILE_CHECK_S)
            now = self._stamps()
            if now != seen and None not in now:
                self.reload()
                seen = now

    def _stamps(self) -> list[object]:
        return [stamp(file) for file in (self.config.config_file, self.config.api_key_file) if file is not None]

    def _renew_certificates(self) -> None:
        """Those whose files changed; what does not fit changes nothing and is tried again at the next look."""
        for each in (self._certificates, self.pool.tls):
            try:
                if each is not None and each.refresh():
                    self.metrics.reloads.labels("ok").inc()
                    log.info("the certificates were loaded again")
            except ConfigError as error:
                self.metrics.reloads.labels("invalid").inc()
                log.error("the certificates were not loaded again: %s", error)

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
            self.members.sweep()
            turn += 1
            if turn % 4 == 0 or self.dispatcher.draining:
                self._sweep_clients(now_s)
            if turn % CERTIFICATE_TURNS == 0:
                self._renew_certificates()

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
    config: GatewayConfig, reload: Callable[[], GatewayConfig] | None, started: Callable[[Gateway], None],
    workers: Workers | None = None, parent: int | None = None,
) -> None:  # fmt: skip
    """Serve until SIGTERM or SIGINT (drain; a second one ends at once); SIGHUP reloads.

    ``parent``: a pipe's end that tells by closing that the supervisor is gone, which ends this worker too.

    Raises:
        ConfigError: as ``Gateway.start``.
    """
    gateway = Gateway(config, reload, workers)
    await gateway.start()
    loop = asyncio.get_running_loop()
    stop, again = asyncio.Event(), asyncio.Event()

    def on_orphaned() -> None:
        assert parent is not None
        loop.remove_reader(parent)
        assert workers is not None
        workers.orphaned = True
        log.error("the supervisor is gone: this worker ends")
        stop.set()

    if parent is not None:
        loop.add_reader(parent, on_orphaned)

    def on_stop() -> None:
        (again if stop.is_set() else stop).set()

    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, on_stop)
    loop.add_signal_handler(signal.SIGHUP, gateway.reload)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})  # a supervisor holds it back until now
    try:
        await _first_checks(gateway)
        gc.collect()
        gc.freeze()  # what is there now stays: no later collection needs to look at it
        started(gateway)
        await stop.wait()
        log.info("draining: %d requests in flight", len(gateway.dispatcher.active))
        waiters = [loop.create_task(gateway.drain()), loop.create_task(again.wait())]
        await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
        for waiter in waiters:
            waiter.cancel()
    finally:
        await gateway.close()


async def _first_checks(gateway: Gateway) -> None:
    """Give the first health checks a moment, so that the first line printed is true."""
    for _ in range(int(1.0 / 0.02)):
        if all(i.state is not State.STARTING for i in gateway.pool.instances.values()):
            return
        await asyncio.sleep(0.02)


def check(config: GatewayConfig) -> None:
    """Whether a gateway could start with this configuration, as far as can be told without starting one.

    Raises:
        ConfigError: what is wrong.
    """
    Gateway(config)
    config.all_keys()
    tls = UpstreamTls(config)
    if tls.configured:
        _ = tls.certificates
    if config.service_discovery != "static":
        members_of(config)


def _estimator(name: str) -> Any:
    if name == "header":
        raise ConfigError("The length estimator 'header' belongs to the policy block-oracle alone.")
    return make_estimator(name)
