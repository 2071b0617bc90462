"""Start the instances, then serve the same workload through one gateway after another, each with another policy."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from block.demo import scenario
from block.demo.processes import block_process
from block.errors import ConfigError
from block.metrics.row import Row
from block.metrics.summary import Summary, summarize
from block.replay import ReplayOptions, replay
from block.workload.offered import Offered

SETTLE_S = 1.0
LATE_S = 0.05  # an emulated step that is later than this says that the machine is too slow


class Instance(msgspec.Struct, frozen=True):
    """One emulated instance with its predictor."""

    name: str
    url: str
    predictor_url: str


class Outcome(msgspec.Struct, frozen=True):
    """One policy's run. ``preemptions`` are counted by the engines; ``lateness_s_p99`` is the later of client and engines."""

    policy: str
    rows: Sequence[Row]
    summary: Summary
    lateness_s_p99: float


Progress = Callable[[str, Row | None], None]


async def run_demo(
    policies: Sequence[str], rate_rps: float, seconds: float, seed: int, progress: Progress
) -> list[Outcome]:
    """Run every policy on the same instances and the same workload; ``progress`` hears of each phase and row.

    Raises:
        ConfigError: a process did not start.
    """
    offered = scenario.workload(rate_rps, seconds, seed)
    async with AsyncExitStack() as stack:
        progress("starting instances", None)
        instances = await _start_all(stack)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        return [await _run_policy(session, instances, policy, offered, seed, progress) for policy in policies]


async def _start_all(stack: AsyncExitStack) -> list[Instance]:
    try:
        async with asyncio.TaskGroup() as group:
            starts = [group.create_task(_start(stack, i, kind)) for i, kind in enumerate(scenario.INSTANCES)]
    except* ConfigError as failed:
        raise failed.exceptions[0] from None
    return [start.result() for start in starts]


async def _start(stack: AsyncExitStack, number: int, kind: scenario.Kind) -> Instance:
    name = f"demo-{id(stack):x}-{number}"
    engine = await stack.enter_async_context(
        block_process(["emulate", "--port", "0", "--json", "--name", name, "--model", scenario.MODEL, *kind.flags()])
    )
    speed = ["--speed", str(kind.speed)]
    predictor = await stack.enter_async_context(
        block_process(
            ["predictor", "--port", "0", "--json", "--source", f"emulate:{name}", "--profile", scenario.PROFILE, *speed]
        )
    )
    return Instance(f"{'fast' if kind.speed == 1 else 'slow'}-{kind.kv_blocks}", engine["url"], predictor["url"])


async def _run_policy(
    session: aiohttp.ClientSession, instances: Sequence[Instance], policy: str, offered: Sequence[Offered], seed: int,
    progress: Progress,
) -> Outcome:  # fmt: skip
    progress(policy, None)
    flags = ["--policy", policy, "--seed", str(seed), "--port", "0", "--json", "--log-level", "warning"]
    if policy == "block-oracle":
        flags += ["--length-estimator", "header-oracle"]
    for instance in instances:
        flags += ["--instance", f"{instance.url},predictor={instance.predictor_url},name={instance.name}"]
    before = await _counters(session, instances)
    async with block_process(["serve", *flags]) as gateway:
        await asyncio.sleep(SETTLE_S)
        options = ReplayOptions(model=scenario.MODEL, length_mode="header", max_tokens=600, seed=seed, policy=policy)
        rows = await replay(offered, gateway["url"], options, on_row=lambda row: progress(policy, row))
    after = await _counters(session, instances)
    summary = msgspec.structs.replace(summarize(rows), preemptions=int(after["preemptions"] - before["preemptions"]))
    return Outcome(policy, rows, summary, max(summary.lateness_s_p99, after["lateness"]))


async def _counters(session: aiohttp.ClientSession, instances: Sequence[Instance]) -> dict[str, float]:
    """Preemptions so far (sum over instances) and the P99 lateness of engine steps since the last call (worst)."""
    from prometheus_client.parser import text_string_to_metric_families

    preemptions, lateness = 0.0, 0.0
    for instance in instances:
        async with session.get(f"{instance.url}/metrics") as answer:
            for family in text_string_to_metric_families(await answer.text()):
                if family.name == "vllm:num_preemptions":
                    preemptions += sum(s.value for s in family.samples if s.name.endswith("_total"))
        async with session.get(f"{instance.url}/emulate/lateness") as answer:
            lateness = max(lateness, (await answer.json())["p99_s"] or 0.0)
    return {"preemptions": preemptions, "lateness": lateness}


def write_outcomes(outcomes: Sequence[Outcome], rows_path: Path, chart_path: Path) -> None:
    """The per-request rows of all policies and the chart of their latencies."""
    from block.metrics.charts import latency_chart
    from block.metrics.row import row_writer

    with row_writer(rows_path) as writer:
        for outcome in outcomes:
            for row in outcome.rows:
                writer.write(row)
    latency_chart({o.policy: o.rows for o in outcomes}, chart_path, "the same load, four unequal instances")


def as_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What ``block demo --json`` prints."""
    fields = (
        "ttft_s_mean",
        "ttft_s_p50",
        "ttft_s_p99",
        "e2e_s_mean",
        "e2e_s_p99",
        "tpot_s_mean",
        "requests_rps",
        "preemptions",
    )
    return {
        "policies": {
            o.policy: {
                "requests": o.summary.requests,
                "failed": o.summary.failed + o.summary.rejected,
                **{name: getattr(o.summary, name) for name in fields},
            }
            for o in outcomes
        },
        "lateness_s_p99": max((o.lateness_s_p99 for o in outcomes), default=0.0),
    }
