"""The emulated engine's snapshots in shared memory, like those of the vLLM plugin."""

import asyncio
import time
from collections.abc import Container
from typing import Final

from block.emulate.pace import PausableClock
from block.engine.pipeline import Engine
from block.predict.capture import Recorder, cached_keys, size_max
from block.predictor.shared_memory import SnapshotWriter

HEARTBEAT_S: Final = 0.5  # published at least this often, so that a reader can tell an idle engine from a hung one
CACHED_KEYS_EVERY_S: Final = 0.1  # collecting the prefix cache's contents costs more than the rest


class Publisher:
    """Writes a snapshot when the engine has changed, at most every ``min_interval_s`` of wall time; newest wins.

    ``exact`` holds the keys of the requests whose output the client fixed; its owner keeps it up to date. While the
    engine's clock is paused (a hang) nothing is published. ``cached_blocks``: put the prefix cache's contents in, 8
    bytes a block.

    Raises:
        BadInputError: another live engine publishes under this name.
    """

    def __init__(
        self, engine: Engine, clock: PausableClock, name: str, exact: Container[int], *,
        min_interval_s: float = 0.002, cached_blocks: bool = False,
    ) -> None:  # fmt: skip
        self._engine, self._clock, self._exact = engine, clock, exact
        self._writer = SnapshotWriter(name, size_max(engine.limits, cached_blocks))
        self._min_interval_s = min_interval_s
        self._recorder = Recorder(engine, epoch=time.time_ns())
        self._written_s = -1.0
        self._cached_s = -1.0
        self._cached = cached_keys(engine) if cached_blocks else None
        self._later: asyncio.TimerHandle | None = None

    def engine_changed(self) -> None:
        """Publish now, or as soon as the interval allows; within a running event loop."""
        if self._later is not None:
            return
        wait_s = self._written_s + self._min_interval_s - time.monotonic()
        if wait_s > 0:
            self._later = asyncio.get_running_loop().call_later(wait_s, self._publish_late)
        else:
            self.publish()

    def publish(self) -> None:
        """Write a snapshot of this moment."""
        if self._clock.paused:
            return
        monotonic_s = time.monotonic()
        if self._cached is not None and monotonic_s >= self._cached_s + CACHED_KEYS_EVERY_S:
            self._cached, self._cached_s = cached_keys(self._engine), monotonic_s
        now_s = self._clock.now_s()
        self._writer.write(self._recorder.capture(now_s, time.time() - now_s, self._exact, self._cached))
        self._written_s = monotonic_s

    async def beat(self) -> None:
        """Keep publishing an engine that does nothing, until cancelled."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self.engine_changed()

    def close(self) -> None:
        """Remove the snapshots; readers then see that the engine is gone."""
        if self._later is not None:
            self._later.cancel()
        self._writer.close()

    def _publish_late(self) -> None:
        self._later = None
        self.publish()
