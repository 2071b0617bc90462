"""Child processes: started with a tail of their words kept, stopped for sure, gone when this process is."""

import asyncio
import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

from block.errors import ActuatorError

_PR_SET_PDEATHSIG: Final = 1
SECRETS: Final = frozenset({"BLOCK_ADMIN_KEY", "BLOCK_API_KEYS"})
"""What children have no use for."""
LISTEN_S: Final = 0.3
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before any fork


class Child:
    """One process in a session of its own: it hears no Ctrl-C and dies with this process, whatever kills that (Linux)."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.words: deque[str] = deque(maxlen=20)
        """The last lines that it wrote to stderr."""
        assert process.stderr is not None
        self._listening = asyncio.create_task(self._listen(process.stderr))

    @classmethod
    async def start(
        cls, command: Sequence[str], *, environment: Mapping[str, str] | None = None, keep_stdout: bool = False,
        keep_stdin: bool = False,
    ) -> "Child":  # fmt: skip
        """Run a command; ``keep_stdout``: its output is for ``stdout``, else for nobody; ``keep_stdin``: it can be told something.

        Raises:
            ActuatorError: there is no such program, or it cannot be run.
        """
        inherited = {name: value for name, value in os.environ.items() if name not in SECRETS}
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE if keep_stdin else asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE if keep_stdout else asyncio.subprocess.DEVNULL,
                env={**inherited, **(environment or {})}, start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip
        except (OSError, ValueError) as error:  # the latter: a zero byte in an argument
            raise ActuatorError(
                f"{command[0]!r} cannot be run: {getattr(error, 'strerror', None) or error}."
            ) from error
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stdout(self) -> asyncio.StreamReader:
        assert self._process.stdout is not None
        return self._process.stdout

    @property
    def ended(self) -> bool:
        return self._process.returncode is not None

    async def tell(self, text: bytes) -> None:
        """Write to its standard input and close it; no error if it does not listen."""
        assert self._process.stdin is not None
        with suppress(ConnectionError, RuntimeError):  # the latter is uvloop's where it has ended already
            self._process.stdin.write(text)
            await self._process.stdin.drain()
        self._process.stdin.close()

    def last_words(self) -> str:
        """What it said at the end, on one line."""
        return " ".join(list(self.words)[-3:]) or "it said nothing"

    async def wait(self) -> int:
        """Until it ends; its exit code. Its last words are in by then, unless others go on writing in its place."""
        code = await self._process.wait()
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._listening), LISTEN_S)
        return code

    async def stop(self, within_s: float) -> None:
        """SIGTERM, and SIGKILL to its whole session after ``within_s``. Returns when it is gone."""
        try:
            if not self.ended:
                with suppress(ProcessLookupError):
                    self._process.send_signal(signal.SIGTERM)
                try:
                    await asyncio.wait_for(self._process.wait(), within_s)
                except TimeoutError:
                    self.kill()
                    await self._process.wait()
        except asyncio.CancelledError:
            self.kill()
            raise
        finally:
            self.kill()  # what it left in its session
            with suppress(TimeoutError):
                await asyncio.wait_for(self._listening, 1.0)

    def kill(self) -> None:
        """End its whole session at once."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _listen(self, stream: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # a line longer than the reader keeps
                continue
            if not line:
                return
            self.words.append(line.decode(errors="replace").strip())


def _die_with_parent() -> None:
    """In the child, before it runs: get SIGTERM when the parent dies."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
