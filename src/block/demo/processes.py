"""Child processes that announce themselves with one JSON line, and are gone when the demo is."""

import asyncio
import ctypes
import json
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from block.errors import ConfigError

READY_WITHIN_S = 30.0
STOPPED_WITHIN_S = 3.0
_PR_SET_PDEATHSIG = 1


@asynccontextmanager
async def block_process(arguments: Sequence[str]) -> AsyncIterator[dict[str, Any]]:
    """Run ``block ARGUMENTS`` until the block ends; yields what it printed as JSON when it was ready.

    It gets no Ctrl-C of its own (it is stopped by leaving the block) and dies with this process, whatever kills that.

    Raises:
        ConfigError: it did not become ready; the message has its last words.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "block", *arguments,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        start_new_session=True, preexec_fn=_die_with_parent,
    )  # fmt: skip
    assert process.stderr is not None
    last_words: list[str] = []
    listening = asyncio.create_task(_listen(process.stderr, last_words))
    try:
        yield await _announcement(process, arguments, last_words)
    finally:
        await _stop(process)
        await listening


async def _announcement(
    process: asyncio.subprocess.Process, arguments: Sequence[str], last_words: list[str]
) -> dict[str, Any]:
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), READY_WITHIN_S)
    except TimeoutError:
        line = b""
    if not line:
        await _stop(process)
        words = " ".join(last_words[-3:]) or "it said nothing"
        raise ConfigError(f"'block {arguments[0]}' did not start: {words}")
    ready: dict[str, Any] = json.loads(line)
    return ready


async def _listen(stream: asyncio.StreamReader, last_words: list[str]) -> None:
    """Keep the pipe empty and the last lines in mind."""
    async for line in stream:
        last_words.append(line.decode(errors="replace").strip())
        del last_words[:-20]


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), STOPPED_WITHIN_S)
    except TimeoutError:
        process.kill()
        await process.wait()


def _die_with_parent() -> None:
    """In the child, before it runs: get SIGTERM when the parent dies (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
