"""Snapshots in shared memory: one writer (inside the engine), any number of readers, newest wins.

A seqlock: the writer makes the counter odd, writes, makes it even; a reader copies and repeats if the counter moved or
was odd. Nobody ever waits for a reader. A file of a process that is gone is told by its pid and its start time.

File layout: counter u64, pid u64, process start time u64 (clock ticks since boot), length u64, then the snapshot's bytes.
"""

import mmap
import os
import struct
from pathlib import Path

from block.errors import BadInputError

_HEAD = struct.Struct("<QQQQ")
_U64 = struct.Struct("<Q")
_ATTEMPTS = 100


def snapshot_path(name: str) -> Path:
    """Where the snapshots of the engine called ``name`` lie.

    Raises:
        BadInputError: the name would leave the directory.
    """
    if not name or "/" in name or name.startswith("."):
        raise BadInputError(f"{name!r} cannot name an engine's shared memory: use letters, digits, '-' and '_'.")
    return Path("/dev/shm") / f"block-{name}.state"


class SnapshotWriter:
    """Owns the file from construction to ``close``; a stale file of the same name is replaced.

    Raises:
        BadInputError: another live process publishes under this name.
    """

    def __init__(self, name: str, capacity: int = 1 << 20) -> None:
        self.path = snapshot_path(name)
        if owner_alive(self.path):
            raise BadInputError(f"Another live engine publishes as {name!r}: give this one another name.")
        self.path.unlink(missing_ok=True)
        self._capacity = capacity
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.ftruncate(fd, _HEAD.size + capacity)
            self._map = mmap.mmap(fd, _HEAD.size + capacity)
        finally:
            os.close(fd)
        self._counter = 0
        pid = os.getpid()
        _HEAD.pack_into(self._map, 0, 0, pid, _start_time(pid), 0)

    def write(self, snapshot: bytes) -> None:
        """Publish; raises ``ValueError`` when the snapshot is larger than the capacity."""
        if len(snapshot) > self._capacity:
            raise ValueError(f"a snapshot of {len(snapshot)} bytes exceeds the capacity of {self._capacity}")
        view, at = self._map, _HEAD.size
        _U64.pack_into(view, 0, self._counter + 1)
        _U64.pack_into(view, 24, len(snapshot))
        view[at : at + len(snapshot)] = snapshot
        self._counter += 2
        _U64.pack_into(view, 0, self._counter)

    def close(self) -> None:
        self._map.close()
        self.path.unlink(missing_ok=True)


class SnapshotReader:
    """Reads what a writer of this name publishes; follows it across restarts."""

    def __init__(self, name: str) -> None:
        self.path = snapshot_path(name)
        self._map: mmap.mmap | None = None
        self._inode = 0
        self._seen = -1

    def read(self) -> bytes | None:
        """The newest snapshot, or ``None`` if there is none or it was already read. Costs microseconds."""
        if self._map is None and not self._open():
            return None
        assert self._map is not None
        for _ in range(_ATTEMPTS):
            counter, _pid, _start, length = _HEAD.unpack_from(self._map, 0)
            if counter == self._seen or counter == 0:
                return None
            if counter & 1 or _HEAD.size + length > len(self._map):
                continue
            copy = self._map[_HEAD.size : _HEAD.size + length]
            if _U64.unpack_from(self._map, 0)[0] == counter:
                self._seen = counter
                return copy
        return None

    def alive(self) -> bool:
        """Whether the writer's process lives; reopens the file when it was replaced by a new engine's."""
        try:
            replaced = self.path.stat().st_ino != self._inode
        except FileNotFoundError:
            replaced = True
        if replaced:
            self.close()
        return owner_alive(self.path)

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
        self._map, self._seen, self._inode = None, -1, 0

    def _open(self) -> bool:
        try:
            fd = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            stat = os.fstat(fd)
            if stat.st_size < _HEAD.size:
                return False
            self._map = mmap.mmap(fd, stat.st_size, prot=mmap.PROT_READ)
            self._inode = stat.st_ino
        finally:
            os.close(fd)
        return True


def owner_alive(path: Path) -> bool:
    """Whether the process that made this snapshot file still lives (same pid *and* start time)."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD.size)
    except FileNotFoundError:
        return False
    if len(head) < _HEAD.size:
        return False
    _counter, pid, start, _length = _HEAD.unpack(head)
    return pid != 0 and _start_time(pid) == start


def remove_stale_files() -> list[Path]:
    """Delete the snapshot files of engines that are gone; returns what was deleted."""
    stale = [p for p in Path("/dev/shm").glob("block-*.state") if not owner_alive(p)]
    for path in stale:
        path.unlink(missing_ok=True)
    return stale


def _start_time(pid: int) -> int:
    """Clock ticks after boot at which a process started, 0 if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(stat.rpartition(")")[2].split()[19])
