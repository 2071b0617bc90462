"""Rows -> a chart: how TTFT and E2E are distributed under each policy. matplotlib is imported when a chart is drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from block.errors import ConfigError
from block.metrics.row import Row
from block.metrics.summary import percentile

SUFFIXES = (".png", ".svg")


def latency_chart(rows_of: Mapping[str, Sequence[Row]], path: Path, title: str = "") -> None:
    """Draw TTFT and E2E distributions and their P99, one colour a policy, as PNG or SVG by the suffix.

    Raises:
        ConfigError: another suffix, or a folder that does not exist.
    """
    check_chart_path(path)
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), width_ratios=(2, 1), layout="constrained")
    for line, (name, label) in zip(axes, (("ttft_s", "TTFT"), ("e2e_s", "end-to-end latency")), strict=True):
        curve, bars = line
        for number, (policy, rows) in enumerate(rows_of.items()):
            seconds = sorted(v for row in rows if (v := getattr(row, name)) is not None)
            if not seconds:
                continue
            fractions = [(i + 1) / len(seconds) for i in range(len(seconds))]
            curve.plot(seconds, fractions, label=policy, **line_style(number))
            bar = bars.barh(number, percentile(seconds, 99), color=line_style(number)["color"])
            bars.bar_label(bar, fmt="%.3g", padding=3)
        curve.set(xscale="log", xlabel=f"{label}, seconds", ylabel="fraction of requests", ylim=(0, 1))
        plain_decades(curve.xaxis)
        bars.margins(x=0.15)
        curve.grid(alpha=0.3)
        bars.set_yticks(range(len(rows_of)), list(rows_of))
        bars.invert_yaxis()
        bars.set(xlabel=f"P99 {label}, seconds")
    axes[0][0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def line_style(number: int) -> dict[str, str]:
    """Colour and dashes of the line with this number: forty are told apart."""
    return {"color": f"C{number % 10}", "linestyle": ("-", "--", ":", "-.")[number // 10 % 4]}


def plain_decades(axis: Any) -> None:
    """Mark a logarithmic axis at 1, 2 and 5 of every decade, in plain numbers."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")


def check_chart_path(path: Path) -> None:
    """Say before a long run that its chart could not be written.

    Raises:
        ConfigError: neither PNG nor SVG, or a folder that does not exist.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"Charts are written as .png or .svg, not {path.name}.")
    if not path.parent.is_dir():
        raise ConfigError(f"The folder {path.parent} does not exist.")
