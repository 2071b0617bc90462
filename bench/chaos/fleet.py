"""Emulated engines and their predictors as processes that can be killed, stopped and started again."""

import asyncio
import json
import os
import signal
import sys
import time
import urllib.request
import uuid

from link import Link
from rig import free_ports

PROFILE = "h200-llama3.1-8b"


class Process:
    """One ``block`` process; restarted on the same port with the same words."""

    def __init__(self, *arguments: str, health: str) -> None:
        self.arguments, self.health = arguments, health
        self.child: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        code = "from block.cli import main; main()"
        self.child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            code,
            *self.arguments,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        deadline_s = time.monotonic() + 30
        while not await asyncio.to_thread(ok, self.health):
            if time.monotonic() > deadline_s or self.child.returncode is not None:
                raise SystemExit(f"block {' '.join(self.arguments[:2])} did not start")
            await asyncio.sleep(0.05)

    def signal(self, number: signal.Signals) -> None:
        assert self.child is not None
        os.kill(self.child.pid, number)

    async def kill(self) -> None:
        if self.child is not None and self.child.returncode is None:
            self.child.send_signal(signal.SIGKILL)
            await self.child.wait()


def ok(url: str, timeout_s: float = 1.0) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


class Member:
    """An engine, its predictor, and the link that everybody reaches the engine through. ``words``: more of the engine's options."""

    def __init__(self, *words: str) -> None:
        self.port, engine, predictor = free_ports(3)
        self.name = f"chaos-{uuid.uuid4().hex[:8]}"
        self.engine_url, self.url = f"http://127.0.0.1:{engine}", f"http://127.0.0.1:{self.port}"
        self.predictor_url = f"http://127.0.0.1:{predictor}"
        self.engine = Process(
            "emulate", "--profile", PROFILE, "--port", str(engine), "--name", self.name, "--allow-faults",
            *(words or ("--max-num-seqs", "64")), health=self.engine_url + "/health",
        )  # fmt: skip
        self._predictor_words = ("predictor", "--profile", PROFILE, "--port", str(predictor), "--min-interval-ms", "20")
        self.predictor = self.predictor_of(self.name)
        self.link = Link(self.port, engine)
        self._honest = self.predictor
        self.decoy: Process | None = None

    def predictor_of(self, name: str) -> Process:
        """The predictor's process, watching an engine of that name."""
        return Process(*self._predictor_words, "--source", f"emulate:{name}", health=self.predictor_url + "/profile")

    async def start(self) -> None:
        await self.engine.start()
        await self.predictor.start()
        await self.link.set("open")

    async def lie(self) -> None:
        """From now on its predictor watches another engine, which nobody uses: always idle."""
        (port,) = free_ports(1)
        name = self.name + "-decoy"
        self.decoy = Process(
            "emulate",
            "--profile",
            PROFILE,
            "--port",
            str(port),
            "--name",
            name,
            health=f"http://127.0.0.1:{port}/health",
        )
        await self.decoy.start()
        await self.predictor.kill()
        self.predictor = self.predictor_of(name)
        await self.predictor.start()

    async def be_honest(self) -> None:
        await self.predictor.kill()
        self.predictor = self._honest
        await self.predictor.start()

    async def fault(self, **fault: object) -> None:
        request = urllib.request.Request(
            self.engine_url + "/emulate/fault", json.dumps(fault).encode(), {"content-type": "application/json"}
        )
        await asyncio.to_thread(urllib.request.urlopen, request, timeout=5)

    async def close(self) -> None:
        processes = [process for process in (self.engine, self.predictor, self.decoy) if process is not None]
        for process in processes:
            if process.child is not None and process.child.returncode is None:
                process.signal(signal.SIGCONT)
                process.signal(signal.SIGTERM)
        for process in processes:
            if process.child is not None:
                try:
                    await asyncio.wait_for(process.child.wait(), 5)
                except TimeoutError:
                    await process.kill()
        await self.link.close()
