"""``block simulate``: a whole cluster in virtual time."""

from pathlib import Path

import click


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--policy", "policies", multiple=True, help="Instead of the configured one; repeat to compare.")
@click.option("--rate", "rate_rps", type=float, help="Requests per second, instead of the configured rate.")
@click.option("--requests", type=int, help="How many, instead of the configured number.")
@click.option("--seed", type=int, help="Instead of the configured seed.")
@click.option("--out", type=click.Path(path_type=Path), help="Write one row a request: .csv or .parquet.")
@click.option("--chart", type=click.Path(path_type=Path), help="Draw the latencies: .png or .svg.")
@click.option("--json", "as_json", is_flag=True, help="Print the summaries as JSON.")
def command(
    config: Path, policies: tuple[str, ...], rate_rps: float | None, requests: int | None, seed: int | None,
    out: Path | None, chart: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Simulate the cluster that CONFIG (TOML) describes and print what its requests met.

    \b
    Examples:
      block simulate experiments/paper-default.toml
      block simulate experiments/paper-default.toml --policy round-robin --policy llumnix-minus --policy block --rate 32
      block simulate experiments/paper-default.toml --policy block-k:k=4 --out rows.csv --json
    """
    import json

    from block.cli.terminal import progress as progress_bar
    from block.metrics import row_writer, summarize
    from block.metrics.charts import check_chart_path, latency_chart
    from block.metrics.row import check_rows_path
    from block.metrics.tables import stdout, summary_json, summary_table
    from block.policy import policy_from
    from block.simulate import load_config, simulate
    from block.simulate.sweep import varied

    if chart is not None:
        check_chart_path(chart)
    if out is not None:
        check_rows_path(out)
    base = varied(load_config(config), rate_rps=rate_rps, seed=seed, requests=requests)
    for policy in policies:
        policy_from(policy)
    rows_of = {}
    with progress_bar() as progress:
        for policy in policies or (base.policy,):
            bar = progress.add_task(policy, total=None)

            def show(done: int, total: int, bar: object = bar) -> None:
                progress.update(bar, completed=done, total=total)  # type: ignore[arg-type]

            rows_of[policy] = simulate(varied(base, policy=policy), on_progress=show)
    if out is not None:
        with row_writer(out) as writer:
            for rows in rows_of.values():
                for row in rows:
                    writer.write(row)
    if chart is not None:
        latency_chart(rows_of, chart, base.name)
    summaries = {p: summarize(rows, base.slo, warmup_fraction=base.warmup_fraction) for p, rows in rows_of.items()}
    if as_json:
        shown = {"name": base.name, "seed": base.seed, "rate_rps": base.workload.rate_rps}
        click.echo(json.dumps({**shown, "policies": {p: summary_json(s) for p, s in summaries.items()}}))
    else:
        rate = "" if base.workload.rate_rps is None else f", {base.workload.rate_rps:g} requests/s"
        stdout().print(summary_table(summaries, f"{base.name or config.name}{rate}, seed {base.seed}"))
