"""What the gateway's benchmarks share: processes, their CPU time, wrk, and a paced-stream client."""

import asyncio
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
TICKS = os.sysconf("SC_CLK_TCK")
PATH = "/v1/chat/completions"
PROMPT = {"model": "bench", "messages": [{"role": "user", "content": "x" * 200}], "max_tokens": 16}


class Measured(NamedTuple):
    """One wrk run against one thing. Latencies in ms."""

    p50_ms: float
    p99_ms: float
    rps: float
    cpu_us: float | None
    errors: int


def heading() -> str:
    """Commit, host and time, for the first line of a report."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=HERE
    )
    dirty = subprocess.run(
        ["git", "status", "--porcelain"], capture_output=True, text=True, check=False, cwd=HERE
    ).stdout
    load = os.getloadavg()[0]
    return (
        f"commit {commit.stdout.strip() or 'unknown'}{' + changes' if dirty else ''}, {platform.machine()}, "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, load {load:.1f} before the start"
    )


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def process(*command: str, ready: str | None = None, timeout_s: float = 60.0) -> Iterator[int]:
    """A process in its own group; yields its pid when the URL ``ready`` answers 200; ends it afterwards."""
    with tempfile.TemporaryFile() as log:
        started = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline_s = time.monotonic() + timeout_s
            while ready is not None and not answers(ready):
                if started.poll() is not None or time.monotonic() > deadline_s:
                    log.seek(0)
                    raise SystemExit(
                        f"{' '.join(command[:4])} did not start:\n{log.read().decode(errors='replace')[-2000:]}"
                    )
                time.sleep(0.05)
            yield started.pid
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGTERM)
                try:
                    started.wait(5)
                except subprocess.TimeoutExpired:
                    os.killpg(started.pid, signal.SIGKILL)
                    started.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and its children that live (from /proc)."""
    total = 0.0
    for each in [pid, *_children(pid)]:
        try:
            fields = Path(f"/proc/{each}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        total += (int(fields[11]) + int(fields[12])) / TICKS
    return total


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *_children(int(child))]
    return found


def rss_mb(pid: int) -> float:
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024  # type: ignore[index]


def wrk(url: str, pid: int | None, *, connections: int, seconds: float, stream: bool) -> Measured:
    """One wrk run (one thread). ``pid``: whose CPU time to divide by the requests."""
    body = json.dumps(PROMPT | ({"stream": True} if stream else {}), separators=(",", ":"))
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(f'wrk.method="POST"\nwrk.headers["content-type"]="application/json"\nwrk.body=[=[{body}]=]\n')
        script.flush()
        before_s = cpu_s(pid) if pid is not None else 0.0
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--latency", "-s", script.name, url + PATH]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        spent_s = cpu_s(pid) - before_s if pid is not None else None
    requests = int(re.search(r"(\d+) requests in", out)[1])  # type: ignore[index]
    p50, p99 = (_ms(re.search(rf"{q}%\s+([\d.]+)(us|ms|s)\b", out)) for q in (50, 99))
    errors = sum(int(n) for n in re.findall(r"Non-2xx or 3xx responses: (\d+)", out))
    errors += sum(int(n) for n in re.findall(r"(?:connect|read|write|timeout) (\d+)", out))
    rps = float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1])  # type: ignore[index]
    return Measured(p50, p99, rps, None if spent_s is None else spent_s / max(requests, 1) * 1e6, errors)


def _ms(found: "re.Match[str] | None") -> float:
    assert found is not None
    return float(found[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[found[2]]


def median_of(runs: list[Measured]) -> Measured:
    """Field by field; errors are summed."""
    cpu = [run.cpu_us for run in runs if run.cpu_us is not None]
    return Measured(
        statistics.median(run.p50_ms for run in runs), statistics.median(run.p99_ms for run in runs),
        statistics.median(run.rps for run in runs), statistics.median(cpu) if cpu else None, sum(run.errors for run in runs),
    )  # fmt: skip


class Paced(NamedTuple):
    ttft_p50_ms: float
    ttft_p99_ms: float
    cpu_us_per_event: float | None
    events: int


def paced(url: str, pid: int | None, *, streams: int, seconds: float) -> Paced:
    """``streams`` clients at once, each one streamed answer after the other on its own keep-alive connection."""
    before_s = cpu_s(pid) if pid is not None else 0.0
    ttfts, events = asyncio.run(_paced(url, streams, seconds))
    spent_s = cpu_s(pid) - before_s if pid is not None else None
    ttfts.sort()
    p50, p99 = ttfts[len(ttfts) // 2], ttfts[int(len(ttfts) * 0.99)]
    return Paced(p50 * 1e3, p99 * 1e3, None if spent_s is None else spent_s / max(events, 1) * 1e6, events)


def median_paced(runs: list[Paced]) -> Paced:
    """Field by field."""
    cpu = [run.cpu_us_per_event for run in runs if run.cpu_us_per_event is not None]
    return Paced(
        statistics.median(run.ttft_p50_ms for run in runs), statistics.median(run.ttft_p99_ms for run in runs),
        statistics.median(cpu) if cpu else None, sum(run.events for run in runs),
    )  # fmt: skip


async def _paced(url: str, streams: int, seconds: float) -> tuple[list[float], int]:
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(PROMPT | {"stream": True}).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    ends_s, ttfts, events = time.monotonic() + seconds, [], 0

    async def client(n: int) -> None:
        nonlocal events
        await asyncio.sleep(n * 0.031 % 1.0)  # so that the streams do not beat as one
        reader, writer = await asyncio.open_connection(host, int(port))
        while time.monotonic() < ends_s:
            sent_s, first = time.perf_counter(), True
            writer.write(head.encode() + body)
            tail = b""
            while not tail.endswith(b"0\r\n\r\n"):
                part = await reader.read(65536)
                if not part:
                    raise SystemExit(f"{url} closed a stream")
                tail = (tail + part)[-32:]
                events += part.count(b"data:")
                if first and b"data:" in part:
                    ttfts.append(time.perf_counter() - sent_s)
                    first = False
        writer.close()

    await asyncio.gather(*(client(n) for n in range(streams)))
    return ttfts, events


def require_wrk() -> None:
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is needed for this benchmark (apt-get install wrk).")


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)
