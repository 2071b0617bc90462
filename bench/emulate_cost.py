"""What a streamed token costs the emulator: CPU time per token of its process, and how late its steps were.

Run: python bench/emulate_cost.py [--streams 50 200] [--tokens 400]
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

PROFILE = "h200-llama3.1-8b"


class Stream(asyncio.Protocol):
    """One streamed completion over a bare socket; counts nothing but the end."""

    def __init__(self, body: bytes, done: asyncio.Future[None]) -> None:
        self.body, self.done, self.tail = body, done, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(self.body)}\r\n\r\n".encode()
        transport.write(head + self.body)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.tail = (self.tail + data)[-32:]
        if b"[DONE]" in self.tail and not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("closed early"))


def cpu_s(pid: int) -> tuple[float, float]:
    """User and system seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    tick = os.sysconf("SC_CLK_TCK")
    return int(fields[11]) / tick, int(fields[12]) / tick


async def drive(port: int, streams: int, tokens: int) -> None:
    loop = asyncio.get_running_loop()
    body = json.dumps({"prompt": "x" * 400, "max_tokens": tokens, "ignore_eos": True, "stream": True}).encode()
    waiting = []
    for _ in range(streams):
        done = loop.create_future()
        await loop.create_connection(lambda done=done: Stream(body, done), "127.0.0.1", port)
        waiting.append(done)
    await asyncio.gather(*waiting)


def measure(streams: int, tokens: int) -> dict[str, float]:
    command = [sys.executable, "-c", "from block.cli import main; main()", "emulate", "--profile", PROFILE, "--port",
               "0", "--json", "--name", f"bench-{os.getpid()}", "--num-gpu-blocks", "60000"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        ready = json.loads(process.stdout.readline())  # type: ignore[union-attr]
        port = int(ready["url"].rpartition(":")[2])
        before, started_s = cpu_s(process.pid), time.monotonic()
        asyncio.run(drive(port, streams, tokens))
        wall_s, after = time.monotonic() - started_s, cpu_s(process.pid)
        with urllib.request.urlopen(f"{ready['url']}/emulate/lateness") as answer:
            late = json.load(answer)
    finally:
        process.terminate()
        process.wait()
    n = streams * tokens
    return {
        "streams": streams, "user_us": (after[0] - before[0]) / n * 1e6, "system_us": (after[1] - before[1]) / n * 1e6,
        "busy_fraction": (sum(after) - sum(before)) / wall_s,
        "late_p50_ms": late["p50_s"] * 1e3, "late_p99_ms": late["p99_s"] * 1e3,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    print(
        f"commit {commit}  {platform.machine()} {os.cpu_count()} cores  Python {platform.python_version()}  seed none"
    )
    for streams in args.streams:
        rows = [measure(streams, args.tokens) for _ in range(args.runs)]
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        total = middle["user_us"] + middle["system_us"]
        print(
            f"{streams:4d} streams: {total:5.1f} us CPU a token ({middle['user_us']:.1f} user, "
            f"{middle['system_us']:.1f} system), {middle['busy_fraction']:.0%} of a core, "
            f"late p50 {middle['late_p50_ms']:.2f} ms, p99 {middle['late_p99_ms']:.2f} ms"
        )


if __name__ == "__main__":
    main()
