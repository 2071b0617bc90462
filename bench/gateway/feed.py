"""Predictors that only feed: snapshot streams of engines with 24-48 running requests, as the real ones would send them.

    python bench/gateway/feed.py --port 9101 --port 9102 --rate 90

The snapshots are captured from the engine model under load before the start, and restamped with the time of sending.
"""

import argparse
import asyncio
import json
import random
import time

import msgspec
import numpy as np
import uvloop

from block.engine.limits import EngineLimits
from block.engine.pipeline import Engine
from block.engine.sequence import Sequence
from block.predict.capture import Recorder
from block.predict.snapshot import HEADER, decode, encode
from block.steptime.profile import load_profile

PROFILE = "h200-llama3.1-8b"
KEPT = 64


def capture(seed: int) -> list[bytes]:
    """``KEPT`` snapshots in a row of an engine that holds 24-48 requests."""
    rng = random.Random(seed)
    profile = load_profile(PROFILE)
    engine = Engine(EngineLimits(max_num_seqs=64, num_gpu_blocks=4096), profile.curve())
    recorder, now_s, present, snapshots = Recorder(engine, epoch=seed), 0.0, 0, []
    target = rng.randint(24, 48)
    while len(snapshots) < KEPT:
        while present < target:
            key, total = rng.getrandbits(63), rng.randint(20, 900)
            engine.add(Sequence(key, rng.randint(20, 1500), 1024, total, now_s), now_s)
            present += 1
        now_s += 0.011
        present -= sum(
            sequence.finished_s > 0 and at_s == sequence.finished_s for at_s, sequence in engine.advance(now_s)
        )
        if now_s > 3.0:
            snapshots.append(recorder.capture(now_s))
    return snapshots


def restamped(raw: bytes, sequence: int) -> bytes:
    """The frame of a captured snapshot as if taken now."""
    snapshot = decode(raw)
    header = np.array(snapshot.header, HEADER)
    shift_s = time.time() - snapshot.taken_s
    for name in ("taken_s", "batch_1_started_s", "newest_scheduled_s"):
        header[name] += shift_s
    header["sequence"] = sequence
    body = encode(header, snapshot.requests, snapshot.keys, snapshot.arrived + shift_s, snapshot.steps)
    return len(body).to_bytes(4, "little") + body


class Feed(asyncio.Protocol):
    """``GET /snapshots`` streams for ever; ``GET /profile`` answers; everything else is health."""

    def __init__(self, snapshots: list[bytes], rate: float) -> None:
        self.snapshots, self.period_s, self.sequence = snapshots, 1 / rate, 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if b"/snapshots" in data[:40]:
            self.transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            )
            self.send()
            return
        profile = msgspec.to_builtins(load_profile(PROFILE)) | {"scale": 1.0}
        body = json.dumps(profile).encode() if b"/profile" in data[:40] else b"{}"
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )

    def send(self) -> None:
        if self.transport.is_closing():
            return
        self.sequence += 1
        frame = restamped(self.snapshots[self.sequence % KEPT], self.sequence)
        self.transport.write(b"%x\r\n%b\r\n" % (len(frame), frame))
        asyncio.get_running_loop().call_later(self.period_s * random.uniform(0.9, 1.1), self.send)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, action="append", required=True)
    parser.add_argument("--rate", type=float, default=90.0, help="snapshots a second, per port")
    options = parser.parse_args()
    loop = asyncio.get_running_loop()
    for n, port in enumerate(options.port):
        snapshots = capture(seed=n + 1)
        await loop.create_server(lambda kept=snapshots: Feed(kept, options.rate), "127.0.0.1", port)
    print("feeding", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
