"""Does a gateway leak? A million requests, ten thousand streams at once, then faults: its memory and what it has open.

    python bench/soak.py [--requests 1000000] [--streams 10000] [--pace-ms 4000] [--stall 0] [--policy round-robin] [--json]

Trivial backends answer at once (requests) or one event every four seconds (streams); ``--stall`` keeps the gateway from running
for so many seconds while the streams begin, as a machine with too much to do would. Faults: backends that break one answer in
fifty off before or in its middle, and clients of which a third leave before their answer is whole; streams are continued
elsewhere. After every part the gateway is left alone for a moment and looked at: resident memory, open files, tasks of its event
loop, connections, requests in flight. Exit status 1 if anything is left over, or memory grew by more than a tenth after the first
fifth of the requests.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import resource
import signal
import sys
import time
import urllib.request
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent / "gateway"))

import uvloop
from rig import HERE, PATH, PROMPT, free_ports, heading, process, python, require_wrk, rss_mb, wrk

SLICES = 10
CONNECTIONS = 64
BACKENDS = 4


class Look(NamedTuple):
    """At a gateway that has nothing to do."""

    after: str
    requests: int
    rss_mb: float
    open_files: int
    tasks: int
    connections: int
    in_flight: int


def look(after: str, url: str, pid: int, requests: int, *, settle_s: float = 1.5) -> Look:
    time.sleep(settle_s)
    with urllib.request.urlopen(url + "/metrics", timeout=10) as answer:
        page = answer.read().decode()
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Look(
        after, requests, round(rss_mb(pid), 1), files, int(metric(page, "block_event_loop_tasks")),
        int(metric(page, "block_client_connections")) - 1, int(metric(page, "block_inflight_requests")),
    )  # fmt: skip


def metric(page: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE))


def start(stack: ExitStack, policy: str, *, faulty: bool = False, pace: tuple[str, ...] = ()) -> tuple[list[str], str]:
    """Backends; their URLs and what to tell the gateway of them."""
    ports = free_ports(BACKENDS)
    if faulty:
        arguments = python(__file__, "--backend", *map(str, ports))
    else:
        arguments = python(str(HERE / "backend.py"), *pace, *[part for port in ports for part in ("--port", str(port))])
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    stack.enter_context(process(*arguments, ready=urls[-1] + "/health"))
    return urls, policy


def gateway(stack: ExitStack, urls: list[str], policy: str) -> tuple[str, int]:
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = python("-c", "from block.cli import main; main()", "serve", "--log-level", "error", "--port", str(port))
    options = ("--policy", policy, "--worker-urls", " ".join(urls), "--continue-streams", "3")
    return url, stack.enter_context(process(*command, *options, ready=url + "/ready"))


# Streams


async def hold_streams(url: str, count: int) -> tuple[int, int, dict[str, int]]:
    """``count`` streams at once; (how many were open together, how many ended whole, how the others began)."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(PROMPT | {"stream": True}).encode()
    request = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    open_now = most = whole = 0
    others: Counter[str] = Counter()

    async def one(n: int) -> None:
        nonlocal open_now, most, whole
        await asyncio.sleep(n / count * 8)
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request + body)
        tail, first, status = b"", True, ""
        while part := await reader.read(65536):
            if first:
                first, open_now, status = False, open_now + 1, part[9:12].decode()
                most = max(most, open_now)
            tail = (tail + part)[-16:]
            if tail.endswith(b"0\r\n\r\n"):
                whole += 1
                break
            if status != "200":
                break
        others[status] += not tail.endswith(b"0\r\n\r\n")
        open_now -= not first
        writer.close()

    await asyncio.gather(*(one(n) for n in range(count)))
    return most, whole, {status: number for status, number in others.items() if number}


# Faults


class Faulty(asyncio.Protocol):
    """A backend of streamed completions with token ids, that breaks one in fifty off, before or in the middle."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, end, rest = self.buffer.partition(b"\r\n\r\n")
        if not end:
            return
        length = re.search(rb"content-length: (\d+)", head.lower())
        size = int(length[1]) if length else 0
        if len(rest) < size:
            return
        self.buffer = rest[size:]
        if head.startswith(b"GET"):
            models = b'{"object":"list","data":[{"id":"bench","object":"model"}]}'
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(models), models))
            return
        asked = json.loads(rest[:size])
        self.left = asked.get("max_tokens") or 16
        self.first = True
        if random.random() < 0.01:
            self.transport.abort()
            return
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        asyncio.get_running_loop().call_later(0.002, self.emit)

    def emit(self) -> None:
        if self.transport.is_closing():
            return
        if random.random() < 0.01 / 16:
            self.transport.abort()
            return
        self.left -= 1
        choice: dict[str, Any] = {
            "index": 0,
            "text": "tok ",
            "finish_reason": None if self.left else "length",
            "token_ids": [7],
        }
        if self.first:
            choice["prompt_token_ids"], self.first = [1, 2, 3], False
        event = b"data: " + json.dumps({"id": "c", "choices": [choice]}).encode() + b"\n\n"
        self.transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        if self.left:
            asyncio.get_running_loop().call_later(0.002, self.emit)
        else:
            self.transport.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


async def serve_faulty(ports: list[int]) -> None:
    loop = asyncio.get_running_loop()
    for port in ports:
        await loop.create_server(Faulty, "127.0.0.1", port, backlog=4096)
    await asyncio.Event().wait()


async def ask_and_leave(url: str, count: int) -> tuple[int, int, int]:
    """Streamed completions, 64 at a time, a third of the clients leaving early; (whole, broken, left)."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"model": "bench", "prompt": "x", "stream": True, "max_tokens": 16}).encode()
    request = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    )
    counts = {"whole": 0, "broken": 0, "left": 0}

    async def client(turns: int) -> None:
        for _ in range(turns):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(request + body)
            got, leaves_at = b"", random.randint(1, 4000) if random.random() < 0.33 else None
            with contextlib.suppress(ConnectionError):
                while part := await reader.read(2048):
                    got += part
                    if leaves_at is not None and len(got) > leaves_at:
                        break
            if got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
                counts["whole"] += 1
            else:
                counts["left" if leaves_at is not None else "broken"] += 1
            writer.transport.abort()

    await asyncio.gather(*(client(count // 64) for _ in range(64)))
    return counts["whole"], counts["broken"], counts["left"]


# The run


def soak(options: argparse.Namespace) -> dict[str, Any]:
    looks: list[Look] = []
    notes: dict[str, Any] = {}
    with ExitStack() as stack:
        url, pid = gateway(stack, *start(stack, options.policy))
        done = 0
        wrk(url, pid, connections=CONNECTIONS, seconds=2, stream=False)
        looks.append(look("warming up", url, pid, 0))
        began_s = time.monotonic()
        for n in range(SLICES):
            while done < options.requests * (n + 1) / SLICES:
                run = wrk(url, pid, connections=CONNECTIONS, seconds=4, stream=n % 2 == 1)
                done += round(run.rps * 4)
            looks.append(look(f"{(n + 1) * 100 // SLICES} %", url, pid, done))
            print(looks[-1], file=sys.stderr, flush=True)
        notes["requests per second"] = round(done / (time.monotonic() - began_s - SLICES * 1.5))
    with ExitStack() as stack:
        pace = ("--ttft-ms", "500", "--itl-ms", str(options.pace_ms), "--events", "7")
        url, pid = gateway(stack, *start(stack, options.policy, pace=pace))
        looks.append(look("start (streams)", url, pid, 0))
        peak: list[float] = []

        async def streams() -> tuple[int, int, dict[str, int]]:
            holding = asyncio.create_task(hold_streams(url, options.streams))
            while not holding.done():
                peak.append(rss_mb(pid))
                if len(peak) == 8 and options.stall:
                    os.kill(pid, signal.SIGSTOP)
                    await asyncio.sleep(options.stall)
                    os.kill(pid, signal.SIGCONT)
                await asyncio.sleep(0.5)
            return await holding

        notes["streams at once"], notes["streams whole"], notes["others, by status"] = uvloop.run(streams())
        notes["RSS with them, MB"] = round(max(peak), 1)
        looks.append(look("streams", url, pid, options.streams))
        uvloop.run(hold_streams(url, options.streams // 2))
        looks.append(look("half as many again", url, pid, options.streams * 3 // 2))
    with ExitStack() as stack:
        url, pid = gateway(stack, *start(stack, options.policy, faulty=True))
        uvloop.run(ask_and_leave(url, options.faults // 4))
        looks.append(look("warming up (faults)", url, pid, options.faults // 4, settle_s=3))
        notes["faults: whole, broken, left"] = uvloop.run(ask_and_leave(url, options.faults))
        looks.append(look("faults", url, pid, options.faults, settle_s=3))
    return {"looks": looks, "notes": notes}


def streams_allowed(wanted: int) -> int:
    """A stream takes two of the gateway's files, and what it may open is inherited from here: as many as there may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = 2 * wanted + 400
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, need), max(hard, need)))
        return wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(f"open files are limited to {hard}: {(hard - 400) // 2} streams instead of {wanted}", file=sys.stderr)
    return (hard - 400) // 2


def problems(looks: list[Look]) -> list[str]:
    found = [
        f"{x.after}: {x.connections} connections, {x.in_flight} in flight"
        for x in looks
        if x.connections or x.in_flight
    ]
    requests = looks[1 : SLICES + 1]
    if requests[-1].rss_mb > requests[1].rss_mb * 1.1:
        found.append(f"memory grew from {requests[1].rss_mb} to {requests[-1].rss_mb} MB over the requests")
    for before, after in ((looks[0], requests[-1]), (looks[-2], looks[-1])):
        if after.tasks > before.tasks:
            found.append(f"{after.after}: {after.tasks} tasks, {before.tasks} before")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--pace-ms", type=float, default=4000.0, help="between two events of a stream")
    parser.add_argument("--stall", type=float, default=0.0, help="seconds for which the gateway is stopped meanwhile")
    parser.add_argument("--faults", type=int, default=20_000, help="requests with faults")
    parser.add_argument("--policy", default="round-robin")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--backend", type=int, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.backend:
        uvloop.run(serve_faulty(options.backend))
        return
    require_wrk()
    options.streams = streams_allowed(options.streams)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    top, result = heading(), soak(options)
    left = problems(result["looks"])
    if options.json:
        looks = [x._asdict() for x in result["looks"]]
        print(json.dumps({"heading": top, "looks": looks, "notes": result["notes"], "problems": left}, indent=1))
    else:
        print(
            top
            + "\n\n| after | requests | RSS MB | open files | tasks | connections | in flight |\n|---|---|---|---|---|---|---|"
        )
        for each in result["looks"]:
            print("| " + " | ".join(map(str, each)) + " |")
        print("\n" + "\n".join(f"{name}: {value}" for name, value in result["notes"].items()))
        print("\n".join(left) or "nothing is left over")
    sys.exit(bool(left))


if __name__ == "__main__":
    main()
