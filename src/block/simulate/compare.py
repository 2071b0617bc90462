"""Policies x rates x seeds: means over the seeds, as cells of a table and as curves."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from block.metrics.charts import check_chart_path, line_style, plain_decades
from block.metrics.summary import Summary
from block.simulate.config import SimulationConfig
from block.simulate.sweep import RunAll, varied


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One policy at one rate; every figure of a `Summary` is the mean over the seeds that have it."""

    policy: str
    rate_rps: float
    seeds: int
    figures: dict[str, float | None]


def compare(
    config: SimulationConfig, policies: Sequence[str], rates_rps: Sequence[float], seeds: Sequence[int], run_all: RunAll
) -> list[Cell]:
    """Run every combination; cells by rate, then policy, in the order given."""
    keys = [(rate, policy) for rate in rates_rps for policy in policies]
    configs = [varied(config, policy=policy, rate_rps=rate, seed=seed) for rate, policy in keys for seed in seeds]
    summaries = run_all(configs)
    count = len(seeds)
    return [
        Cell(policy=policy, rate_rps=rate, seeds=count, figures=_means(summaries[i * count : (i + 1) * count]))
        for i, (rate, policy) in enumerate(keys)
    ]


def _means(summaries: Sequence[Summary]) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    for name in Summary.__struct_fields__:
        values = [value for one in summaries if (value := getattr(one, name)) is not None]
        means[name] = float(np.mean(values)) if values else None
    return means


def write_cells(path: Path, cells: Sequence[Cell]) -> None:
    """The cells as CSV, one line each."""
    import csv

    names = list(Summary.__struct_fields__)
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(["policy", "rate_rps", "seeds", *names])
        for cell in cells:
            values = ["" if (v := cell.figures[name]) is None else f"{v:.6g}" for name in names]
            lines.writerow([cell.policy, f"{cell.rate_rps:g}", cell.seeds, *values])


def curves(path: Path, cells: Sequence[Cell], title: str = "") -> None:
    """TTFT P99, mean E2E and preemptions against the rate, one line a policy; PNG or SVG by the suffix.

    Raises:
        ConfigError: another suffix, or a folder that does not exist.
    """
    check_chart_path(path)
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    shown = (("ttft_s_p99", "TTFT P99, seconds"), ("e2e_s_mean", "mean E2E, seconds"), ("preemptions", "preemptions"))
    figure, axes = pyplot.subplots(1, len(shown), figsize=(14, 4.5), layout="constrained")
    for ax, (name, label) in zip(axes, shown, strict=True):
        for number, policy in enumerate(dict.fromkeys(cell.policy for cell in cells)):
            own = [
                (cell.rate_rps, value)
                for cell in cells
                if cell.policy == policy and (value := cell.figures[name]) is not None
            ]
            if own:
                marker = "osD^vPX*<>"[number % 10]
                ax.plot(*zip(*own, strict=True), marker=marker, markersize=5, label=policy, **line_style(number))
        ax.set(xlabel="requests per second offered", ylabel=label)
        ax.grid(alpha=0.3)
    axes[0].set_yscale("log")
    plain_decades(axes[0].yaxis)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
