"""The ``block`` program: one subcommand per file of this package, imported only when it runs."""

import importlib
import sys

import click

from block import __version__
from block.errors import UserError

COMMANDS = {  # in the order of the help text; each is ``command``, a click command or group, in block.cli.NAME
    "demo": "The whole system on this machine, without a GPU.",
    "serve": "The gateway: OpenAI's API in front of several engines.",
    "predictor": "The sidecar of one engine: streams its state, predicts.",
    "autoscale": "Keep as many instances as the load needs.",
    "emulate": "An OpenAI server that behaves like vLLM, without a GPU.",
    "replay": "Open-loop load against any OpenAI endpoint.",
    "policies": "List the routing policies.",
    "profiles": "List the shipped step-time profiles.",
    "profile": "Show a profile, or import one from kernel tables.",
    "fit": "Fit a profile to measured steps.",
    "calibrate": "Measure a profile from a live engine.",
    "validate": "Judge the engine model against a measured run.",
    "bench": "Measure Block's hot paths on this machine.",
    "simulate": "A whole cluster in virtual time.",
    "capacity": "The highest rate at which a criterion holds.",
    "compare": "Policies over rates: a table and figures.",
    "length": "Output lengths: train, evaluate, predict.",
    "conformance": "Check any OpenAI-compatible gateway from outside.",
}


class LazyGroup(click.Group):
    """Imports a subcommand's module only when that subcommand is asked for, so that each starts fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"block.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="block")
def app() -> None:
    """Block, a predictive load balancer for large-language-model serving."""


def main() -> None:
    """Run the program; errors that the user can correct end in one sentence and exit code 2."""
    try:
        app(prog_name="block")
    except UserError as error:
        click.echo(f"block: {error}", err=True)
        sys.exit(2)
