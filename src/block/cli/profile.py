"""``block profile``: show a step-time profile, or import one from what others measured."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from block.steptime.profile import StepTimeProfile


@click.group()
def command() -> None:
    """Show a step-time profile, or make one from published kernel measurements.

    \b
    Examples:
      block profile show h200-llama3.1-8b
      block profile import aiconfigurator config.json --gpu l40s -o l40s.json
    """


@command.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print the profile itself.")
def show(name: str, as_json: bool) -> None:
    """Show NAME: a shipped profile or a JSON file.

    \b
    Examples:
      block profile show h200-qwen2-7b
      block profile show ./my.json --json
    """
    import msgspec

    from block.steptime.profile import load_profile

    profile = load_profile(name)
    if as_json:
        click.echo(msgspec.json.encode(profile).decode())
    else:
        _print(profile)


def _print(profile: "StepTimeProfile") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"[bold]{profile.name}[/]: {profile.model} on {profile.gpu}, tensor parallelism {profile.tensor_parallel}"
    )
    console.print(f"{profile.source}{', ' + profile.licence if profile.licence else ''}")
    curve = profile.curve()
    table = Table(title="milliseconds of a step, contexts of 500 tokens")
    for title in ("decoding requests", "decode only", "+ 128 prefill tokens", "+ 512", "+ 2048"):
        table.add_column(title, justify="right")
    for n in (1, 8, 32, 64, 128, 256):
        times = [curve.gpu_s(n, 500.0 * n, p, p * p / 2, int(p > 0)) for p in (0, 128, 512, 2048)]
        table.add_row(str(n), *(f"{1e3 * t:.2f}" for t in times))
    console.print(table)
    console.print(
        f"CPU: {1e3 * profile.launch_decode_s:.1f} ms to launch a decode step, "
        f"{1e3 * profile.launch_graph_s:.1f} ms one with prefill from CUDA graphs, "
        f"{1e3 * profile.launch_eager_s:.1f} ms a larger one; {1e6 * profile.launch_request_s:.0f} us a request.\n"
        f"Caller: {1e3 * profile.input_s:.2f} ms in, {1e3 * profile.output_s:.2f} ms out, "
        f"{1e6 * profile.output_request_s:.0f} us more a request."
    )
    for e in profile.errors:
        console.print(
            f"{e.regime}: {e.samples} windows, sum {e.bias_fraction:+.1%}, median error {e.error_p50_fraction:.1%}"
        )


@command.group("import")
def import_() -> None:
    """Make a profile from kernel tables that others measured, for a GPU that you cannot measure.

    Such tables know kernels but not your host: launch times are assumed as measured on our H200 host. Expect errors of 5-10 %
    where a measured profile has 1-2 %; block calibrate measures your own.
    """


def _options(function: Any) -> Any:
    """The options that every importer takes."""
    for option in (
        click.option(
            "-o",
            "--output",
            required=True,
            type=click.Path(dir_okay=False, path_type=Path),
            help="Where the profile goes.",
        ),
        click.option("--name", help="The profile's name [default: the output file's]."),
        click.option("--model", help="The model's name [default: the directory's or file's]."),
        click.option(
            "--tp", "tensor_parallel", default=1, show_default=True, type=click.IntRange(1), help="Tensor parallelism."
        ),
    ):
        function = option(function)
    return function


@import_.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--gpu", required=True, help="The GPU's name, for the profile.")
@click.option("--layers", required=True, type=click.IntRange(1), help="The model's layers (the tables are of one).")
@click.option(
    "--attention", type=click.Path(path_type=Path), help="A file of attention points instead of attention.csv."
)
@_options
def vidur(
    directory: Path,
    gpu: str,
    layers: int,
    attention: Path | None,
    output: Path,
    name: str | None,
    model: str | None,
    tensor_parallel: int,
) -> None:
    """Import Vidur's mlp.csv and attention.csv (plain or .gz) in DIRECTORY.

    \b
    Examples:
      block profile import vidur compute/a30/Qwen/Qwen-2-7B --gpu "NVIDIA A30" --layers 28 -o a30.json
    """
    from block.steptime.importers.vidur import import_vidur

    profile = import_vidur(
        directory, layers=layers, name=name or output.stem, gpu=gpu, model=model or directory.resolve().name,
        tensor_parallel=tensor_parallel, attention=attention,
    )  # fmt: skip
    _write(profile, output)


@import_.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--gpu", required=True, help="The GPU's name, for the profile.")
@click.option("--layers", required=True, type=click.IntRange(1), help="The model's layers (the tables are of one).")
@_options
def llmservingsim(
    directory: Path, gpu: str, layers: int, output: Path, name: str | None, model: str | None, tensor_parallel: int
) -> None:
    """Import LLMServingSim's dense.csv, per_sequence.csv, attention.csv and skew.csv (if there) in DIRECTORY (a tpN one).

    \b
    Examples:
      block profile import llmservingsim RTX4090/meta-llama/Llama-3.1-8B/bf16/tp1 --gpu "RTX 4090" --layers 32 -o 4090.json
    """
    from block.steptime.importers.llmservingsim import import_llmservingsim

    profile = import_llmservingsim(
        directory, layers=layers, name=name or output.stem, gpu=gpu, model=model or directory.resolve().name,
        tensor_parallel=tensor_parallel,
    )  # fmt: skip
    _write(profile, output)


@import_.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--gpu",
    "system",
    required=True,
    help="A GPU of aiconfigurator-core: h200_sxm, h100_sxm, a100_sxm, l40s, b200_sxm ...",
)
@_options
def aiconfigurator(
    config: Path, system: str, output: Path, name: str | None, model: str | None, tensor_parallel: int
) -> None:
    """Import the vLLM kernel tables of aiconfigurator-core (an optional extra) for a model's CONFIG (config.json), in 16 bits.

    \b
    Examples:
      block profile import aiconfigurator llama/config.json --gpu h100_sxm -o h100.json
      block profile import aiconfigurator llama-70b/config.json --gpu a100_sxm --tp 4 -o a100x4.json
    """
    from block.steptime.importers.aiconfigurator import import_aiconfigurator
    from block.steptime.importers.files import read_config

    profile = import_aiconfigurator(
        read_config(config), system=system, name=name or output.stem, model=model or config.resolve().parent.name,
        tensor_parallel=tensor_parallel,
    )  # fmt: skip
    _write(profile, output)


def _write(profile: "StepTimeProfile", output: Path) -> None:
    from block.steptime.profile import save_profile

    save_profile(profile, output)
    click.echo(f"Wrote {output}: {profile.model} on {profile.gpu}.", err=True)
