"""The ``block`` program: one subcommand per file of this package, imported only when it runs."""

import importlib
import sys

import click
import typer
from typer.core import TyperGroup

from block import __version__
from block.errors import UserError

# name -> module of this package whose ``app`` (a typer.Typer) holds the command.
COMMANDS = {
    "demo": "demo",
    "serve": "serve",
    "emulate": "emulate",
    "predictor": "predictor",
    "replay": "replay",
    "simulate": "simulate",
    "capacity": "capacity",
    "compare": "compare",
    "validate": "validate",
    "fit": "fit",
    "profile": "profile",
    "profiles": "profiles",
    "bench": "bench",
    "length": "length",
    "calibrate": "calibrate",
    "autoscale": "autoscale",
    "conformance": "conformance",
    "policies": "policies",
}


class LazyGroup(TyperGroup):
    """Imports a subcommand's module only when that subcommand is asked for, so that each starts fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"block.cli.{COMMANDS[cmd_name]}")
        command: click.Command = typer.main.get_command(module.app)
        command.name = cmd_name
        return command


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Block, a predictive load balancer for large-language-model serving.",
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        typer.echo(f"block {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the program; errors that the user can correct end in one sentence and exit code 2."""
    try:
        app()
    except UserError as error:
        typer.echo(f"block: {error}", err=True)
        sys.exit(2)
