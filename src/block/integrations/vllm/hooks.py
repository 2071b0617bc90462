"""Wrapping a scheduler class so that a publisher sees each step, and so that nothing it does can hurt the engine."""

import functools
import logging
import time
from collections.abc import Callable
from multiprocessing import util
from pathlib import Path
from typing import Any, Protocol

from block.integrations.vllm.publisher import StatePublisher
from block.integrations.vllm.trace import TraceRecorder
from block.predictor.shared_memory import remove_stale_files

log = logging.getLogger("vllm.block")

_INSTALLED = "_block_installed"
_WATCHER = "_block_watcher"


class Watcher(Protocol):
    """Sees a scheduler's life. Times are wall-clock seconds: ``schedule()`` was entered, results came in."""

    def arrived(self, request: Any) -> None: ...
    def preempted(self, request: Any) -> None: ...
    def scheduled(self, scheduler: Any, output: Any, started_s: float) -> None: ...
    def updated(self, scheduler: Any, output: Any, finished_s: float) -> None: ...
    def close(self) -> None: ...


def install(cls: Any, make_watcher: Callable[[Any], Watcher | None]) -> None:
    """Wrap the class's methods, once; each scheduler made from now on gets its own watcher (``None``: unwatched)."""
    if getattr(cls, _INSTALLED, False):
        return
    setattr(cls, _INSTALLED, True)
    init, schedule, update, add = cls.__init__, cls.schedule, cls.update_from_output, cls.add_request

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it takes the place of one
        init(self, *args, **kwargs)
        setattr(self, _WATCHER, None)
        _guarded(self, lambda: setattr(self, _WATCHER, make_watcher(self)))

    @functools.wraps(schedule)
    def watched_schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        started_s = time.time()
        output = schedule(self, *args, **kwargs)
        watcher = self._block_watcher
        if watcher is not None:
            _guarded(self, lambda: watcher.scheduled(self, output, started_s))
        return output

    @functools.wraps(update)
    def watched_update(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        finished_s = time.time()
        result = update(self, scheduler_output, *args, **kwargs)
        watcher = self._block_watcher
        if watcher is not None:
            _guarded(self, lambda: watcher.updated(self, scheduler_output, finished_s))
        return result

    @functools.wraps(add)
    def watched_add(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        result = add(self, request, *args, **kwargs)
        watcher = self._block_watcher
        if watcher is not None:
            _guarded(self, lambda: watcher.arrived(request))
        return result

    cls.__init__, cls.schedule, cls.update_from_output, cls.add_request = (
        __init__,
        watched_schedule,
        watched_update,
        watched_add,
    )
    if hasattr(cls, "_preempt_request"):  # before 0.12 preemption has no method of its own
        _install_preempt(cls)
    if hasattr(cls, "shutdown"):
        _install_shutdown(cls)


def _install_preempt(cls: Any) -> None:
    preempt = cls._preempt_request

    @functools.wraps(preempt)
    def watched_preempt(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        result = preempt(self, request, *args, **kwargs)
        watcher = self._block_watcher
        if watcher is not None:
            _guarded(self, lambda: watcher.preempted(request))
        return result

    cls._preempt_request = watched_preempt


def _install_shutdown(cls: Any) -> None:
    shutdown = cls.shutdown

    @functools.wraps(shutdown)
    def watched_shutdown(self: Any, *args: Any, **kwargs: Any) -> Any:
        watcher, self._block_watcher = self._block_watcher, None
        if watcher is not None:
            _close_quietly(watcher)
        return shutdown(self, *args, **kwargs)

    cls.shutdown = watched_shutdown


def _guarded(scheduler: Any, action: Callable[[], None]) -> None:
    """Run the watcher's part; if it fails, the engine goes on without a watcher."""
    try:
        action()
    except Exception as error:  # noqa: BLE001 - the outermost place inside somebody else's process
        watcher = getattr(scheduler, _WATCHER, None)
        setattr(scheduler, _WATCHER, None)
        log.warning(
            "Block stops publishing this engine's state: %s: %s. The engine goes on.", type(error).__name__, error
        )
        if watcher is not None:
            _close_quietly(watcher)


def _close_quietly(watcher: Watcher) -> None:
    try:
        watcher.close()
    except Exception as error:  # noqa: BLE001 - the outermost place inside somebody else's process
        log.warning("Block could not remove its shared memory: %s", error)


class Watchers:
    """Several watchers as one."""

    def __init__(self, parts: list[Any]) -> None:
        self._parts = parts

    def arrived(self, request: Any) -> None:
        for part in self._parts:
            part.arrived(request)

    def preempted(self, request: Any) -> None:
        for part in self._parts:
            part.preempted(request)

    def scheduled(self, scheduler: Any, output: Any, started_s: float) -> None:
        for part in self._parts:
            part.scheduled(scheduler, output, started_s)

    def updated(self, scheduler: Any, output: Any, finished_s: float) -> None:
        for part in self._parts:
            part.updated(scheduler, output, finished_s)

    def close(self) -> None:
        for part in self._parts:
            part.close()


def attach(scheduler: Any, name: str, waiting_max: int, trace: Path | None, version: str) -> Watcher:
    """A publisher (and, if asked for, a recorder) for one scheduler; its file disappears with the process."""
    rank = data_parallel_rank(scheduler)
    if rank:
        name = f"{name}-dp{rank}"
    remove_stale_files()
    watcher: Watcher = StatePublisher(scheduler, name, waiting_max=waiting_max)
    if trace is not None:
        path = trace.with_name(f"{trace.name}.dp{rank}") if rank else trace
        watcher = Watchers([watcher, TraceRecorder(path, scheduler, version)])
    # vLLM's engine processes are multiprocessing children, in which atexit functions do not run but these do.
    util.Finalize(None, _close_quietly, args=(watcher,), exitpriority=10)
    log.info("Block publishes this engine's state as %r (vLLM %s).", name, version)
    return watcher


def data_parallel_rank(scheduler: Any) -> int:
    """Which data-parallel rank this scheduler serves; each rank is an instance of its own."""
    parallel = scheduler.vllm_config.parallel_config
    rank = getattr(parallel, "data_parallel_index", None)
    return int(getattr(parallel, "data_parallel_rank", 0) if rank is None else rank)
