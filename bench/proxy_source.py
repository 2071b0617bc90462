"""What each source of an engine's state is worth: predictions at a request's arrival against what was then measured.

    python bench/proxy_source.py [--rates 6,18,32] [--seconds 10] [--gateways 1,2] [--count events]

One engine of `block emulate` (an H200's pace with Llama-3.1-8B, 64 sequences, 600 blocks), so the engine is the model itself and
only the source differs: its snapshots (`shm`), its metrics page (`metrics`), and a gateway that models it from its streams
(`proxy`; with two gateways each sends and sees half of the requests). Prompts of 20-600 tokens, answers of exactly 10-250.
Predictions know nothing of later arrivals, whose share of the error is the same for all.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import time
import uuid
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

import aiohttp

from block.demo.processes import block_process

PROFILE = "h200-llama3.1-8b"
LIMITS = {"max-num-seqs": 64, "max-num-batched-tokens": 1024, "max-model-len": 4096}
BLOCKS = 600
SEED = 40


class Answer(NamedTuple):
    """One request: seconds measured at the client, and predicted by each source as (TTFT, E2E)."""

    ttft_s: float
    e2e_s: float
    predicted: dict[str, tuple[float, float]]


async def ask(
    session: aiohttp.ClientSession, gateway: str, predictors: dict[str, str], prompt: int, output: int
) -> Answer:
    question = {"prompt_tokens": prompt, "max_tokens": output, "output_tokens": output}
    predicted = {}
    for name, url in predictors.items():
        async with session.post(f"{url}/predict", json=question) as answer:
            found = await answer.json()
            predicted[name] = (found["ttft_s"], found["e2e_s"])
    body = {"model": "emulated", "prompt": [5] * prompt, "max_tokens": output, "ignore_eos": True, "stream": True}
    sent_s = time.perf_counter()
    async with session.post(f"{gateway}/v1/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        await answer.content.readline()
        ttft_s = time.perf_counter() - sent_s
        async for _ in answer.content:
            pass
        headers = answer.headers
    if "x-predicted-ttft-ms" in headers:
        predicted["proxy"] = (
            float(headers["x-predicted-ttft-ms"]) / 1e3,
            float(headers["x-predicted-e2e-ms"]) / 1e3,
        )
    return Answer(ttft_s, time.perf_counter() - sent_s, predicted)


async def offer(gateways: list[str], predictors: dict[str, str], rate_rps: float, seconds: float) -> list[Answer]:
    chance, tasks = random.Random(SEED), []
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        at_s = time.perf_counter()
        for number in range(int(rate_rps * seconds)):
            at_s += chance.expovariate(rate_rps)
            prompt, output = chance.randint(20, 600), chance.randint(10, 250)
            await asyncio.sleep(at_s - time.perf_counter())
            gateway = gateways[number % len(gateways)]
            tasks.append(asyncio.create_task(ask(session, gateway, predictors, prompt, output)))
        return list(await asyncio.gather(*tasks))


async def measured(count: int, rate_rps: float, seconds: float, counting: str) -> list[Answer]:
    """Fresh processes, one load."""
    name = f"bench-{uuid.uuid4().hex[:8]}"
    async with AsyncExitStack() as stack:

        async def start(*arguments: str) -> str:
            ready = await stack.enter_async_context(block_process([*arguments, "--port", "0", "--json"]))
            return str(ready["url"])

        flags = [part for key, value in LIMITS.items() for part in (f"--{key}", str(value))]
        engine = await start(
            "emulate", "--profile", PROFILE, "--model", "emulated", "--name", name, "--num-gpu-blocks", str(BLOCKS), *flags
        )  # fmt: skip
        told = "&".join(f"{key.replace('-', '_')}={value}" for key, value in LIMITS.items())
        sources = {"shm": f"emulate:{name}", "metrics": f"metrics:{engine}#{told}"}
        predictors = {
            key: await start("predictor", "--source", source, "--profile", PROFILE) for key, source in sources.items()
        }
        instance = ",".join([engine, f"profile={PROFILE}", *(f"{key}={value}" for key, value in LIMITS.items())])
        gateways = [await start("serve", "--instance", instance, "--count-tokens", counting) for _ in range(count)]
        await asyncio.sleep(1.0)
        return await offer(gateways, predictors, rate_rps, seconds)


def errors(answers: list[Answer], name: str) -> dict[str, Any]:
    """Medians of absolute relative errors, and predicted over measured means."""
    pairs = [(a, a.predicted[name]) for a in answers if name in a.predicted]
    if not pairs:
        return {"requests": 0}
    return {
        "requests": len(pairs),
        "ttft_error": round(statistics.median(abs(p[0] - a.ttft_s) / a.ttft_s for a, p in pairs), 3),
        "e2e_error": round(statistics.median(abs(p[1] - a.e2e_s) / a.e2e_s for a, p in pairs), 3),
        "ttft_ratio": round(sum(p[0] for _, p in pairs) / sum(a.ttft_s for a, _ in pairs), 3),
        "e2e_ratio": round(sum(p[1] for _, p in pairs) / sum(a.e2e_s for a, _ in pairs), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="6,18,32")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--gateways", default="1,2")
    parser.add_argument("--count", choices=("events", "usage"), default="events")
    given = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    print(
        f"commit {commit.stdout.strip()}, {platform.machine()} with {os.cpu_count()} CPUs, seed {SEED}, {given.count}"
    )
    for count in map(int, given.gateways.split(",")):
        for rate_rps in map(float, given.rates.split(",")):
            answers = asyncio.run(measured(count, rate_rps, given.seconds, given.count))
            mean_s = statistics.fmean(a.e2e_s for a in answers)
            print(f"{count} gateway(s), {rate_rps:g} requests/s, mean E2E {mean_s:.2f} s")
            for name in ("shm", "metrics", "proxy"):
                print(f"  {name:8} {json.dumps(errors(answers, name))}", flush=True)


if __name__ == "__main__":
    main()
