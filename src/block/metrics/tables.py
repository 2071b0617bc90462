"""Summaries as a table for people and as JSON for programs."""

import sys
from collections.abc import Mapping
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from block.metrics.summary import Summary

_SECONDS = (
    ("TTFT mean", "ttft_s_mean"), ("P50", "ttft_s_p50"), ("P99", "ttft_s_p99"),
    ("E2E mean", "e2e_s_mean"), ("P99", "e2e_s_p99"),
)  # fmt: skip


def summary_table(summaries: Mapping[str, Summary], title: str | None = None, *, first_column: str = "policy") -> Table:
    """One line a summary. The best figure of each latency column is bold; without targets there is no column for them."""
    table = Table(title=title, caption="latencies in seconds from the intended send; TPOT in milliseconds")
    table.add_column(first_column, no_wrap=True)
    for head in (*(head for head, _ in _SECONDS), "TPOT ms", "preempted", "failed", "requests/s"):
        table.add_column(head, justify="right")
    targets = any(summary.slo_attainment_fraction is not None for summary in summaries.values())
    if targets:
        table.add_column("SLO met", justify="right")
    best = {
        name: min((v for s in summaries.values() if (v := getattr(s, name)) is not None), default=None)
        for _, name in _SECONDS
    }
    for label, summary in summaries.items():
        table.add_row(
            label,
            *(seconds(getattr(summary, name), best[name] if len(summaries) > 1 else None) for _, name in _SECONDS),
            "-" if summary.tpot_s_mean is None else f"{summary.tpot_s_mean * 1000:.1f}",
            "-" if summary.preemptions is None else str(summary.preemptions),
            str(summary.failed + summary.rejected),
            f"{summary.requests_rps:.1f}",
            *([_percent(summary.slo_attainment_fraction)] if targets else []),
        )
    return table


def stdout() -> Console:
    """The terminal, or 120 columns where it is none (rich would take 80 and cut the table)."""
    return Console(width=None if sys.stdout.isatty() else 120)


def summary_json(summary: Summary) -> dict[str, Any]:
    """A summary as plain JSON values."""
    fields: dict[str, Any] = msgspec.to_builtins(summary)
    return fields


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.1%}"


def seconds(value: float | None, best: float | None) -> str:
    """A latency as a cell: bold if it is the best one, a dash if there is none."""
    if value is None:
        return "-"
    text = f"{value:.3f}" if value < 10 else f"{value:.1f}"
    return f"[bold]{text}[/bold]" if value == best else text
