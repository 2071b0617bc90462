"""What ``block demo --autoscale`` shows: a live table while it runs, a table of figures at its end."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.table import Table

from block.autoscale.live.keeper import Record
from block.demo.provisioning import TTFT_S, Outcome, Progress, as_json
from block.metrics.row import Row

LINES: Final = 16
LATELY_S: Final = 5.0


@contextmanager
def display() -> Iterator[Progress]:
    """A live table on stderr: the last decisions, one line each."""
    lines: deque[tuple[str, ...]] = deque(maxlen=LINES)
    ttfts: deque[tuple[float, float]] = deque(maxlen=1000)
    counted = {"done": 0, "failed": 0}
    began_s = time.monotonic()
    with Live(_table(lines, counted), console=Console(stderr=True), auto_refresh=False, transient=True) as live:

        def hear(record: Record | None, row: Row | None) -> None:
            now_s = time.monotonic() - began_s
            if row is not None:
                counted["done" if row.status == "finished" else "failed"] += 1
                if row.ttft_s is not None:
                    ttfts.append((now_s, row.ttft_s))
            if record is not None:
                recent = sorted(ttft_s for at_s, ttft_s in ttfts if at_s > now_s - LATELY_S)
                worst = f"{recent[int(0.9 * len(recent))]:.2f} s" if recent else ""
                lines.append((f"{now_s:.0f} s", str(record.arrivals), *_counts(record), worst, record.reason))
                live.update(_table(lines, counted), refresh=True)

        yield hear


def _counts(record: Record) -> tuple[str, ...]:
    def in_phase(phase: str) -> int:
        return sum(phases.get(phase, 0) for phases in record.members.values())

    bars = "█" * in_phase("ready") + "▒" * in_phase("starting") + "░" * in_phase("draining")
    return bars, str(sum(record.want.values()))


def _table(lines: deque[tuple[str, ...]], counted: dict[str, int]) -> Table:
    caption = f"{counted['done']} answered, {counted['failed']} failed   █ ready ▒ starting ░ draining"
    table = Table(title="load rises and falls, instances follow", caption=caption)
    for name in ("time", "arrivals", "instances", "wanted", "P90 TTFT lately", "why"):
        table.add_column(name, no_wrap=name != "why", min_width=6 if name == "instances" else None)
    for line in lines:
        table.add_row(*line)
    return table


def print_table(outcome: Outcome, out: Path) -> None:
    """The figures of the run, on stdout."""
    figures = as_json(outcome)
    table = Table(title=f"{figures['controller']}: {figures['requests']} requests, {figures['failed']} failed")
    for name in (
        "TTFT P50",
        "TTFT P99",
        f"TTFT within {TTFT_S:g} s",
        "instances",
        "instance seconds",
        "always the most",
    ):
        table.add_column(name, justify="right")
    table.add_row(
        _seconds(figures["ttft_s_p50"]), _seconds(figures["ttft_s_p99"]), f"{figures['slo_attainment_fraction']:.1%}",
        f"{figures['instances_least']}-{figures['instances_most']}", f"{figures['instance_seconds']:.0f}",
        f"{figures['instance_seconds_at_peak']:.0f}",
    )  # fmt: skip
    console = Console() if Console().is_terminal else Console(width=120)
    console.print(table)
    console.print(f"Rows: {out / 'rows.csv'}   chart: {out / 'provisioning.png'}", highlight=False)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"
