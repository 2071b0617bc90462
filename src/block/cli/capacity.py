"""``block capacity``: the highest rate at which a criterion holds, by simulation."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from block.metrics.summary import Summary

ANSWERS_MIN: Final = 3
"""A run shorter than so many mean answers says nothing of a load that lasts."""


@click.command()
@click.option("--config", required=True, type=click.Path(path_type=Path), help="The cluster and workload (TOML).")
@click.option("--policy", "policies", multiple=True, help="Instead of the configured one; repeat to compare.")
@click.option("--criterion", default="ttft_p99<=3", show_default=True, help="Also e2e_mean<=20, attainment>=99% ...")
@click.option(
    "--seeds", default=5, show_default=True, type=click.IntRange(1), help="How many, from the configured one on."
)
@click.option("--requests", type=int, help="Of one run, instead of the configured number.")
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
    requests: int | None,
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
    from rich.progress import TextColumn, TimeElapsedColumn
    from rich.table import Table

    from block.cli.terminal import progress as progress_bar
    from block.metrics.tables import stdout
    from block.policy import policy_from
    from block.simulate import load_config
    from block.simulate.bound import pooled as pooled_cluster
    from block.simulate.capacity import find_capacity, parse_criterion
    from block.simulate.sweep import runner, varied

    wanted, base = parse_criterion(criterion), varied(load_config(config), requests=requests)
    for policy in policies:
        policy_from(policy)
    perfect = pooled_cluster(base) if pooled else None
    numbers = list(range(base.seed, base.seed + seeds))
    columns = (TextColumn("{task.description}: {task.completed} runs"), TimeElapsedColumn())
    found = []
    answers_s = [0.0]

    def done(summary: "Summary") -> None:
        progress.advance(bar)
        answers_s.append(summary.e2e_s_mean or 0.0)

    with progress_bar(*columns) as progress:
        bar = progress.add_task("searching", total=None)
        with runner(jobs, done, executor) as run_all:
            for policy in policies or (base.policy,):
                progress.update(bar, description=policy)
                one = varied(base, policy=policy)
                found.append(find_capacity(one, wanted, numbers, run_all, tolerance=tolerance))
            if perfect is not None:
                progress.update(bar, description="(pooled)")
                reference = find_capacity(perfect, wanted, numbers, run_all, tolerance=tolerance)
                found.append(msgspec.structs.replace(reference, policy="(pooled)"))
    if (count := base.workload.requests) is not None:
        come_s = count / min(one.capacity_rps for one in found)
        if come_s < ANSWERS_MIN * max(answers_s):
            click.echo(
                f"block: {count:,} requests come within {come_s:.0f} s at that rate, while an answer takes up to "
                f"{max(answers_s):.0f} s: the cluster never filled. Give more with --requests.",
                err=True,
            )
    if as_json:
        built = [msgspec.to_builtins(one) for one in found]
        click.echo(json.dumps(built[0] if len(built) == 1 else built))
        return
    table = Table(
        title=f"{base.name or config.name}: capacity at {wanted.text}",
        caption=f"{seeds} seeds, 95 % interval" if seeds > 1 else "1 seed",
    )
    for head in ("policy", "requests/s", "interval", "against the first"):
        table.add_column(head, justify="left" if head == "policy" else "right")
    for capacity in found:
        ratio = capacity.capacity_rps / found[0].capacity_rps - 1
        interval = f"{capacity.ci_low:.2f} - {capacity.ci_high:.2f}" if seeds > 1 else "-"
        table.add_row(capacity.policy, f"{capacity.capacity_rps:.2f}", interval, f"{ratio:+.1%}")
    stdout().print(table)
