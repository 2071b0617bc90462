"""Misses against GPU hours from autoscale-days.csv: a figure, a table of means over the seeds, and for every seed each
baseline's misses at the GPU hours of `replay`.

usage: autoscale_figure.py [--results FOLDER]
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import numpy as np

from autoscale_report import HERE

Curve = list[tuple[float, float]]
FLOOR_PERCENT, DRAWN_COLD_S, COLUMNS = 0.001, 120.0, 5
COLORS = {
    "replay": "C3", "optimum": "black", "static": "C7", "hpa-rps": "C0", "hpa-kv": "C2", "hpa-queue": "C4", "relief": "C1",
    "preempt": "C5",
}  # fmt: skip


def curves(rows: list[dict[str, str]]) -> dict[tuple[str, float, str], dict[str, Curve]]:
    """(workload, cold start, seed) -> controller -> (GPU hours a day, missed percent), ascending hours. Static pools count at
    every cold start."""
    found: dict[tuple[str, float, str], dict[str, Curve]] = defaultdict(lambda: defaultdict(list))
    settings = {(row["workload"], float(row["cold_start_s"]), row["seed"]) for row in rows}
    for row in rows:
        family = row["controller"].partition(":")[0]
        point = float(row["gpu_hours_day"]), max(float(row["missed_percent"]), FLOOR_PERCENT)
        for workload, cold_s, seed in settings:
            same_cold = float(row["cold_start_s"]) == cold_s or family == "static"
            if (row["workload"], row["seed"]) == (workload, seed) and same_cold:
                found[workload, cold_s, seed][family].append(point)
    return {key: {family: sorted(points) for family, points in of.items()} for key, of in found.items()}


def means(rows: list[dict[str, str]]) -> None:
    """A line for every workload, cold start and controller: seeds, misses (mean, least, most), GPU hours, actions."""
    groups: dict[tuple[str, float, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        groups[row["workload"], float(row["cold_start_s"]), row["controller"]].append(row)
    print(
        "| workload | cold start | controller | seeds | misses | GPU h | TTFT P99 | actions | over / under |\n|"
        + "---|" * 9
    )
    for (workload, cold_s, controller), of in sorted(groups.items()):
        missed = [float(row["missed_percent"]) for row in of]

        def mean(field: str, of: list[dict[str, str]] = of) -> str:
            known = [float(row[field]) for row in of if row[field]]
            return f"{np.mean(known):.4g}" if known else ""

        print(
            f"| {workload} | {cold_s:g} s | `{controller}` | {','.join(row['seed'] for row in of)} "
            f"| {np.mean(missed):.3g} ({min(missed):.2g}-{max(missed):.2g}) % | {mean('gpu_hours_day')} | {mean('ttft_s_p99')} s "
            f"| {mean('actions_day')} | {mean('over_percent')} / {mean('under_percent')} % |"
        )


def at_hours(points: Curve, hours: float) -> float | None:
    """Missed percent at so many GPU hours, between the points on a logarithmic scale; ``None`` outside of them."""
    x, y = np.array([p[0] for p in points]), np.log([p[1] for p in points])
    if not x[0] <= hours <= x[-1]:
        return None
    return float(np.exp(np.interp(hours, x, y)))


def at_missed(points: Curve, missed: float) -> float | None:
    """GPU hours at which so many percent are missed; ``None`` outside of the points."""
    y, x = zip(*sorted((np.log(p[1]), p[0]) for p in points), strict=True)
    return float(np.interp(np.log(missed), y, x)) if y[0] <= np.log(missed) <= y[-1] else None


def main() -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    folder = parser.parse_args().results
    with (folder / "autoscale-days.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = curves(rows)
    means(rows)
    for key in sorted(found):
        report(*key, found[key])
    panels = [key for key in sorted(found) if key[1] == DRAWN_COLD_S and "replay" in found[key]]
    rows_of = -(-len(panels) // COLUMNS)
    figure, axes = plt.subplots(rows_of, COLUMNS, figsize=(3.6 * COLUMNS, 3.2 * rows_of), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for (workload, cold_s, seed), axis in zip(panels, axes.flat, strict=False):
        for family, points in sorted(found[workload, cold_s, seed].items()):
            style = {"replay": "o-", "optimum": "*--", "static": "s:"}.get(family, ".-")
            axis.plot(
                *zip(*points, strict=True),
                style,
                label=family,
                color=COLORS[family],
                linewidth=2.2 if family == "replay" else 1.0,
            )
        axis.set(
            yscale="log",
            ylim=(0.005, 20),
            xlim=(60, 400),
            xlabel="GPU hours a day",
            ylabel="requests that miss the SLO [%]",
        )
        axis.set_title(f"{workload}, cold start {cold_s:g} s, seed {seed}")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "autoscale-days.png", dpi=80)


def report(workload: str, cold_s: float, seed: str, of: dict[str, Curve]) -> None:
    """For each setting of `replay`: the misses of everything else at its GPU hours, its distance from the optimum."""
    for hours, missed in of.get("replay", []):
        others = {
            family: at_hours(points, hours) for family, points in of.items() if family not in ("replay", "optimum")
        }
        beside = ", ".join(f"{family} {value:.3g} %" for family, value in sorted(others.items()) if value is not None)
        best = at_missed(of["optimum"], missed) if "optimum" in of else None
        above = "" if best is None else f"; {hours / best - 1:+.0%} above the optimum's {best:.1f} h at as many misses"
        print(
            f"{workload}, {cold_s:g} s, seed {seed}: replay {hours:.1f} h/day misses {missed:.3g} %; "
            f"at as many hours {beside or '-'}{above}"
        )


if __name__ == "__main__":
    main()
