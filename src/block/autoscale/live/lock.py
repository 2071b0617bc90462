"""One autoscaler acts, the others stand by: who holds the lock leads."""

import fcntl
import os
from math import inf
from pathlib import Path
from typing import Protocol

from block.errors import ConfigError


class Lock(Protocol):
    """Asked before every decision is acted on. ``sure_until_s``: the monotonic time until which what `held` said is sure: this
    process may be stopped between the question and the act."""

    sure_until_s: float

    async def held(self) -> bool:
        """Whether this autoscaler leads now; takes the lock if it is free."""
        ...

    async def release(self) -> None: ...


class NoLock:
    """Always leads."""

    sure_until_s = inf

    async def held(self) -> bool:
        return True

    async def release(self) -> None:
        return


class FileLock:
    """An advisory lock on a file of this machine, let go by the system when its holder dies.

    A file that somebody removed (cleaners of temporary files do) is made and locked anew.
    """

    sure_until_s = inf

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, -1

    def check(self) -> None:
        """Raises ConfigError: the file could not be made. Makes none."""
        if self._path.is_dir() or not self._path.absolute().parent.is_dir():
            raise ConfigError(
                f"The lock file {self._path} cannot be made: its folder must exist, and it must be a file."
            )

    async def held(self) -> bool:
        """Raises ConfigError: the file cannot be made."""
        if self._file >= 0 and not self._is_there():
            await self.release()
        if self._file >= 0:
            return True
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"The lock file {self._path} cannot be opened: {error.strerror}.") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return False
        self._file = file
        return True

    def _is_there(self) -> bool:
        """Whether the path still names the file that is locked: another one could be locked by somebody else."""
        try:
            return os.path.samestat(os.fstat(self._file), self._path.stat())
        except OSError:
            return False

    async def release(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
