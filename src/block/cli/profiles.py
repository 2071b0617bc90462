"""``block profiles``: the step-time profiles that are shipped."""

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(as_json: bool) -> None:
    """List the shipped step-time profiles: GPU, model, where the numbers come from, how far off they were.

    \b
    Examples:
      block profiles
      block profiles --json
      block profile show h200-llama3.1-8b
    """
    import msgspec

    from block.steptime.profile import load_profile, profile_names

    profiles = [load_profile(name) for name in profile_names()]
    if as_json:
        fields = ("name", "gpu", "model", "tensor_parallel", "source", "licence", "errors")
        click.echo(msgspec.json.encode([{f: getattr(p, f) for f in fields} for p in profiles]).decode())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        caption="error: the worst median among the regimes it was fitted to; more with block profile show NAME"
    )
    for column in ("profile", "GPU", "model"):
        table.add_column(column, no_wrap=True)
    for column in ("TP", "source", "error"):
        table.add_column(column)
    for p in profiles:
        worst = max((e.error_p50_fraction for e in p.errors), default=None)
        error = "unknown" if worst is None else f"{worst:.1%}"
        table.add_row(p.name, p.gpu, p.model, str(p.tensor_parallel), p.source.partition(" (")[0], error)
    Console().print(table)
