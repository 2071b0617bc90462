"""What each source of an engine's state is worth, against real vLLM: predictions at a request's arrival, and queue lengths.

    python bench/vllm_sources.py [--rates 2,8,14] [--seconds 20] [--gateways 1,2] [--count usage]

One real vLLM (API server, scheduler, KV cache manager and output path) whose forward pass is an H200's step times with
Qwen2.5-32B, a model so slow that two cores can serve it; 64 sequences, 600 blocks, so that the highest rate saturates it.
Needs what ``make test-vllm`` installs. The load goes through one gateway, or half and half through two, which have no
predictor and model the engine from their own streams ("gateway"); predictors read the plugin ("vllm") and the metrics
page ("metrics") of the same engine and are asked just before each request is sent. Prompts of 20-600 tokens, answers of
exactly 10-250. Predictions know nothing of later arrivals, whose share of the error is the same for all. True queue
lengths are the plugin's, read from shared memory twenty times a second.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests" / "vllm"))

from live import BLOCK, Program, VllmServer, free_port, wait_healthy  # noqa: E402
from measure import Outcome, errors, offer  # noqa: E402

from block.core import InstanceId  # noqa: E402
from block.predict import snapshot as wire  # noqa: E402
from block.predictor.shared_memory import SnapshotReader  # noqa: E402

PROFILE = "h200-qwen2.5-32b"
SHAPE = {"max_num_seqs": 64, "max_num_batched_tokens": 1024, "max_model_len": 4096}
MODEL = {"hidden": 4096, "layers": 32, "heads": 32, "kv-heads": 8, "inner": 14336, "vocab": 1000}
LOOK_EVERY_S = 0.05
SEED = 40
Counts = tuple[float, int, int]
"""(time, running, waiting)."""


async def look(read: Callable[[], Awaitable[tuple[int, int] | None]], into: list[Counts]) -> None:
    """Note queue lengths until cancelled."""
    while True:
        found = await read()
        if found is not None:
            into.append((time.time(), *found))
        await asyncio.sleep(LOOK_EVERY_S)


def plugin_counts(name: str) -> Callable[[], Awaitable[tuple[int, int] | None]]:
    reader, last = SnapshotReader(name), [0, 0]

    async def read() -> tuple[int, int]:
        frame = reader.read()
        if frame is not None:
            header = wire.decode(frame).header
            last[:] = int(header["running"]), int(header["waiting_total"])
        return last[0], last[1]

    return read


def predictor_counts(session: aiohttp.ClientSession, url: str) -> Callable[[], Awaitable[tuple[int, int] | None]]:
    async def read() -> tuple[int, int] | None:
        async with session.get(url + "/snapshot") as answer:
            if answer.status != 200:
                return None
            header = (await answer.json())["header"]
            return header["running"], header["waiting_total"]

    return read


async def serve_and_tell(url: str, port: int, counting: str, told: Path) -> None:
    """A gateway that also writes down how long it believes the engine's queues to be."""
    from block.gateway.config import GatewayConfig, parse_instance
    from block.gateway.serve import Gateway

    shape = ",".join(f"{key.replace('_', '-')}={value}" for key, value in SHAPE.items())
    instance = parse_instance(f"{url},name=e,profile={PROFILE},{shape}")
    gateway = Gateway(GatewayConfig(instances=[instance], port=port, policy="block", count_tokens=counting))
    await gateway.start()
    evidence = gateway.decider.evidence[InstanceId("e")]
    with told.open("w") as file:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            now_s = time.time()
            if evidence.fresh(now_s) and evidence.snapshot is not None:
                header = evidence.snapshot.header
                waiting = int(header["waiting_total"]) + evidence.unseen
                file.write(json.dumps([now_s, int(header["running"]), waiting]) + "\n")
                file.flush()


def counts_error(true: list[Counts], told: list[Counts]) -> dict[str, float]:
    """Mean absolute errors of the numbers running and waiting, each told one against the nearest true one in time."""
    running, waiting, at = [], [], 0
    for when_s, r, w in told:
        while at + 1 < len(true) and abs(true[at + 1][0] - when_s) <= abs(true[at][0] - when_s):
            at += 1
        if true and abs(true[at][0] - when_s) < 2 * LOOK_EVERY_S:
            running.append(abs(r - true[at][1]))
            waiting.append(abs(w - true[at][2]))
    if not running:
        return {}
    return {"running_error": round(statistics.fmean(running), 2), "waiting_error": round(statistics.fmean(waiting), 2)}


class Setting:
    """The engine, its two predictors and the gateways, as programs of their own."""

    def __init__(self, python: Path, folder: Path) -> None:
        self._python, self._folder = python, folder
        self.programs: list[Program] = []

    async def start(self) -> None:
        flags = [part for key, value in MODEL.items() for part in (f"--{key}", str(value))]
        maker = str(REPOSITORY / "tools" / "vllm" / "make_tiny_model.py")
        command = [str(self._python), maker, str(self._folder / "model"), *flags, "--no-weights"]
        await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
        arguments = [part for key, value in SHAPE.items() for part in ("--" + key.replace("_", "-"), str(value))]
        self.server = VllmServer(
            self._python, self._folder / "model", self._folder / "vllm.log", name=f"bench-{os.getpid()}",
            arguments=[*arguments, "--num-gpu-blocks-override", "600", "--seed", "1"],
            environment={"BLOCK_VLLM_EMULATE": PROFILE},
        )  # fmt: skip
        self.programs.append(self.server)
        await asyncio.to_thread(self.server.wait)
        told = "&".join(f"{key}={value}" for key, value in SHAPE.items())
        sources = {"vllm": f"vllm:{self.server.name}", "metrics": f"metrics:{self.server.url}#{told}"}
        self.predictors = {name: await self._predictor(name, source) for name, source in sources.items()}

    async def _predictor(self, name: str, source: str) -> str:
        port = free_port()
        command = [*BLOCK, "predictor", "--source", source, "--profile", PROFILE, "--port", str(port)]
        return await self._begin(command, name, port)

    async def gateway(self, number: int, counting: str) -> str:
        port = free_port()
        command = [sys.executable, __file__, "--serve", self.server.url, "--port", str(port), "--count", counting,
                   "--told", str(self.told(number))]  # fmt: skip
        return await self._begin(command, f"gateway-{number}", port, "/v1/models")

    def told(self, number: int) -> Path:
        return self._folder / f"told-{number}.jsonl"

    async def _begin(self, command: list[str], name: str, port: int, path: str = "/health") -> str:
        program, url = Program(command, self._folder / f"{name}.log", {}), f"http://127.0.0.1:{port}"
        self.programs.append(program)
        await asyncio.to_thread(wait_healthy, program, url, path, 40)
        return url

    def stop(self) -> None:
        for program in reversed(self.programs):
            program.stop()


async def measured(
    setting: Setting, gateways: int, rate_rps: float, seconds: float, counting: str
) -> tuple[list[Outcome], dict[str, dict[str, float]]]:
    """One load on fresh gateways: the outcomes, and how far each source's queue lengths are off."""
    kept = len(setting.programs)
    urls = [await setting.gateway(number, counting) for number in range(gateways)]
    notes: dict[str, list[Counts]] = {name: [] for name in ("true", *setting.predictors)}
    async with aiohttp.ClientSession() as session, AsyncExitStack() as stack:
        readers = {"true": plugin_counts(setting.server.name)} | {
            name: predictor_counts(session, url) for name, url in setting.predictors.items()
        }
        watchers = [asyncio.create_task(look(read, notes[name])) for name, read in readers.items()]
        for watcher in watchers:
            stack.callback(watcher.cancel)
        loads = [
            offer(
                url, requests=int(rate_rps * seconds / gateways), rate_rps=rate_rps / gateways, seed=SEED + number,
                prompt=(20, 600), output=(10, 250), predictors=setting.predictors, server=f"gateway {number}",
            )
            for number, url in enumerate(urls)
        ]  # fmt: skip
        began_s = time.time()
        outcomes = [outcome for found in await asyncio.gather(*loads) for outcome in found]
    while len(setting.programs) > kept:
        await asyncio.to_thread(setting.programs.pop().stop)
    notes["gateway"] = [
        found
        for number in range(gateways)
        for line in setting.told(number).read_text().splitlines()
        if (found := tuple(json.loads(line)))[0] >= began_s
    ]
    notes["gateway"].sort()
    return outcomes, {n: counts_error(notes["true"], told) for n, told in notes.items() if n != "true"}


async def compare(given: argparse.Namespace, python: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(python, Path(folder))
        try:
            await setting.start()
            for gateways in map(int, given.gateways.split(",")):
                for rate_rps in map(float, given.rates.split(",")):
                    outcomes, counts = await measured(setting, gateways, rate_rps, given.seconds, given.count)
                    failed = [o.error for o in outcomes if o.error]
                    print(
                        f"{gateways} gateway(s), {rate_rps:g} requests/s, {len(outcomes)} requests, {len(failed)} failed"
                    )
                    for name in ("vllm", "metrics", "gateway"):
                        print(f"  {name:8} {json.dumps(errors(outcomes, name) | counts[name])}", flush=True)
        finally:
            setting.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="2,8,14")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--gateways", default="1,2")
    parser.add_argument("--count", choices=("events", "usage"), default="usage")
    parser.add_argument("--serve", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--told", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        asyncio.run(serve_and_tell(given.serve, given.port, given.count, given.told))
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    host = f"{platform.machine()} with {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
    print(f"commit {commit.stdout.strip()}, {host}, seed {SEED}, {given.count}")
    python = Path(os.environ.get("BLOCK_VLLM_ENV", REPOSITORY / ".venv-vllm")).absolute() / "bin" / "python"
    if not python.exists():
        raise SystemExit("Needs a real vLLM: run `make test-vllm` first, or set BLOCK_VLLM_ENV to its environment.")
    asyncio.run(compare(given, python))


if __name__ == "__main__":
    main()
