"""Snapshots in shared memory: one writer (inside the engine), any number of readers, newest wins.

A seqlock: the writer makes the counter odd, writes, makes it even; a reader copies and repeats if the counter moved
or was odd. Nobody ever waits for a reader. The writer holds an exclusive ``flock`` on its file as long as its process
lives, so a reader can tell a living engine from a dead one's file, in another container too.

File layout, native byte order: counter u64, writer's pid u64, length u64, then the snapshot's bytes.
"""

import fcntl
import mmap
import os
import struct
import time
from pathlib import Path
from typing import Final

from block.errors import BadInputError

# Native structs copy a u64 in one go, so that a counter is never seen half written.
_HEAD: Final = struct.Struct("@QQQ")
_U64: Final = struct.Struct("@Q")
_LENGTH_AT: Final = 16
_ATTEMPTS: Final = 100
_DIRECTORY: Final = Path("/dev/shm")


def snapshot_path(name: str) -> Path:
    """Where the snapshots of the engine called ``name`` lie.

    Raises:
        BadInputError: the name would leave the directory.
    """
    if not name or "/" in name or "\0" in name or name.startswith("."):
        raise BadInputError(f"{name!r} cannot name an engine's shared memory: use letters, digits, '-' and '_'.")
    return _DIRECTORY / f"block-{name}.state"


class SnapshotWriter:
    """Owns the file from construction to ``close``; a dead engine's file of the same name is replaced.

    ``capacity``: bytes of the largest snapshot.

    Raises:
        BadInputError: another live process publishes under this name, or the file cannot be made.
    """

    def __init__(self, name: str, capacity: int = 1 << 20) -> None:
        self.path = snapshot_path(name)
        self._capacity = capacity
        self._counter = 0
        taken = f"Another live engine publishes as {name!r}: give this one another name."
        if owner_alive(self.path):
            raise BadInputError(taken)
        try:
            self.path.unlink(missing_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError as error:
            raise BadInputError(taken) from error
        except OSError as error:
            raise BadInputError(f"Cannot make {self.path}: {error.strerror}.") from error
        _lock_own(self._fd)
        os.ftruncate(self._fd, _HEAD.size + capacity)
        self._map = mmap.mmap(self._fd, _HEAD.size + capacity)
        _HEAD.pack_into(self._map, 0, 0, os.getpid(), 0)

    def write(self, snapshot: bytes) -> None:
        """Publish; raises ``ValueError`` when the snapshot is larger than the capacity."""
        if len(snapshot) > self._capacity:
            raise ValueError(f"a snapshot of {len(snapshot)} bytes exceeds the capacity of {self._capacity}")
        view, at = self._map, _HEAD.size
        _U64.pack_into(view, 0, self._counter + 1)
        _U64.pack_into(view, _LENGTH_AT, len(snapshot))
        view[at : at + len(snapshot)] = snapshot
        self._counter += 2
        _U64.pack_into(view, 0, self._counter)

    def close(self) -> None:
        """Remove the file, unless another engine has replaced it since. Closing twice does nothing."""
        if self._fd < 0:
            return
        if _inode(self.path) == os.fstat(self._fd).st_ino:
            self.path.unlink(missing_ok=True)
        self._map.close()
        os.close(self._fd)
        self._fd = -1


class SnapshotReader:
    """Reads what a writer of this name publishes; follows it across restarts when ``alive`` is called now and then."""

    def __init__(self, name: str) -> None:
        self.path = snapshot_path(name)
        self._map: mmap.mmap | None = None
        self._inode: int | None = None
        self._seen = 0

    def read(self) -> bytes | None:
        """The newest snapshot, or ``None`` if there is none or it was already read. Costs microseconds."""
        if self._map is None and not self._open():
            return None
        view = self._map
        assert view is not None
        for _ in range(_ATTEMPTS):
            counter, _pid, length = _HEAD.unpack_from(view, 0)
            if counter in (0, self._seen):
                return None
            if counter & 1 or _HEAD.size + length > len(view):
                continue
            copy = view[_HEAD.size : _HEAD.size + length]
            if _U64.unpack_from(view, 0)[0] == counter:
                self._seen = counter
                return copy
        return None

    def alive(self) -> bool:
        """Whether the writer's process lives; reopens the file when it was replaced by a new engine's."""
        if _inode(self.path) != self._inode:
            self.close()
        return owner_alive(self.path)

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
        self._map, self._seen, self._inode = None, 0, None

    def _open(self) -> bool:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            stat = os.fstat(fd)
            if stat.st_size <= _HEAD.size:
                return False  # its writer has not come that far
            self._map = mmap.mmap(fd, stat.st_size, prot=mmap.PROT_READ)
            self._inode = stat.st_ino
        finally:
            os.close(fd)
        return True


def owner_alive(path: Path) -> bool:
    """Whether the process that made this snapshot file still lives: it holds the file's lock."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)  # gives a lock just taken back
    return False


def remove_stale_files() -> list[Path]:
    """Delete the snapshot files of engines that are gone; returns what was deleted."""
    stale = [p for p in _DIRECTORY.glob("block-*.state") if not owner_alive(p)]
    for path in stale:
        path.unlink(missing_ok=True)
    return stale


def _lock_own(fd: int) -> None:
    """Lock a file just made; a reader may be holding it for the moment of its look."""
    for _ in range(_ATTEMPTS):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.001)
        else:
            return
    raise BadInputError("The lock of a snapshot file just made is held by somebody else: choose another name.")


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None
