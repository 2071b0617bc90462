"""``block validate``: hold the engine model against a measured run or a recorded scheduler trace."""

import sys
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("run_dir", required=False, type=click.Path(path_type=Path))
@click.option("--stage", help="The stage of the run to replay.")
@click.option(
    "--profile",
    "profile_name",
    help="A shipped profile or a JSON file [default: the shipped one for the run's GPU and model].",
)
@click.option(
    "--scheduler",
    "trace",
    type=click.Path(path_type=Path),
    help="Compare the scheduler with a trace, decision by decision.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    run_dir: Path | None, stage: str | None, profile_name: str | None, trace: Path | None, as_json: bool
) -> None:
    """Replay RUN_DIR's stage through the engine model and compare every request, or replay a scheduler trace.

    The model sees the stage's arrivals and true lengths and nothing else of the run. With --scheduler, exit code 1 says that
    a decision differed.

    \b
    Examples:
      block validate runs/llama3.1-8b --stage q50
      block validate runs/llama3.1-8b --stage q50 --profile my.json --json
      block validate --scheduler trace.jsonl.gz --json
    """
    if trace is not None and (run_dir is not None or stage is not None):
        raise click.UsageError("Give either RUN_DIR and --stage, or --scheduler TRACE.")
    if trace is not None:
        _validate_trace(trace, as_json)
    elif run_dir is None or stage is None:
        raise click.UsageError("Give RUN_DIR and --stage, or --scheduler TRACE.")
    else:
        _validate_run(run_dir, stage, profile_name, as_json)


def _validate_trace(trace: Path, as_json: bool) -> None:
    import msgspec

    from block.engine.trace import validate_trace

    verdict = validate_trace(trace)
    if as_json:
        click.echo(msgspec.json.encode(verdict).decode())
    else:
        click.echo(
            f"{verdict.calls} schedule() calls, {verdict.requests} requests, {verdict.preemptions} preemptions: "
            + ("every decision is the same." if not verdict.mismatches else f"{verdict.mismatches} differ.")
        )
        if verdict.first_mismatch:
            click.echo(f"The first: {verdict.first_mismatch}")
    sys.exit(1 if verdict.mismatches else 0)


def _validate_run(run_dir: Path, stage: str, profile_name: str | None, as_json: bool) -> None:
    import msgspec
    from rich.console import Console
    from rich.progress import Progress

    from block.engine.validate import compare, measured_preemptions, read_stage, replay
    from block.steptime.profile import load_profile, profile_for
    from block.steptime.steplog import read_run

    run = read_run(run_dir)
    requests = read_stage(run_dir, stage, run.limits.block_size)
    profile = load_profile(profile_name) if profile_name else profile_for(run.gpu, run.model, run.tensor_parallel)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"replaying {stage}", total=len(requests))
        made = replay(requests, run.limits, profile, lambda finished: bar.update(task, completed=finished))
    fidelity = compare(stage, profile.name, requests, made, measured_preemptions(run_dir, stage))
    if as_json:
        click.echo(msgspec.json.encode(fidelity).decode())
    else:
        _print(msgspec.structs.asdict(fidelity))


def _print(fidelity: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{fidelity.pop('stage')}, {fidelity.pop('requests')} requests, profile {fidelity.pop('profile')}"
    )
    table.add_column("")
    table.add_column("modelled against measured", justify="right")
    for key, value in fidelity.items():
        if value is None:
            continue
        if "error" in key:
            shown = f"{value:.2%}"
        elif "ratio" in key:
            shown = f"{value:.3f}"
        else:
            shown = f"{value:,}"
        table.add_row(key.replace("_", " "), shown)
    Console().print(table)
