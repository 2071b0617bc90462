"""The vLLM plugin: publishes the scheduler's state into shared memory, from inside an unmodified engine.

Installed beside vLLM it is found through the entry point ``vllm.general_plugins``; where entry points cannot be used,
``--scheduler-cls block.integrations.vllm.make_scheduler`` does the same. vLLM loads plugins in every process, so
``register`` only wraps methods of the scheduler class; the one process that makes a scheduler publishes. Needs msgspec
and numpy, nothing compiled. Options come from the environment, because vLLM hands plugins nothing else; they are read
here and nowhere else:

- ``BLOCK_VLLM_NAME``: the instance's name (default ``vllm``; data-parallel rank r > 0 adds ``-dp<r>``)
- ``BLOCK_VLLM_WAITING``: waiting requests described one by one (default 128); beyond, only their number and tokens
- ``BLOCK_VLLM_TRACE``: also record every decision into this file (see ``trace``)
- ``BLOCK_VLLM_EMULATE``: a step-time profile: replace the forward pass by its latency (see ``emulated_gpu``)
- ``BLOCK_VLLM_CALM=1``: for tests on few cores: sleep where vLLM's message queues spin
- ``BLOCK_VLLM_OFF=1``: do nothing
"""

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from block.integrations.vllm.hooks import attach, install

log = logging.getLogger("vllm.block")


class PluginOptions(NamedTuple):
    """What the environment says; see the module's docstring."""

    name: str = "vllm"
    waiting_max: int = 128
    trace: Path | None = None
    emulate: bool = False
    calm: bool = False
    off: bool = False


def options_from(environment: Mapping[str, str]) -> PluginOptions:
    """The plugin's options; a value that makes no sense is an error that names the variable.

    Raises:
        ValueError: ``BLOCK_VLLM_WAITING`` is not a number from 0 to 16000.
    """
    waiting = environment.get("BLOCK_VLLM_WAITING", "128")
    if not waiting.isdigit() or int(waiting) > 16_000:
        raise ValueError(f"BLOCK_VLLM_WAITING must be a number from 0 to 16000, not {waiting!r}")
    trace = environment.get("BLOCK_VLLM_TRACE")
    return PluginOptions(
        name=environment.get("BLOCK_VLLM_NAME") or "vllm",
        waiting_max=int(waiting),
        trace=Path(trace) if trace else None,
        emulate=bool(environment.get("BLOCK_VLLM_EMULATE")),
        calm=environment.get("BLOCK_VLLM_CALM") == "1",
        off=environment.get("BLOCK_VLLM_OFF") == "1",
    )


def register() -> None:
    """The entry point: vLLM calls it in each of its processes. Never raises: an engine must start without us too."""
    try:
        options = options_from(os.environ)
        if options.calm:
            _calm_message_queues()
        if options.emulate:
            from block.integrations.vllm.emulated_gpu import emulate_gpu

            emulate_gpu()
        refusal = refusal_for(_vllm_version())
        if options.off or refusal:
            if refusal:
                log.warning("Block does not publish this engine's state: %s", refusal)
            return
        from vllm.v1.core.sched.scheduler import Scheduler

        install(
            Scheduler,
            lambda scheduler: attach(scheduler, options.name, options.waiting_max, options.trace, _vllm_version()),
        )
    except Exception as error:  # noqa: BLE001 - the outermost place inside somebody else's process
        log.warning("Block does not publish this engine's state: %s: %s", type(error).__name__, error)


def make_scheduler(*args: Any, **kwargs: Any) -> Any:
    """For ``--scheduler-cls``: vLLM's own scheduler, synchronous or asynchronous as configured, with the plugin on."""
    config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
    register()
    if getattr(config.scheduler_config, "async_scheduling", False):
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler

        return AsyncScheduler(*args, **kwargs)
    from vllm.v1.core.sched.scheduler import Scheduler

    return Scheduler(*args, **kwargs)


def refusal_for(version: str) -> str | None:
    """Why this version of vLLM cannot be watched; ``None`` if it can or nothing speaks against trying."""
    parts = version.split(".")
    if len(parts) < 2 or not (parts[0].isdigit() and parts[1].isdigit()):
        return None  # a development build: its scheduler is looked at instead
    release = int(parts[0]), int(parts[1])
    if (0, 0) < release < (0, 10):
        return f"vLLM {version} is too old, 0.10 or newer is needed."
    return None


def _vllm_version() -> str:
    import vllm

    return str(getattr(vllm, "__version__", "unknown"))


def _calm_message_queues() -> None:
    from vllm.distributed.device_communicators import shm_broadcast

    shm_broadcast.sched_yield = lambda: time.sleep(1e-4)
