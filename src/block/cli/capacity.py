"""``block capacity``: the highest rate at which a criterion holds, by simulation."""

from pathlib import Path

import click


@click.command()
@click.option("--config", required=True, type=click.Path(path_type=Path), help="The cluster and workload (TOML).")
@click.option("--policy", "policies", multiple=True, help="Instead of the configured one; repeat to compare.")
@click.option("--criterion", default="ttft_p99<=3", show_default=True, help="Also e2e_mean<=20, attainment>=99% ...")
@click.option(
    "--seeds", default=5, show_default=True, type=click.IntRange(1), help="How many, from the configured one on."
)
@click.option("--tolerance", default=0.01, show_default=True, help="Width of the last bracket, as a fraction.")
@click.option("--pooled", is_flag=True, help="Also the same hardware as one engine: what perfect balance would give.")
@click.option("--jobs", type=click.IntRange(1), help="Processes [one a core].")
@click.option(
    "--executor",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where they run: here, or on the Ray cluster of RAY_ADDRESS (else one started here).",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON (a list if several policies).")
def command(
    config: Path,
    policies: tuple[str, ...],
    criterion: str,
    seeds: int,
    tolerance: float,
    pooled: bool,
    jobs: int | None,
    executor: str,
    as_json: bool,
) -> None:
    """Search for the highest offered rate at which the criterion still holds, over several seeds.

    The interval is a 95 % bootstrap over the seeds; all policies see the same requests.

    \b
    Examples:
      block capacity --config experiments/paper-default.toml --policy block --json
      block capacity --config experiments/paper-default.toml --policy llumnix-minus --policy block --criterion "ttft_p99<=10"
      block capacity --config experiments/paper-default.toml --policy block --pooled
    """
    import json

    import msgspec
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from block.policy import policy_from
    from block.simulate import load_config
    from block.simulate.bound import pooled as pooled_cluster
    from block.simulate.capacity import find_capacity, parse_criterion
    from block.simulate.sweep import runner, varied

    wanted, base = parse_criterion(criterion), load_config(config)
    for policy in policies:
        policy_from(policy)
    numbers = list(range(base.seed, base.seed + seeds))
    columns = (TextColumn("{task.description}: {task.completed} runs"), TimeElapsedColumn())
    found = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("searching", total=None)
        with runner(jobs, lambda _: progress.advance(bar), executor) as run_all:
            for policy in policies or (base.policy,):
                progress.update(bar, description=policy)
                one = varied(base, policy=policy)
                found.append(find_capacity(one, wanted, numbers, run_all, tolerance=tolerance))
            if pooled:
                progress.update(bar, description="pooled")
                perfect = find_capacity(pooled_cluster(base), wanted, numbers, run_all, tolerance=tolerance)
                found.append(msgspec.structs.replace(perfect, policy="(pooled)"))
    if as_json:
        built = [msgspec.to_builtins(one) for one in found]
        click.echo(json.dumps(built[0] if len(built) == 1 else built))
        return
    table = Table(
        title=f"{base.name or config.name}: capacity at {wanted.text}", caption=f"{seeds} seeds, 95 % interval"
    )
    for head in ("policy", "requests/s", "interval", "against the first"):
        table.add_column(head, justify="left" if head == "policy" else "right")
    for capacity in found:
        ratio = capacity.capacity_rps / found[0].capacity_rps - 1
        interval = f"{capacity.ci_low:.2f} - {capacity.ci_high:.2f}"
        table.add_row(capacity.policy, f"{capacity.capacity_rps:.2f}", interval, f"{ratio:+.1%}")
    Console().print(table)
