"""What a predictor costs: time to ready, memory, CPU beside an idle and a busy engine, time of a what-if over HTTP.

Run: python bench/predictor_cost.py [--streams 50] [--tokens 600] [--runs 3]
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from emulate_cost import PROFILE, cpu_s, drive

NAME = f"bench-{os.getpid()}"


@contextlib.contextmanager
def program(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, float]]:
    """A running ``block`` program: its process, its URL, seconds from its start until it said that it is ready."""
    started_s = time.monotonic()
    command = [
        sys.executable,
        "-c",
        "from block.cli import main; main()",
        *arguments,
        "--profile",
        PROFILE,
        "--port",
        "0",
        "--json",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        ready = json.loads(process.stdout.readline())  # type: ignore[union-attr]
        yield process, ready["url"], time.monotonic() - started_s
    finally:
        process.terminate()
        process.wait()


def ask(url: str) -> tuple[float, float]:
    """Seconds of one what-if over HTTP (a connection each), and the age of its snapshot."""
    body = json.dumps({"prompt_tokens": 300, "output_tokens": 200}).encode()
    started_s = time.perf_counter()
    with urllib.request.urlopen(f"{url}/predict", body) as answer:
        said = json.load(answer)
    return time.perf_counter() - started_s, said["snapshot_age_s"]


async def subscribe(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /snapshots HTTP/1.1\r\nHost: x\r\n\r\n")
    while await reader.read(1 << 16):
        pass


async def load(pid: int, engine: str, predictor: str, streams: int, tokens: int) -> dict[str, float]:
    listening = asyncio.create_task(subscribe(int(predictor.rpartition(":")[2])))
    await asyncio.sleep(0.5)
    before = sum(cpu_s(pid))
    await asyncio.sleep(2.0)
    idle = (sum(cpu_s(pid)) - before) / 2.0
    port = int(engine.rpartition(":")[2])
    before, started_s = sum(cpu_s(pid)), time.monotonic()
    await drive(port, streams, tokens)
    busy = (sum(cpu_s(pid)) - before) / (time.monotonic() - started_s)
    running = asyncio.create_task(drive(port, streams, tokens))
    await asyncio.sleep(0.7)
    answers = [await asyncio.to_thread(ask, predictor) for _ in range(50)]
    await running
    listening.cancel()
    return {
        "idle": idle, "busy": busy, "predict_ms": statistics.median(s for s, _ in answers) * 1e3,
        "age_ms": statistics.median(age for _, age in answers) * 1e3,
    }  # fmt: skip


def measure(streams: int, tokens: int) -> dict[str, float]:
    with (
        program("emulate", "--name", NAME, "--num-gpu-blocks", "60000") as (_, engine, _),
        program("predictor", "--source", f"emulate:{NAME}") as (process, predictor, ready_s),
    ):
        ready_cpu_s = sum(cpu_s(process.pid))
        found = asyncio.run(load(process.pid, engine, predictor, streams, tokens))
        status = Path(f"/proc/{process.pid}/status").read_text()
    rss_mb = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    return {"ready_s": ready_s, "ready_cpu_s": ready_cpu_s, "rss_mb": rss_mb} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    print(
        f"commit {commit}  {platform.machine()} {os.cpu_count()} cores  Python {platform.python_version()}  seed none"
    )
    rows = [measure(args.streams, args.tokens) for _ in range(args.runs)]
    m = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    print(
        f"ready after {m['ready_s']:.2f} s ({m['ready_cpu_s']:.2f} s of CPU), "
        f"peak memory {m['rss_mb']:.0f} MB, CPU with one subscriber {m['idle']:.1%} idle, "
        f"{m['busy']:.1%} beside {args.streams} streams; what-if over HTTP {m['predict_ms']:.2f} ms, "
        f"snapshot age {m['age_ms']:.1f} ms (medians of {args.runs})"
    )


if __name__ == "__main__":
    main()
