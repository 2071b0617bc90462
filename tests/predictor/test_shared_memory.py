import os
import random
import signal
import subprocess
import sys
import time
import zlib

import pytest

from block.errors import BadInputError
from block.predictor import shared_memory
from block.predictor.shared_memory import SnapshotReader, SnapshotWriter, owner_alive, remove_stale_files, snapshot_path

# Writes snapshots that carry their own checksum, as fast as it can, until killed.
HASTY_WRITER = """
import random, sys, zlib
from block.predictor.shared_memory import SnapshotWriter
writer, rng = SnapshotWriter(sys.argv[1], 1 << 16), random.Random(1)
n = 0
while True:
    n += 1
    body = n.to_bytes(8, "little") + bytes([n % 256]) * rng.choice((1, 100, 5000, 60000))
    writer.write(zlib.crc32(body).to_bytes(4, "little") + body)
    if n == 1:
        print("ready", flush=True)
"""


@pytest.fixture
def writer(shm_name):
    with_name = SnapshotWriter(shm_name, 1000)
    yield with_name
    with_name.close()


@pytest.fixture
def reader(shm_name):
    made = SnapshotReader(shm_name)
    yield made
    made.close()


@pytest.fixture
def hasty(shm_name):
    process = subprocess.Popen([sys.executable, "-c", HASTY_WRITER, shm_name], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_reader_gets_what_was_written_once(writer, reader):
    assert reader.read() is None
    writer.write(b"first")
    assert reader.read() == b"first"
    assert reader.read() is None


def test_the_newest_wins(writer, reader):
    for i in range(10):
        writer.write(b"%d" % i)
    assert reader.read() == b"9"


def test_every_reader_gets_its_own_copy(writer, reader, shm_name):
    other = SnapshotReader(shm_name)
    writer.write(b"x")
    assert (reader.read(), other.read()) == (b"x", b"x")
    other.close()


def test_a_reader_may_come_first(shm_name, reader):
    assert reader.read() is None
    assert not reader.alive()
    writer = SnapshotWriter(shm_name)
    writer.write(b"late")
    assert reader.alive()
    assert reader.read() == b"late"
    writer.close()


def test_no_snapshot_is_ever_seen_half_written(hasty, reader):
    """A reader beside a writer in another process sees whole snapshots only, and newer ones each time."""
    last = read = 0
    ends = time.monotonic() + 1.5
    while time.monotonic() < ends and read < 3000:
        snapshot = reader.read()
        if snapshot is None:
            continue
        read += 1
        assert zlib.crc32(snapshot[4:]) == int.from_bytes(snapshot[:4], "little")
        number = int.from_bytes(snapshot[4:12], "little")
        assert number > last
        last = number
    assert read > 20


def test_a_snapshot_that_is_being_written_is_not_given_out(writer, reader):
    writer.write(b"whole")
    assert reader.read() == b"whole"
    shared_memory._U64.pack_into(writer._map, 0, writer._counter + 1)
    assert reader.read() is None


def test_a_snapshot_larger_than_the_capacity_is_refused_and_harms_nothing(writer, reader):
    writer.write(b"good")
    with pytest.raises(ValueError, match="exceeds"):
        writer.write(b"x" * 1001)
    assert reader.read() == b"good"


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "nul\0"])
def test_a_name_that_leads_elsewhere_is_refused(name):
    with pytest.raises(BadInputError, match="cannot name"):
        snapshot_path(name)


def test_two_live_engines_cannot_share_a_name(writer, shm_name, reader):
    with pytest.raises(BadInputError, match="Another live engine"):
        SnapshotWriter(shm_name)
    writer.write(b"still here")
    assert reader.read() == b"still here"


def test_a_killed_writer_is_dead_at_once(hasty, reader):
    assert reader.alive()
    os.kill(hasty.pid, signal.SIGKILL)
    hasty.wait()
    assert not reader.alive()
    assert reader.path.exists()


def test_looking_whether_the_owner_lives_takes_nothing_from_it(writer):
    assert all(owner_alive(writer.path) for _ in range(100))


def patiently(reader):
    """The next snapshot; its writer may lose the processor in the middle of a write."""
    for _ in range(1000):
        if (snapshot := reader.read()) is not None:
            return snapshot
        time.sleep(0.005)
    raise AssertionError("nothing was published")


def test_a_restarted_engine_is_followed(hasty, reader, shm_name):
    assert patiently(reader)
    hasty.kill()
    hasty.wait()
    heir = SnapshotWriter(shm_name)
    heir.write(b"reborn")
    assert reader.alive()
    assert reader.read() == b"reborn"
    heir.close()


def test_closing_leaves_the_file_of_an_heir_alone(writer, shm_name):
    writer.path.unlink()  # someone tidied up too eagerly
    heir = SnapshotWriter(shm_name)
    writer.close()
    assert heir.path.exists()
    heir.close()
    assert not heir.path.exists()
    heir.close()


def test_files_of_dead_engines_are_removed_and_others_not(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "_DIRECTORY", tmp_path)
    live = SnapshotWriter("live")
    dead = tmp_path / "block-dead.state"
    dead.write_bytes(random.Random(1).randbytes(100))
    unrelated = tmp_path / "other.state"
    unrelated.write_bytes(b"x")
    assert remove_stale_files() == [dead]
    assert live.path.exists()
    assert unrelated.exists()
    live.close()


def test_a_file_that_is_cut_short_is_no_snapshot(shm_name, reader):
    reader.path.write_bytes(b"short")
    assert reader.read() is None
    assert not reader.alive()
