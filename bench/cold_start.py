"""How long an instance takes from its order to its first predicted answer, step by step, as a process of this machine.

    python bench/cold_start.py [ROUNDS]

A gateway runs; each round starts one engine (``block emulate``) and its predictor as the local actuator does, joins them at the
gateway, and stops them again. Printed are seconds since the order: medians and the worst of all rounds.
"""

import asyncio
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import AsyncExitStack

import aiohttp

from block.autoscale.actuators.local import LocalActuator, LocalSettings
from block.autoscale.actuators.surroundings import Surroundings
from block.autoscale.live.gateways import Gateway
from block.autoscale.live.membership import Membership
from block.autoscale.terms import Kind
from block.demo.processes import block_process

KEY = "bench"
STEPS = ("engine and predictor healthy", "gateway has its state", "first predicted answer")


async def round_of(
    session: aiohttp.ClientSession, actuator: LocalActuator, membership: Membership, url: str
) -> list[float]:
    """Seconds since the order at which each step was reached."""
    ordered_s = time.time()
    await actuator.scale_to({"default": 1})
    while (await actuator.members())[0].phase != "ready":  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    healthy_s = time.time()
    name = (await actuator.members())[0].id
    while name not in membership.ready_s:
        await membership.beat()
        await asyncio.sleep(0.01)
    body = {"model": "emulated", "prompt": "hello", "max_tokens": 1, "ignore_eos": True}
    while True:
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            if answer.status == 200 and "x-predicted-ttft-ms" in answer.headers:
                break
        await asyncio.sleep(0.005)
    done_s = time.time()
    steps = [healthy_s - ordered_s, membership.ready_s[name] - ordered_s, done_s - ordered_s]
    await actuator.scale_to({"default": 0})
    while await actuator.members():
        await membership.beat()
        await asyncio.sleep(0.02)
    await membership.beat()
    return steps


async def main(rounds: int) -> list[list[float]]:
    """The steps of every round."""
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        flags = ["--port", "0", "--json", "--admin-key", KEY, "--log-level", "error"]
        gateway = await stack.enter_async_context(block_process(["serve", *flags]))
        membership = Membership([Gateway(session, gateway["url"], KEY, 2.0)])
        kinds = {"default": Kind()}
        actuator = LocalActuator(LocalSettings(), Surroundings("bench", kinds, membership, session))
        stack.push_async_callback(actuator.close)
        return [await round_of(session, actuator, membership, gateway["url"]) for _ in range(rounds)]


def report(rows: list[list[float]]) -> None:
    """Print medians and worst of each step."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    machine, load = f"{platform.machine()}, {os.cpu_count()} cores", os.getloadavg()[0]
    print(f"commit {git.stdout.strip()}, {machine}, load {load:.1f}, {len(rows)} rounds")
    for step, values in zip(STEPS, zip(*rows, strict=True), strict=True):
        print(f"{step:32} median {statistics.median(values):6.2f} s   worst {max(values):6.2f} s")


if __name__ == "__main__":
    report(asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)))
