"""``block predictor`` as a running program: the source read, the routes served."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable

from block.errors import BadInputError
from block.predictor.selftest import self_test
from block.predictor.server import Predictor
from block.predictor.serving import serve_until_stopped
from block.predictor.source import StateSource
from block.predictor.state import InstanceState
from block.steptime.calibrate import Calibration
from block.steptime.profile import StepTimeProfile

log = logging.getLogger("block.predictor")


async def run_predictor(
    source: StateSource, profile: StepTimeProfile, bound: socket.socket, on_ready: Callable[[], None], *,
    speed: float = 1.0, min_interval_s: float = 0.005, stale_after_s: float = 3.0,
    calibrating: bool = True, stop: asyncio.Event | None = None,
) -> None:  # fmt: skip
    """Serve one engine's snapshots and what-ifs on a bound socket until stopped; ``calibrating``: learn its speed meanwhile."""
    calibration = Calibration(profile, 1.0 / speed) if calibrating else None
    state = InstanceState(profile, speed=speed, stale_after_s=stale_after_s, calibration=calibration)
    predictor = Predictor(state, source, self_test(profile), min_interval_s)
    following = asyncio.create_task(follow(source, state))
    try:
        await serve_until_stopped(predictor.app(), bound, on_ready, stop)
    finally:
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following


async def follow(source: StateSource, state: InstanceState) -> None:
    """Feed the state from its source, for ever; a frame that is no snapshot is left out and said once."""
    said = ""
    async for frame in source.frames():
        try:
            state.take(frame)
        except BadInputError as error:
            if str(error) != said:
                said = str(error)
                log.warning("left out a frame of the source: %s", said)
