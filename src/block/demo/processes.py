"""Child processes that announce themselves with one JSON line, and are gone when the demo is."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from block.autoscale.actuators.child import Child
from block.errors import ConfigError

READY_WITHIN_S = 30.0
STOPPED_WITHIN_S = 6.0


@asynccontextmanager
async def block_process(
    arguments: Sequence[str], on_line: Callable[[bytes], None] | None = None
) -> AsyncIterator[dict[str, Any]]:
    """Run ``block ARGUMENTS`` until the block ends; yields what it printed as JSON when it was ready. ``on_line`` hears of each
    line that it prints after that.

    It gets no Ctrl-C of its own (it is stopped by leaving the block) and dies with this process, whatever kills that.

    Raises:
        ConfigError: it did not become ready; the message has its last words.
    """
    child = await Child.start([sys.executable, "-m", "block", *arguments], keep_stdout=True)
    listening: asyncio.Task[None] | None = None
    try:
        ready = await _announcement(child, arguments)
        if on_line is not None:
            listening = asyncio.create_task(_listen(child, on_line))
        yield ready
    finally:
        if listening is not None:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
        await child.stop(STOPPED_WITHIN_S)


async def _announcement(child: Child, arguments: Sequence[str]) -> dict[str, Any]:
    try:
        line = await asyncio.wait_for(child.stdout.readline(), READY_WITHIN_S)
    except TimeoutError:
        line = b""
    if not line:
        await child.stop(STOPPED_WITHIN_S)
        raise ConfigError(f"'block {arguments[0]}' did not start: {child.last_words()}")
    ready: dict[str, Any] = json.loads(line)
    return ready


async def _listen(child: Child, on_line: Callable[[bytes], None]) -> None:
    async for line in child.stdout:
        on_line(line)
