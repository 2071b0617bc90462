"""``block calibrate``: a step-time profile from a live engine."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from block.integrations.calibrate import Calibrated
    from block.steptime.profile import StepTimeProfile


@click.command()
@click.argument("url")
@click.option(
    "--source",
    required=True,
    metavar="KIND:NAME",
    help="Whose state: vllm:NAME (BLOCK_VLLM_NAME), emulate:NAME or shm:NAME.",
)
@click.option(
    "-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="Write the profile here."
)
@click.option("--effort", type=click.Choice(["gentle", "normal", "thorough"]), default="normal", show_default=True)
@click.option("--model", help="Model name [the first that the server lists].")
@click.option("--gpu", help="GPU name in the profile [asked of nvidia-smi].")
@click.option("--name", help="The profile's name [the output file's].")
@click.option(
    "--run-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the measurements, as block fit reads them.",
)
@click.option("--seed", default=0, show_default=True, help="The same seed sends the same prompts.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    url: str,
    source: str,
    output: Path,
    effort: Any,
    model: str | None,
    gpu: str | None,
    name: str | None,
    run_dir: Path | None,
    seed: int,
    as_json: bool,
) -> None:
    """Measure how long the steps of the engine at URL take, and save them as a profile for the predictor.

    Sends a sweep of requests (batch sizes, contexts, single and mixed prefills) and reads the step times that the
    engine's plugin publishes, so it runs on the engine's host. The engine should be idle otherwise. Gentle takes a
    fraction of a minute on a GPU, normal a minute or two, thorough some minutes.

    \b
    Examples:
      block calibrate http://127.0.0.1:8000 --source vllm:prod-0 -o my-gpu.json
      block calibrate http://127.0.0.1:8000 --source vllm:prod-0 --effort thorough --run-dir sweep/ -o my-gpu.json
      block predictor --source vllm:prod-0 --profile ./my-gpu.json
    """
    import msgspec

    from block.predictor.source import open_source
    from block.replay.client import base_url
    from block.steptime.profile import check_writable, save_profile

    check_writable(output)
    state = open_source(source, 0.002)
    result = _run(
        base_url(url),
        model,
        state,
        effort=effort,
        name=name or output.stem,
        gpu=gpu or _gpu_name(),
        keep=run_dir,
        seed=seed,
    )
    save_profile(result.profile, output)
    if as_json:
        click.echo(msgspec.json.encode(_summary(result, output)).decode())
    else:
        _print(result, output)


def _run(url: str, model: str | None, state: Any, **options: Any) -> "Calibrated":
    import asyncio

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from block.integrations.calibrate import calibrate

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("waiting for the engine's state", total=None)
        done = -1

        def on_stage(stage: Any) -> None:
            nonlocal done
            done += 1
            progress.update(task, description=stage.title, completed=done)

        async def main() -> "Calibrated":
            return await calibrate(
                url, model or await _served_model(url), state, on_plan=lambda stages: progress.update(task, total=len(stages)),
                on_stage=on_stage, **options,
            )  # fmt: skip

        result = asyncio.run(main())
        progress.update(task, description="fitted", completed=done + 1)
        return result


async def _served_model(url: str) -> str:
    import aiohttp

    from block.replay.client import served_model

    async with aiohttp.ClientSession() as session:
        return await served_model(session, url)


def _gpu_name() -> str:
    """What nvidia-smi calls the first GPU here, or ``unknown``."""
    import shutil
    import subprocess

    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    asked = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        lines = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return lines[0].strip() if lines else "unknown"


def _summary(result: "Calibrated", output: Path) -> dict[str, Any]:
    return {
        "profile": str(output),
        "requests": result.requests,
        **result.covered,
        "lost": result.lost,
        "errors": result.profile.errors,
    }


def _print(result: "Calibrated", output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{result.profile.name}: {result.covered['steps']} steps of {result.requests} requests")
    for title in ("regime", "samples", "bias", "error P50", "error P90"):
        table.add_column(title, justify="left" if title == "regime" else "right")
    for error in result.profile.errors:
        fractions = (error.bias_fraction, error.error_p50_fraction, error.error_p90_fraction)
        table.add_row(error.regime, str(error.samples), *(f"{100 * f:.1f} %" for f in fractions))
    console.print(table)
    console.print(_speeds(result.profile), highlight=False)
    if result.lost:
        console.print(
            f"{result.lost} times steps went by unseen (this host is busy); they are missing, not wrong.",
            highlight=False,
        )
    console.print(f"Saved as {output}: use it with  block predictor --profile {output}", highlight=False)


def _speeds(profile: "StepTimeProfile") -> str:
    curve = profile.curve()
    one_ms, batch_ms = 1e3 * curve.gpu_s(1, 512, 0, 0.0, 0), 1e3 * curve.gpu_s(32, 32 * 512, 0, 0.0, 0)
    prefill_ms = 1e3 * curve.gpu_s(0, 0, 1024, 1024 * 512.0, 1)
    return (
        f"A decode step takes {one_ms:.2f} ms alone and {batch_ms:.2f} ms for 32 requests; "
        f"a prompt of 1024 tokens {prefill_ms:.1f} ms."
    )
