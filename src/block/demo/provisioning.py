"""``block demo --autoscale``: load rises and falls, and instances come and go with it, all as real processes."""

import asyncio
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from block.autoscale.live.keeper import Record
from block.core import Slo
from block.demo.processes import block_process
from block.demo.scenario import MODEL, SHORTEN
from block.errors import ConfigError
from block.metrics.row import Row
from block.metrics.summary import Summary, summarize
from block.replay import ReplayOptions, replay
from block.workload.offer import WorkloadConfig, offer
from block.workload.offered import Offered

ADMIN_KEY: Final = "demo"
PROFILE: Final = "h200-qwen2.5-32b"
MOST: Final = 6
TTFT_S: Final = 1.0
PEAK_RPS: Final = 12.0
SECONDS: Final = 90.0
CONTROLLER: Final = "replay:recent_s=20,level_s=5,base_s=20,beyond_s=5,renew_s=5"
"""The defaults look minutes back and ahead; a day passes in a minute and a half here."""
LOW: Final = 0.1
"""The quiet rate over the peak rate."""
FIRST_READY_WITHIN_S: Final = 60.0

CONFIG: Final = """
name = "demo"
controller = "{controller}"
interval_s = 1.0
port = 0
lock = ""

[slo]
ttft_s = {ttft_s}

[guard]
least = 1
most = {most}
settle_s = {settle_s}

[gateways]
urls = ["{url}"]
admin_key = "{key}"

[[kinds]]
name = "gpu"
profile = "{profile}"
cold_start_s = 3.0
most = {most}
limits = {{ max_num_seqs = 8, max_num_batched_tokens = 512, num_gpu_blocks = 1024, max_model_len = 2304 }}

[actuator]
type = "local"
model = "{model}"
drain_within_s = 30
"""


class Outcome(msgspec.Struct, frozen=True):
    """What was offered, what came of it, and every decision. Times in seconds since the first request was due."""

    rows: Sequence[Row]
    records: Sequence[Record]
    began_s: float
    summary: Summary


Progress = Callable[[Record | None, Row | None], None]


def workload(peak_rps: float, seconds: float, seed: int) -> list[Offered]:
    """Poisson arrivals whose rate rises from ``LOW`` of the peak to the peak and falls again, as sin² does."""
    config = WorkloadConfig(
        rate_rps=1.0, requests=max(1, _expected(peak_rps, seconds)), model=MODEL, total_tokens_max=1500, max_tokens=600
    )
    grid_s = np.linspace(0.0, seconds, 2000)
    rates = peak_rps * (LOW + (1 - LOW) * np.sin(math.pi * grid_s / seconds) ** 2)
    passed = np.concatenate([[0.0], np.cumsum((rates[1:] + rates[:-1]) / 2 * np.diff(grid_s))])
    offered = []
    for one in offer(config, seed):
        at_s = float(np.interp(one.request.arrived_s, passed, grid_s))
        if one.request.arrived_s <= passed[-1]:
            request = msgspec.structs.replace(one.request, arrived_s=at_s)
            offered.append(Offered(request, max(1, one.output_tokens // SHORTEN)))
    return offered


def _expected(peak_rps: float, seconds: float) -> int:
    return int(1.3 * peak_rps * seconds * (LOW + (1 - LOW) / 2) + 30)


async def run_provisioning(controller: str, peak_rps: float, seconds: float, seed: int, progress: Progress) -> Outcome:
    """Gateway, autoscaler and load; ``progress`` hears of every decision and every row.

    Raises:
        ConfigError: a process did not start.
    """
    offered = workload(peak_rps, seconds, seed)
    records: list[Record] = []
    async with AsyncExitStack() as stack:
        flags = ["--port", "0", "--json", "--admin-key", ADMIN_KEY, "--log-level", "warning", "--seed", str(seed)]
        gateway = await stack.enter_async_context(
            block_process(["serve", *flags, "--health-check-interval-secs", "0.5"])
        )
        config = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "autoscale.toml"
        text = CONFIG.format(
            controller=controller, url=gateway["url"], key=ADMIN_KEY, most=MOST, profile=PROFILE, model=MODEL,
            ttft_s=TTFT_S, settle_s=max(2.0, seconds / 9),
        )  # fmt: skip
        await asyncio.to_thread(config.write_text, text)
        ready = asyncio.Event()

        def hear(line: bytes) -> None:
            record = msgspec.json.decode(line, type=Record)
            records.append(record)
            if any(phases.get("ready") for phases in record.members.values()):
                ready.set()
            progress(record, None)

        await stack.enter_async_context(
            block_process(["autoscale", str(config), "--json", "--log-level", "warning"], hear)
        )
        try:
            await asyncio.wait_for(ready.wait(), FIRST_READY_WITHIN_S)
        except TimeoutError:
            why = records[-1].trouble or records[-1].reason if records else "it decided nothing"
            raise ConfigError(f"No instance became ready: {why}") from None
        began_s = time.time()
        options = ReplayOptions(model=MODEL, length_mode="header", max_tokens=600, seed=seed)
        rows = await replay(offered, gateway["url"], options, on_row=lambda row: progress(None, row))
    return Outcome(rows, records, began_s, summarize(rows, Slo(ttft_s=TTFT_S)))


def instance_seconds(outcome: Outcome) -> float:
    """Instances that there were (starting and draining ones too), times seconds, from the first request to the last decision."""
    total = 0.0
    for before, after in zip(outcome.records, outcome.records[1:], strict=False):
        if after.at_s > outcome.began_s:
            total += _present(before) * (after.at_s - max(before.at_s, outcome.began_s))
    return total


def _present(record: Record) -> int:
    return sum(sum(phases.values()) for phases in record.members.values())


def as_json(outcome: Outcome) -> dict[str, Any]:
    """What ``block demo --autoscale --json`` prints."""
    summary, counts = outcome.summary, [_present(record) for record in outcome.records if record.at_s > outcome.began_s]
    return {
        "controller": outcome.records[-1].controller, "requests": summary.requests,
        "failed": summary.failed + summary.rejected, "ttft_s_p50": summary.ttft_s_p50, "ttft_s_p99": summary.ttft_s_p99,
        "slo_attainment_fraction": summary.slo_attainment_fraction, "ttft_slo_s": TTFT_S,
        "instances_least": min(counts, default=0), "instances_most": max(counts, default=0),
        "instance_seconds": round(instance_seconds(outcome), 1),
        "instance_seconds_at_peak": round(max(counts, default=0) * summary.duration_s, 1),
        "decisions": len(outcome.records), "cold_start_s": outcome.records[-1].cold_start_s,
        "lateness_s_p99": summary.lateness_s_p99,
    }  # fmt: skip


def write_decisions(outcome: Outcome, path: Path) -> None:
    """One JSON line a decision."""
    path.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in outcome.records))


def draw(outcome: Outcome, path: Path) -> None:
    """Rate, instances and TTFT over time, as PNG or SVG by the suffix."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (load, count, wait) = pyplot.subplots(3, 1, figsize=(10, 8), sharex=True, layout="constrained")
    arrivals = np.array([row.intended_s for row in outcome.rows])
    width_s = max(2.0, float(arrivals.max()) / 45)
    edges = np.arange(0.0, float(arrivals.max()) + width_s, width_s)
    load.stairs(np.histogram(arrivals, edges)[0] / width_s, edges, fill=True, alpha=0.5)
    load.set(ylabel="requests/s")
    at_s = [record.at_s - outcome.began_s for record in outcome.records]
    for phase, color in (("ready", "C2"), ("starting", "C1"), ("draining", "C3")):
        values = [sum(phases.get(phase, 0) for phases in record.members.values()) for record in outcome.records]
        count.step(at_s, values, where="post", label=phase, color=color)
    wants = [sum(record.want.values()) for record in outcome.records]
    count.step(at_s, wants, where="post", label="wanted", color="black", linestyle=":")
    count.set(ylabel="instances", ylim=(-0.1, None))
    count.legend(fontsize="small", ncols=4)
    done = [(row.intended_s, row.ttft_s) for row in outcome.rows if row.ttft_s is not None]
    wait.plot([s for s, _ in done], [ttft_s for _, ttft_s in done], ".", markersize=3)
    wait.axhline(TTFT_S, color="black", linestyle=":", label="target")
    wait.set(ylabel="TTFT, seconds", yscale="log", xlabel="seconds")
    wait.legend(fontsize="small")
    wait.set_xlim(0, max(at_s[-1], float(edges[-1])))
    figure.suptitle(f"{outcome.records[-1].controller}: load rises and falls, instances follow")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
