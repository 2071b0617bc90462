"""What the scripts of the published tables and figures share: settings, published figures, tables and pictures.

Publication: Block, arXiv 2508.03611 (its SYSTOR '26 version is titled Astrolabe), and its public artifact's documents. Its
cluster: 12 NVIDIA A30, vLLM's V0 engine, 10,000 ShareGPT requests a point. `setting` makes the simulated counterpart,
`CAPACITY` holds its capacities.

Each script runs by itself: python experiments/paper_X.py [--seeds N] [--requests N] [--jobs N] [--quick] [--out FOLDER]. It
writes experiments/results/paper_X.csv, a figure in docs/figures and its table in docs/results.md, between the comments that
name it.
"""

import argparse
import csv
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import msgspec
import numpy as np

from block.metrics.charts import line_style, plain_decades
from block.metrics.summary import Summary
from block.simulate import SimulationConfig, load_config
from block.simulate.capacity import Capacity, find_capacity, parse_criterion
from block.simulate.config import LengthModel
from block.simulate.sweep import run_one, varied

HERE = Path(__file__).parent
ROOT = HERE.parent
DOCUMENT = ROOT / "docs" / "results.md"
A, B = TypeVar("A"), TypeVar("B")

ESTIMATED: Final = {"noise": 0.3, "distribution": False}
"""Lengths as the published tagger tells them: one number, off by 24 % on average (published MAE: 78.8 tokens of 326)."""

SETTINGS: Final[dict[str, dict[str, int]]] = {
    "default": {},
    "batch-24": {"max_num_seqs": 24},
    "chunk-2048": {"max_num_batched_tokens": 2048},
    "qwen2-7b": {"num_gpu_blocks": 7290},
}
"""Each published setting as what differs from paper-default.toml's limits (one block of each engine is its null block)."""

CAPACITY: Final[dict[tuple[str, str, str, str], float]] = {
    ("default", "ttft_p99<=10", "random", ""): 26.5,
    ("default", "ttft_p99<=10", "round-robin", ""): 26.5,
    ("default", "ttft_p99<=10", "min-qpm", ""): 25.5,
    ("default", "ttft_p99<=10", "infaas++", ""): 30.5,
    ("default", "ttft_p99<=10", "llumnix-minus", ""): 31.5,
    ("default", "ttft_p99<=10", "block-k:k=2", "estimated"): 31.6,
    ("default", "ttft_p99<=10", "block-k:k=4", "estimated"): 31.9,
    ("default", "ttft_p99<=10", "block-k:k=8", "estimated"): 31.7,
    ("default", "ttft_p99<=10", "block-paper", "estimated"): 31.7,
    ("default", "ttft_p99<=10", "block-k:k=2", "true"): 32.4,
    ("default", "ttft_p99<=10", "block-paper", "true"): 32.6,
    ("default", "ttft_p99<=3", "llumnix-minus", ""): 30.7,
    ("default", "ttft_p99<=3", "block-paper", "estimated"): 31.1,
    ("default", "ttft_p99<=3", "block-paper", "true"): 32.0,
    ("default", "ttft_p99<=3", "block-k:k=2", "estimated"): 30.2,
    ("batch-24", "ttft_p99<=3", "llumnix-minus", ""): 23.9,
    ("batch-24", "ttft_p99<=3", "block-paper", "estimated"): 27.2,
    ("batch-24", "ttft_p99<=3", "block-paper", "true"): 27.9,
    ("chunk-2048", "ttft_p99<=3", "llumnix-minus", ""): 29.8,
    ("chunk-2048", "ttft_p99<=3", "block-paper", "estimated"): 30.8,
    ("chunk-2048", "ttft_p99<=3", "block-paper", "true"): 31.5,
    ("qwen2-7b", "ttft_p99<=3", "llumnix-minus", ""): 62.0,
    ("qwen2-7b", "ttft_p99<=3", "block-paper", "estimated"): 67.9,
    ("qwen2-7b", "ttft_p99<=3", "block-paper", "true"): 68.3,
    ("qwen2-7b", "ttft_p99<=10", "llumnix-minus", ""): 69.7,
    ("qwen2-7b", "ttft_p99<=10", "block-k:k=2", "estimated"): 73.9,
    ("qwen2-7b", "ttft_p99<=10", "block-k:k=2", "true"): 78.5,
}
"""(setting, criterion, policy, lengths) -> published requests/s, run-to-run noise 0.3; of a range, the middle."""


class Options(NamedTuple):
    """How much to run and where to write. ``quick``: a tiny cluster and workload, to see that the script works; ``only``: the
    policies to measure again, the others being kept as the CSV has them (empty: all are measured)."""

    seeds: list[int]
    requests: int
    jobs: int
    quick: bool
    only: list[str]
    out: Path
    figures: Path


def options(description: str | None, *, seeds: int = 3, requests: int = 10_000) -> Options:
    """Read the command line; ``seeds`` and ``requests`` are this script's defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds, help="how many, from 1 on")
    parser.add_argument("--requests", type=int, default=requests, help="requests of one run")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny run that shows that the script works; the figures mean nothing"
    )
    parser.add_argument(
        "--only", default="", metavar="POLICY,...", help="measure these again and keep the rest of the CSV"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the CSV and the figure instead of the repository's; the document stays"
    )
    given = parser.parse_args()
    out = given.out or (Path(tempfile.mkdtemp(prefix="block-paper-")) if given.quick else None)
    results, figures = (HERE / "results", ROOT / "docs" / "figures") if out is None else (out, out)
    for folder in (results, figures):
        folder.mkdir(parents=True, exist_ok=True)
    count = 1 if given.quick else given.seeds
    only = [name for name in given.only.split(",") if name]
    requests = 200 if given.quick else given.requests
    return Options(list(range(1, count + 1)), requests, given.jobs, given.quick, only, results, figures)


def setting(name: str, o: Options, *, estimated: bool = False, policy: str = "block-paper") -> SimulationConfig:
    """One published setting; ``estimated``: lengths as `ESTIMATED`, else the true ones."""
    config = load_config(HERE / "paper-default.toml")
    group = config.instances[0]
    group = msgspec.structs.replace(group, limits=msgspec.structs.replace(group.limits, **SETTINGS[name]))
    if name == "qwen2-7b":
        group = msgspec.structs.replace(group, profile="a30-qwen2-7b")
    if o.quick:
        group = msgspec.structs.replace(group, count=2)
    lengths = LengthModel(options=dict(ESTIMATED)) if estimated else LengthModel()
    workload = msgspec.structs.replace(config.workload, requests=o.requests)
    return msgspec.structs.replace(
        config, name=name, policy=policy, instances=[group], lengths=lengths, workload=workload
    )


def mapped(o: Options, run: Callable[[A], B], many: Sequence[A]) -> list[B]:
    """``run`` of each, in order, on ``jobs`` processes; ``run`` must be a module's function."""
    if o.jobs == 1:
        return [run(one) for one in many]
    with ProcessPoolExecutor(o.jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(run, many))


def capacity(
    o: Options, config: SimulationConfig, criterion: str, *, start_rps: float = 30.0,
    run: Callable[[SimulationConfig], Summary] = run_one,
) -> Capacity:  # fmt: skip
    """The highest rate at which ``criterion`` holds, over the seeds."""
    return find_capacity(
        config, parse_criterion(criterion), o.seeds, lambda configs: mapped(o, run, configs),
        tolerance=0.5 if o.quick else 0.01, start_rps=start_rps * config.instance_count / 12,
    )  # fmt: skip


def tabled(o: Options, name: str, criterion: str, policy: str, lengths: str) -> tuple[float, str]:
    """The capacity and its interval as the capacity table's CSV has them, else measured now."""
    path = o.out / "paper_capacity.csv"
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.reader(file):
                if row[:4] == [name, criterion, policy, lengths]:
                    return float(row[4]), row[5]
    found = capacity(o, varied(setting(name, o, estimated=lengths == "estimated"), policy=policy), criterion)
    return found.capacity_rps, f"{found.ci_low:.1f} - {found.ci_high:.1f}"


def means(
    o: Options, config: SimulationConfig, rate_rps: float, run: Callable[[SimulationConfig], Summary] = run_one
) -> dict[str, float]:
    """Every figure of the summary at one rate, as the mean over the seeds."""
    rate_rps *= config.instance_count / 12
    summaries = mapped(o, run, [varied(config, rate_rps=rate_rps, seed=seed) for seed in o.seeds])
    names = [field for field in Summary.__struct_fields__ if getattr(summaries[0], field) is not None]
    return {name: float(np.mean([getattr(one, name) or 0.0 for one in summaries])) for name in names}


def against(ours: float, published: float | None) -> tuple[str, str]:
    """The published figure and ours as a difference from it, as cells."""
    return ("", "") if published is None else (f"{published:g}", f"{ours / published - 1:+.1%}")


def kept(o: Options, name: str, keys: int) -> dict[tuple[str, ...], list[str]]:
    """With ``only``: the lines of the existing CSV by their first ``keys`` cells, those of the policies to measure left out."""
    path = o.out / f"{name}.csv"
    if not o.only or not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {tuple(row[:keys]): row for row in list(csv.reader(file))[1:] if not set(row[:keys]) & set(o.only)}


def digits(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


# ---- what a script leaves behind


def publish(
    o: Options,
    name: str,
    head: Sequence[str],
    rows: Sequence[Sequence[object]],
    shown: tuple[Sequence[str], Sequence[Sequence[object]]] | None = None,
    *,
    figure: str = "",
    simulated: bool = True,
) -> None:
    """Print the table, write it as CSV and, unless quick or elsewhere, put it into the document.

    ``shown``: the head and lines of the document's table, where they are not the CSV's; ``figure``: what the script's figure shows;
    ``simulated``: whether seeds and requests mean anything.
    """
    with (o.out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])
    shown_head, shown_rows = shown or (head, rows)
    text = "\n".join(
        [_line(shown_head), _line(["---"] * len(shown_head)), *(_line([str(c) for c in row]) for row in shown_rows)]
    )
    runs = f"seeds {o.seeds[0]}-{o.seeds[-1]}, {o.requests:,} requests a run, " if simulated else ""
    made = f"`{command(name, o)}`; {runs}commit {commit()}."
    print(f"{text}\n\n{made}\nHost: {host()}.", flush=True)
    if o.out == HERE / "results":
        picture = f"\n\n![{figure}](figures/{name}.svg)" if figure else ""
        into_document(name, f"{text}\n\n{made}{picture}")


def into_document(name: str, text: str) -> None:
    """Replace what stands in the document between ``<!-- NAME -->`` and ``<!-- /NAME -->``; no such place: do nothing."""
    old = DOCUMENT.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    DOCUMENT.write_text(pattern.sub(lambda found: f"{found[1]}\n{text}\n\n{found[2]}", old), encoding="utf-8")


def lines(
    path: Path, panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], x_label: str, *, log: Sequence[str] = (),
    marks: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]] | None = None, width: float = 4.2,
) -> None:  # fmt: skip
    """One panel a y label, one line a series; ``marks``: published points of a panel, drawn as crosses."""
    pyplot = drawing()
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(width * len(panels), 3.6), layout="constrained", squeeze=False
    )
    styles: dict[str, dict[str, str]] = {}
    for ax, (y_label, series) in zip(axes[0], panels.items(), strict=True):
        for label, points in series.items():
            style = styles.setdefault(label, line_style(len(styles)))
            ax.plot(*zip(*points, strict=True), marker=".", linewidth=1.2, label=label, **style)
        for label, points in (marks or {}).get(y_label, {}).items():
            color = styles[label]["color"] if label in styles else "black"
            ax.plot(*zip(*points, strict=True), "x", color=color, label=f"{label}, published")
        ax.set(xlabel=x_label, ylabel=y_label, yscale="log" if y_label in log else "linear")
        ax.grid(alpha=0.3)
        if y_label in log:
            plain_decades(ax.yaxis)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    save(figure, path)


def drawing():
    """matplotlib's pyplot, drawing into files only."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "block"  # the same figure gives the same file
    from matplotlib import pyplot

    return pyplot


def save(figure, path: Path) -> None:
    """Write the figure and let it go."""
    figure.savefig(path, dpi=80, metadata={"Date": None} if path.suffix == ".svg" else None)
    drawing().close(figure)


def command(name: str, o: Options) -> str:
    return f"python experiments/{name}.py --seeds {len(o.seeds)}" + (
        f" --requests {o.requests}" if o.requests != 10_000 else ""
    )


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def host() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {sys.platform}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
