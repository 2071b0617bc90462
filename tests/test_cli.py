"""The program: every command is there, explains itself with examples, and meets mistakes with one sentence."""

import re
import subprocess
import sys
from importlib import import_module

import click
import pytest
from click.testing import CliRunner

from block.cli import COMMANDS, app


def commands(command: click.Command, path: str = "block") -> list[tuple[str, click.Command]]:
    """A command and all that are below it."""
    found = [(path, command)]
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            found += commands(below, f"{path} {name}")
    return found


ALL = commands(app)
LEAVES = [(path, command) for path, command in ALL if not isinstance(command, click.Group)]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_listed_command_exists(name: str) -> None:
    assert isinstance(import_module(f"block.cli.{name}").command, click.Command)


@pytest.mark.parametrize(("path", "command"), LEAVES, ids=[path for path, _ in LEAVES])
def test_every_help_text_has_an_example_of_its_own_command(path: str, command: click.Command) -> None:
    result = CliRunner().invoke(app, [*path.split()[1:], "--help"], prog_name="block")
    assert result.exit_code == 0
    assert re.search(r"Examples?:", result.output)
    assert re.search(rf"^\s+{re.escape(path)}\b", result.output, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["emulate", "--profile", "no-such-profile"], "There is no profile named 'no-such-profile'. Known: "),
        (["serve", "--policy", "no-such-policy", "--instance", "http://127.0.0.1:9"], "There is no policy named"),
        (["serve"], "No instance is given"),
        (["predictor", "--source", "nonsense", "--profile", "h200-llama2-7b"], "nonsense"),
        (["validate", "no-such-directory", "--stage", "q8"], "no-such-directory"),
        (["simulate", "no-such-file.toml"], "no-such-file.toml"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_ends_in_one_sentence_and_exit_code_2(arguments: list[str], words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "block", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
