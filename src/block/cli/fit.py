"""``block fit``: a step-time profile from measured step logs."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from block.steptime.profile import StepTimeProfile


@click.command()
@click.argument("steps", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where the profile goes (JSON).",
)
@click.option("--name", help="The profile's name [default: the output file's].")
@click.option("--json", "as_json", is_flag=True, help="Print the errors as JSON.")
def command(steps: tuple[Path, ...], output: Path, name: str | None, as_json: bool) -> None:
    """Fit a step-time profile to STEPS: run directories, or STAGE.steps.csv.gz files beside their engine.json.

    Windows of steps that end in a decode-only step are what the printed errors are of: single durations around a prefill
    are shifted by the CPU's launches and say little.

    \b
    Examples:
      block fit runs/llama3.1-8b -o my.json
      block fit runs/a/sweep.steps.csv.gz runs/a/q25.steps.csv.gz -o my.json --json
      block validate runs/a --stage q50 --profile my.json
    """
    import msgspec
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from block.steptime.fit import Subject, fit_profile
    from block.steptime.profile import check_writable, save_profile
    from block.steptime.roofline import arithmetic
    from block.steptime.sources import read_measured

    check_writable(output)
    console = Console(stderr=True)
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
    ) as bar:
        task = bar.add_task("reading")
        measured = read_measured(steps)
        subject = Subject(
            name=name or output.stem,
            gpu=measured.gpu,
            model=measured.model,
            tensor_parallel=measured.tensor_parallel,
            source="measured: " + ", ".join(measured.stages),
            prior=arithmetic(measured.model_config, measured.gpu, measured.tensor_parallel),
        )
        profile = fit_profile(measured.logs, subject, lambda stage: bar.update(task, description=stage), measured.calls)
    save_profile(profile, output)
    if as_json:
        click.echo(msgspec.json.encode({"profile": str(output), "errors": profile.errors}).decode())
    else:
        _print_errors(profile)
        console.print(f"Wrote {output}.")


def _print_errors(profile: "StepTimeProfile") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{profile.name}: modelled against measured, in the steps fitted")
    for column in ("windows of", "windows", "sum", "median", "P90"):
        table.add_column(column, justify="left" if column == "windows of" else "right")
    for e in profile.errors:
        table.add_row(
            e.regime,
            str(e.samples),
            f"{e.bias_fraction:+.1%}",
            f"{e.error_p50_fraction:.1%}",
            f"{e.error_p90_fraction:.1%}",
        )
    Console().print(table)
