"""``--workers N``: starts the worker processes, starts those again that died, hands signals on. No request passes through it.

Theory of operation. The supervisor binds the port without listening, so that it stays theirs while a worker is away, and forks
the workers; each listens on the same port (``SO_REUSEPORT``: the kernel spreads connections). The first is waited for before
the others start: what is wrong with the configuration is said once. A worker that dies is started again after a pause that
doubles with every death in a row. SIGTERM and SIGINT go to all, SIGHUP (reload) too. Every worker holds a pipe whose other end
only the supervisor has: if that dies, they notice, drain and end.
"""

import contextlib
import errno
import logging
import os
import select
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Final, NamedTuple

from msgspec import structs

from block.errors import ConfigError
from block.gateway.config import GatewayConfig

PAUSE_FIRST_S: Final = 0.2
PAUSE_LAST_S: Final = 10.0
STEADY_S: Final = 30.0
"""A worker that lived this long starts again with the first pause."""
READY_WITHIN_S: Final = 60.0
KILL_AFTER_S: Final = 10.0
"""Beyond the grace period."""
USER_ERROR: Final = 2

log = logging.getLogger("block.gateway")


class Place(NamedTuple):
    """What a worker is told: which one it is, where the sockets lie, the port, where to say ready, whose end to watch."""

    number: int
    directory: Path
    port: int
    admin_port: int | None
    prometheus_port: int | None
    ready: int
    parent: int

    def config(self, config: GatewayConfig) -> GatewayConfig:
        """The configuration as it is for this worker: the ports that were reserved, a request log of its own."""
        log_requests = config.log_requests and f"{config.log_requests}.{self.number}"
        return structs.replace(
            config, port=self.port, admin_port=self.admin_port, prometheus_port=self.prometheus_port,
            log_requests=log_requests,
        )  # fmt: skip

    def say_ready(self, instances: int) -> None:
        """It listens, with so many instances ready."""
        os.write(self.ready, b"%d %d\n" % (self.number, instances))


class _Worker:
    def __init__(self, index: int) -> None:
        self.index = index
        self.pid: int | None = None
        self.since_s = 0.0
        self.pause_s = PAUSE_FIRST_S
        self.due_s: float | None = None
        """When to start it again."""


class Supervisor:
    """``run`` blocks until all workers have ended. ``serve`` is a worker's life; it runs in the child and returns its exit code.

    ``refresh`` is called before a worker starts and on SIGHUP: a worker that is started again shall have the configuration that
    the others have by then.
    """

    def __init__(
        self, config: GatewayConfig, serve: Callable[[Place], int], refresh: Callable[[], None]
    ) -> None:  # fmt: skip
        self._serve, self._refresh, self._grace_s = serve, refresh, config.shutdown_grace_period_s
        self._sockets: list[socket.socket] = []
        self.port = self._reserve(config.host, config.port, "--port")
        self.admin_port = self.prometheus_port = None
        if config.admin_port is not None:
            self.admin_port = self._reserve(config.admin_host, config.admin_port, "--admin-port")
        if config.prometheus_port is not None:
            self.prometheus_port = self._reserve(config.prometheus_host, config.prometheus_port, "--prometheus-port")
        self._workers = [_Worker(index) for index in range(config.workers)]
        self._directory = Path(tempfile.mkdtemp(prefix="block-serve-"))
        self._ready = os.pipe()
        self._life = os.pipe()
        self._wake = os.pipe()
        self._signals: list[int] = []
        self._stopping_s: float | None = None

    def _reserve(self, host: str, port: int, flag: str) -> int:
        self._sockets.append(reserved(host, port, flag))
        return int(self._sockets[-1].getsockname()[1])

    def run(self, started: Callable[[int], None]) -> int:
        """Until told to stop; the exit code. ``started`` is called once, with the instances that the first worker found ready."""
        for end in (*self._wake, self._ready[0]):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._wake[1], warn_on_full_buffer=False)
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(name, self._note)
        try:
            code = self._start_first(started)
            return code if code is not None else self._keep()
        finally:
            self._end()

    def _start_first(self, started: Callable[[int], None]) -> int | None:
        """The first worker, and when it is ready the others; an exit code if it does not get that far."""
        first = self._workers[0]
        self._spawn(first)
        deadline_s = monotonic() + READY_WITHIN_S
        ready = b""
        while b"\n" not in ready:
            self._wait(0.2)
            self._hand_on()
            code = self._reaped().get(first.index)
            if code is not None:
                return code if self._stopping_s is None else 0
            if monotonic() > deadline_s:
                log.error("the first worker is not ready after %g s", READY_WITHIN_S)
                return 1
            with contextlib.suppress(BlockingIOError):
                ready += os.read(self._ready[0], 4096)
        if self._stopping_s is None:
            for worker in self._workers[1:]:
                self._spawn(worker)
        started(int(ready.split()[1]))
        return None

    def _keep(self) -> int:
        """Start again who dies, until told to stop; then until nobody is left."""
        while True:
            self._wait(self._pause_s())
            self._hand_on()
            with contextlib.suppress(BlockingIOError):
                os.read(self._ready[0], 65536)
            for index, code in self._reaped().items():
                if self._stopping_s is None:
                    self._put_off(self._workers[index], code)
            if self._stopping_s is None:
                for worker in self._workers:
                    if worker.due_s is not None and worker.due_s <= monotonic():
                        self._spawn(worker)
            elif all(worker.pid is None for worker in self._workers):
                return 0
            elif monotonic() > self._stopping_s + self._grace_s + KILL_AFTER_S:
                self._signal(signal.SIGKILL)

    def _pause_s(self) -> float:
        due = [worker.due_s for worker in self._workers if worker.due_s is not None]
        return min(1.0, max(0.0, min(due) - monotonic())) if due and self._stopping_s is None else 1.0

    def _wait(self, seconds: float) -> None:
        """Until a signal comes, a worker says something, or the time is over."""
        readable, _, _ = select.select([self._wake[0], self._ready[0]], [], [], seconds)
        if self._wake[0] in readable:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake[0], 4096)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            self._signals.append(number)

    def _hand_on(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            if number == signal.SIGHUP:
                self._refresh()
            if number != signal.SIGHUP and self._stopping_s is None:
                self._stopping_s = monotonic()
            self._signal(number)

    def _signal(self, number: int) -> None:
        for worker in self._workers:
            if worker.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, number)

    def _reaped(self) -> dict[int, int]:
        """Exit codes of workers that ended, by their index."""
        ended = {}
        for worker in self._workers:
            if worker.pid is None:
                continue
            pid, status = os.waitpid(worker.pid, os.WNOHANG)
            if pid:
                worker.pid = None
                ended[worker.index] = os.waitstatus_to_exitcode(status)
        return ended

    def _put_off(self, worker: _Worker, code: int) -> None:
        if monotonic() - worker.since_s > STEADY_S:
            worker.pause_s = PAUSE_FIRST_S
        worker.due_s = monotonic() + worker.pause_s
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        log.error("worker %d ended %s; it starts again in %g s", worker.index, how, worker.pause_s)
        worker.pause_s = min(2 * worker.pause_s, PAUSE_LAST_S)

    def _spawn(self, worker: _Worker) -> None:
        worker.due_s, worker.since_s = None, monotonic()
        (self._directory / f"{worker.index}.sock").unlink(missing_ok=True)
        self._refresh()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # until the worker can listen to it
        pid = os.fork()
        if pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
            worker.pid = pid
            return
        code = 1
        try:
            code = self._be(worker.index)
        finally:
            os._exit(code)

    def _be(self, index: int) -> int:
        """A worker, from the fork to its end."""
        signal.set_wakeup_fd(-1)
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(name, signal.SIG_DFL)
        for end in (self._life[1], *self._wake, self._ready[0]):
            os.close(end)
        for each in self._sockets:
            each.close()
        return self._serve(
            Place(
                index, self._directory, self.port, self.admin_port, self.prometheus_port, self._ready[1], self._life[0]
            )
        )

    def _end(self) -> None:
        signal.set_wakeup_fd(-1)
        self._signal(signal.SIGKILL)
        for worker in self._workers:
            if worker.pid is not None:
                os.waitpid(worker.pid, 0)
        for each in self._sockets:
            each.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def reserved(host: str, port: int, flag: str = "--port") -> socket.socket:
    """A socket that keeps the port for this user's workers and does not listen itself.

    Raises:
        ConfigError: the port is taken (by another gateway's workers too), or there is no such address.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:  # not shared: fails where others share the port already
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            address = probe.getsockname()
        kept = socket.socket(family, kind, protocol)
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        kept.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"Port {port} on {host} is in use: choose another with {flag}.") from error
        raise ConfigError(f"Cannot listen on {host}:{port}: {error.strerror or error}.") from error
    return kept
