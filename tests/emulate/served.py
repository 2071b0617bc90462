"""Emulated engines for tests: in the test's own event loop, on a free port, with a profile of our own."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

from block.emulate.config import EmulateConfig
from block.emulate.program import emulate
from block.predictor.serving import bind, url_of
from predictor.profile import PROFILE

__all__ = ["PROFILE", "serving"]


@contextlib.asynccontextmanager
async def serving(config: EmulateConfig) -> AsyncIterator[str]:
    """The base URL of an emulated engine that runs meanwhile."""
    ready, stop = asyncio.Event(), asyncio.Event()
    bound: socket.socket
    with bind(config.host, 0) as bound:
        task = asyncio.create_task(emulate(config, bound, ready.set, stop))
        waiting = asyncio.create_task(ready.wait())
        try:
            await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            yield url_of(bound)
        finally:
            waiting.cancel()
            stop.set()
            await task
