"""Where a predictor gets an engine's state from: the seam that every kind of source fits."""

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final, Protocol

from block.errors import ConfigError, UnknownNameError
from block.predict.snapshot import HEADER
from block.predictor.shared_memory import SnapshotReader

BUSY_S: Final = 1.0  # a busy engine is looked at often for this long after its last snapshot
BUSY_SLEEP_S: Final = 0.001
_COUNTS: Final = struct.Struct("<ii")  # the header's running and waiting
_COUNTS_AT: Final[int] = HEADER.fields["running"][1] if HEADER.fields else 0
IDLE_SLEEP_S: Final = 0.010
ALIVE_EVERY_S: Final = 0.25


class StateSource(Protocol):
    """One engine's state as it changes.

    ``frames`` yields encoded snapshots (``predict.snapshot``), newest wins: what came while nobody asked is skipped.
    It never ends by itself: an engine that is gone may come back. ``problem`` is one sentence while the engine cannot
    be seen, else ``None``.
    """

    problem: str | None

    def frames(self) -> AsyncIterator[bytes]: ...


class SharedMemorySource:
    """What an engine on this host publishes (the emulator, or vLLM with Block's plugin).

    Sleeps ``min_interval_s`` after every snapshot, then looks every millisecond, or every ten while the engine has no
    requests or has been silent for a while.
    """

    def __init__(self, name: str, min_interval_s: float = 0.005) -> None:
        self._name = name
        self._reader = SnapshotReader(name)
        self._min_interval_s = min_interval_s
        self.problem: str | None = f"no engine publishes as {name!r} yet"

    async def frames(self) -> AsyncIterator[bytes]:
        alive_s, busy_until_s = -ALIVE_EVERY_S, 0.0
        try:
            while True:
                now_s = time.monotonic()
                if now_s - alive_s >= ALIVE_EVERY_S:
                    self._look_alive()
                    alive_s = now_s
                frame = self._reader.read()
                if frame is not None:
                    busy_until_s = now_s + BUSY_S if _has_requests(frame) else 0.0
                    if self.problem is not None:
                        self._look_alive()  # it came, or came back, since the last look
                    if self.problem is None:
                        yield frame
                    await asyncio.sleep(max(self._min_interval_s, BUSY_SLEEP_S))
                else:
                    await asyncio.sleep(BUSY_SLEEP_S if now_s < busy_until_s else IDLE_SLEEP_S)
        finally:
            self._reader.close()

    def _look_alive(self) -> None:
        if self._reader.alive():
            self.problem = None
        elif self.problem is None:
            self.problem = f"the engine that published as {self._name!r} is gone"


def _has_requests(frame: bytes) -> bool:
    return len(frame) >= HEADER.itemsize and any(_COUNTS.unpack_from(frame, _COUNTS_AT))


def _metrics(where: str, min_interval_s: float) -> StateSource:
    from block.predictor.sources.metrics import MetricsSource

    return MetricsSource(where, min_interval_s)


SOURCES: Final[Mapping[str, Callable[[str, float], StateSource]]] = {
    "emulate": SharedMemorySource,
    "vllm": SharedMemorySource,
    "shm": SharedMemorySource,
    "metrics": _metrics,
}
"""Makers by the word before the colon; each takes what stands after it and the shortest interval in seconds."""


def open_source(text: str, min_interval_s: float = 0.005) -> StateSource:
    """The source that ``KIND:WHERE`` names, e.g. ``emulate:a``.

    Raises:
        UnknownNameError: no source of that kind.
        ConfigError: nothing after the colon.
        BadInputError: the name cannot be one.
    """
    kind, colon, where = text.partition(":")
    if kind not in SOURCES:
        raise UnknownNameError("source", kind, [f"{name}:{'URL' if name == 'metrics' else 'NAME'}" for name in SOURCES])
    if not colon or not where:
        raise ConfigError(f"Say which engine: --source {kind}:NAME.")
    return SOURCES[kind](where, min_interval_s)
