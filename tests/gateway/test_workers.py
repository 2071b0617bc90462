"""Several processes on one port, as one gateway: the command itself, killed, reloaded and drained."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from block.gateway.processes.workers import families_of, merged_text
from gateway.fakes import FakeEngine, slowly

BLOCK = [sys.executable, "-c", "from block.cli import main; main()", "serve", "--log-level", "warning", "--json"]
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("BLOCK_")}


class Served:
    """A running ``block serve --workers``; every request on a connection of its own, so that all workers get some."""

    def __init__(self, process: "subprocess.Popen[bytes]", url: str, admin: str) -> None:
        self.process, self.url, self.admin = process, url, admin
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(force_close=True), timeout=aiohttp.ClientTimeout(total=10)
        )

    async def ask(self, n: int = 0) -> int:
        body = {"model": "fake", "messages": []}
        headers = {"x-request-id": f"r{n}"}
        async with self.session.post(self.url + "/v1/chat/completions", json=body, headers=headers) as answer:
            await answer.read()
            return answer.status

    async def get(self, url: str) -> tuple[int, str]:
        async with self.session.get(url) as answer:
            return answer.status, await answer.text()

    async def metric(self, name: str) -> float:
        _, text = await self.get(self.url + "/metrics")
        lines = [line for line in text.splitlines() if line.startswith((name + " ", name + "{"))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def children(self) -> list[int]:
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in text.split()]


def alive(pids: list[int]) -> int:
    states = []
    for pid in pids:
        with contextlib.suppress(OSError):
            states.append(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0])
    return sum(state != "Z" for state in states)


@contextlib.asynccontextmanager
async def serve(*arguments: str) -> AsyncIterator[Served]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        admin_port = free.getsockname()[1]
    options = ["--policy", "round-robin", "--port", "0", "--admin-port", str(admin_port), "--workers", "2"]
    process = subprocess.Popen([*BLOCK, *options, *arguments], stdout=subprocess.PIPE, env=ENVIRONMENT)  # noqa: ASYNC220
    assert process.stdout is not None
    served = None
    try:
        async with asyncio.timeout(60):
            line = json.loads(await asyncio.to_thread(process.stdout.readline))
        served = Served(process, line["url"], f"http://127.0.0.1:{admin_port}")
        await eventually(lambda: served.metric("block_workers"), 2)
        yield served
    finally:
        if served is not None:
            await served.session.close()
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()
        process.stdout.close()


async def eventually(ask: Any, expected: Any, timeout_s: float = 60.0) -> None:
    found = None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while (found := await ask()) != expected:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    assert found == expected


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    running = await FakeEngine().start()
    yield running
    await running.stop()


async def test_workers_answer_as_one_gateway_and_one_that_dies_is_replaced(engine: FakeEngine) -> None:
    async with serve("--worker-urls", engine.url) as served:
        assert [await served.ask(n) for n in range(12)] == [200] * 12
        assert await served.metric("block_request_total") == 12  # one scrape tells of all workers
        assert await served.metric("block_ready_endpoints") == 1
        for n in range(12):  # whoever is asked, whoever decided
            status, text = await served.get(f"{served.admin}/v1/decisions/r{n}")
            assert (status, json.loads(text)["chosen"]) == (200, engine.url.removeprefix("http://"))
        assert (await served.get(f"{served.admin}/v1/decisions/none"))[0] == 404

        rows = json.loads((await served.get(f"{served.admin}/admin/recent"))[1])
        assert (len(rows["arrivals"]), len(rows["ends"]), rows["missed"]) == (12, 12, 0)
        assert len({row[0] for row in rows["arrivals"]}) == 12
        assert await served.ask() == 200
        later = json.loads((await served.get(f"{served.admin}/admin/recent?after={rows['cursor']}"))[1])
        assert (len(later["arrivals"]), len(later["ends"])) == (1, 1)
        assert (await served.get(f"{served.admin}/admin/recent?after=nonsense"))[0] == 400

        # one dies: its successor knows what the others were told
        async with served.session.post(
            served.admin + "/admin/instances", json={"url": engine.url, "name": "added"}
        ) as answer:
            told = await answer.json()
            assert (answer.status, told["workers_told"]) == (201, 2)
        before = served.children()
        os.kill(before[0], signal.SIGKILL)

        async def successors() -> int:
            return len(set(served.children()) - set(before))

        await eventually(successors, 1)
        await eventually(lambda: served.metric("block_workers"), 2)
        for _ in range(8):  # both workers list it
            listed = json.loads((await served.get(served.admin + "/admin/instances"))[1])["data"]
            assert {row["name"] for row in listed} == {engine.url.removeprefix("http://"), "added"}
        assert [await served.ask(n) for n in range(6)] == [200] * 6


async def test_a_worker_that_starts_later_has_the_configuration_that_the_others_have(
    engine: FakeEngine, tmp_path: Path
) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text(f'[[instances]]\nname = "old"\nurl = "{engine.url}"\n')
    async with serve("--config", str(file)) as served:

        async def names() -> set[str]:
            found = [json.loads((await served.get(served.admin + "/admin/instances"))[1])["data"] for _ in range(6)]
            return {row["name"] for rows in found for row in rows}

        assert await names() == {"old"}
        file.write_text(f'[[instances]]\nname = "new"\nurl = "{engine.url}"\n')
        served.process.send_signal(signal.SIGHUP)
        await eventually(names, {"new"})
        file.write_text("not TOML")
        before = served.children()
        os.kill(before[1], signal.SIGKILL)

        async def successors() -> int:
            return len(set(served.children()) - set(before))

        await eventually(successors, 1)
        await eventually(lambda: served.metric("block_workers"), 2)
        assert await names() == {"new"}


async def test_sigterm_lets_answers_finish_and_leaves_nothing_behind() -> None:
    engine = await FakeEngine(slowly(0.5)).start()
    async with serve("--worker-urls", engine.url) as served:
        asked = [asyncio.create_task(served.ask(n)) for n in range(4)]
        while len(engine.heard) < 4:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        workers = served.children()
        served.process.send_signal(signal.SIGTERM)
        assert await asyncio.gather(*asked) == [200] * 4
        assert await asyncio.to_thread(served.process.wait, 60) == 0
        assert alive(workers) == 0
    await engine.stop()


async def test_workers_end_when_their_supervisor_is_killed(engine: FakeEngine) -> None:
    async with serve("--worker-urls", engine.url) as served:
        workers = served.children()
        served.process.kill()

        async def running() -> int:
            return alive(workers)

        await eventually(running, 0)


def test_what_is_wrong_with_the_configuration_is_said_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        options = ["--worker-urls", "http://127.0.0.1:9", "--workers", "3"]
        for more in (["--port", str(taken.getsockname()[1])], ["--port", "0", "--tls-cert-path", "/no/such/file"]):
            done = subprocess.run(
                [*BLOCK, *options, *more], capture_output=True, text=True, timeout=30, env=ENVIRONMENT, check=False
            )  # fmt: skip
            assert done.returncode == 2
            assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_metrics_of_workers_are_put_together_by_what_they_mean() -> None:
    bodies = []
    for n in (1.0, 3.0):
        registry = CollectorRegistry()
        Counter("block_request", "", ["model"], registry=registry).labels("m").inc(n)
        Histogram("block_request_ttft_seconds", "", buckets=(1, 5), registry=registry).observe(n)
        for name in ("inflight_requests", "worker_health", "worker_suspect", "prediction_interval_coverage_ratio"):
            Gauge("block_" + name, "", ["endpoint"], registry=registry).labels("e").set(n)
        bodies.append(families_of(registry))
    lines = dict(line.rsplit(" ", 1) for line in merged_text(bodies).decode().splitlines() if line[0] != "#")
    assert lines['block_request_total{model="m"}'] == "4.0"
    assert lines['block_request_ttft_seconds_bucket{le="1.0"}'] == "1.0"
    assert lines["block_request_ttft_seconds_sum"] == "4.0"
    assert lines['block_inflight_requests{endpoint="e"}'] == "4.0"
    assert lines['block_worker_health{endpoint="e"}'] == "1.0"
    assert lines['block_worker_suspect{endpoint="e"}'] == "3.0"
    assert lines['block_prediction_interval_coverage_ratio{endpoint="e"}'] == "2.0"
