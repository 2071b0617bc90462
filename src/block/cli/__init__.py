"""The ``block`` program: one subcommand per file of this package, imported only when it runs."""

import importlib
import sys

import click

from block import __version__
from block.errors import UserError

# Subcommands in the order of the help text. Each is ``command``, a click command or group, in block.cli.NAME.
COMMANDS = (
    "demo", "serve", "predictor", "autoscale", "emulate", "replay",
    "policies", "profiles", "profile", "fit", "calibrate", "validate", "bench",
    "simulate", "capacity", "compare", "length", "conformance",
)  # fmt: skip


class LazyGroup(click.Group):
    """Imports a subcommand's module only when that subcommand is asked for, so that each starts fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"block.cli.{cmd_name}").command
        return command


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
