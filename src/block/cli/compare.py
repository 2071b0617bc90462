"""``block compare``: policies side by side over a range of rates, by simulation."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.table import Table

    from block.simulate.compare import Cell


@click.command()
@click.option("--config", required=True, type=click.Path(path_type=Path), help="The cluster and workload (TOML).")
@click.option("--policy", "policies", multiple=True, required=True, help="A policy, with options if need be; repeat.")
@click.option("--rates", required=True, help="Requests per second: 24,28,30,32 or FROM:TO:STEP.")
@click.option(
    "--seeds", default=1, show_default=True, type=click.IntRange(1), help="How many, from the configured one on."
)
@click.option("--requests", type=int, help="Of one run, instead of the configured number.")
@click.option("--jobs", type=click.IntRange(1), help="Processes [one a core].")
@click.option(
    "--executor",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where they run: here, or on the Ray cluster of RAY_ADDRESS (else one started here).",
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the table as .csv.")
@click.option("--chart", type=click.Path(path_type=Path), help="Draw the curves: .png or .svg.")
@click.option("--json", "as_json", is_flag=True, help="Print the cells as JSON.")
def command(
    config: Path, policies: tuple[str, ...], rates: str, seeds: int, requests: int | None, jobs: int | None, executor: str,
    out: Path | None, chart: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Run every policy at every rate, with the same requests, and show the means over the seeds.

    \b
    Examples:
      block compare --config experiments/paper-default.toml --policy llumnix-minus --policy block --rates 28:36:2
      block compare --config experiments/paper-default.toml --policy random --policy block-k:k=2 --policy block-k:k=4 \\
        --rates 30,32 --seeds 5 --out compare.csv --chart compare.svg
    """
    import json

    import msgspec
    from rich.progress import MofNCompleteColumn, TextColumn, TimeElapsedColumn

    from block.cli.terminal import progress as progress_bar
    from block.errors import ConfigError
    from block.metrics.charts import check_chart_path
    from block.metrics.tables import stdout
    from block.policy import policy_from
    from block.simulate import load_config
    from block.simulate.compare import compare, curves, write_cells
    from block.simulate.sweep import runner, varied

    base, rates_rps = varied(load_config(config), requests=requests), _rates(rates)
    for policy in policies:
        policy_from(policy)
    if chart is not None:
        check_chart_path(chart)
    if out is not None and (out.suffix != ".csv" or not out.parent.is_dir()):
        raise ConfigError(f"The table is written as .csv into a folder that exists, not {out}.")
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with progress_bar(*columns) as progress:
        bar = progress.add_task("simulated", total=len(policies) * len(rates_rps) * seeds)
        with runner(jobs, lambda _: progress.advance(bar), executor) as run_all:
            cells = compare(base, policies, rates_rps, range(base.seed, base.seed + seeds), run_all)
    if out is not None:
        write_cells(out, cells)
    if chart is not None:
        curves(chart, cells, f"{base.name or config.stem}, {_seeds(seeds)}")
    if as_json:
        click.echo(json.dumps([msgspec.to_builtins(cell) for cell in cells]))
    else:
        stdout().print(_table(cells, base.name or config.name, seeds))


RATES_MAX = 1000


def _rates(text: str) -> list[float]:
    from block.errors import ConfigError

    try:
        if ":" in text:
            low, high, step = (float(part) for part in text.split(":"))
            if not step > 0 or not 0 <= high - low <= RATES_MAX * step:
                raise ValueError(text)
            return [low + i * step for i in range(int((high - low) / step + 1e-9) + 1)]
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"Write rates as 24,28,30 or FROM:TO:STEP, not {text!r}.") from None
    if min(found) <= 0:
        raise ConfigError("Rates must be above 0.")
    return found


def _seeds(count: int) -> str:
    return f"{count} seed{'s' * (count > 1)}"


def _table(cells: "list[Cell]", title: str, seeds: int) -> "Table":
    from rich.table import Table

    from block.metrics.tables import seconds

    latencies = (
        ("TTFT mean", "ttft_s_mean"), ("P50", "ttft_s_p50"), ("P99", "ttft_s_p99"), ("E2E mean", "e2e_s_mean"),
        ("P99", "e2e_s_p99"),
    )  # fmt: skip
    targets = any(cell.figures["slo_attainment_fraction"] is not None for cell in cells)
    table = Table(
        title=f"{title}, {_seeds(seeds)}",
        caption="latencies in seconds; means over the seeds; bold: the best at a rate",
    )
    table.add_column("requests/s", justify="right")
    table.add_column("policy", no_wrap=True)
    for head in (*(head for head, _ in latencies), "preempted", *(["SLO met"] if targets else [])):
        table.add_column(head, justify="right")
    for rate_rps in dict.fromkeys(cell.rate_rps for cell in cells):
        table.add_section()
        peers = [cell for cell in cells if cell.rate_rps == rate_rps]
        best = {
            name: min((v for cell in peers if (v := cell.figures[name]) is not None), default=None)
            for _, name in latencies
        }
        for cell in peers:
            preempted, met = cell.figures["preemptions"], cell.figures["slo_attainment_fraction"]
            table.add_row(
                f"{rate_rps:g}", cell.policy,
                *(seconds(cell.figures[name], best[name] if len(peers) > 1 else None) for _, name in latencies),
                "-" if preempted is None else f"{preempted:.0f}",
                *(["-" if met is None else f"{met:.1%}"] if targets else []),
            )  # fmt: skip
    return table
