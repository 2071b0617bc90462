"""The documents point at things that exist."""

import re
from pathlib import Path

import pytest

from block.cli import COMMANDS
from block.policy import table as policy_table

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_command_in_a_document_exists(document: Path) -> None:
    for command in re.findall(r"^\s*(?:\$ )?block ([a-z]+)\b", document.read_text(), re.MULTILINE):
        assert command in COMMANDS


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_script_named_in_a_document_exists(document: Path) -> None:
    for script in re.findall(r"\b((?:bench|experiments|tools)/[\w/-]+\.(?:py|sh|toml))\b", document.read_text()):
        assert (ROOT / script).exists(), script


def test_the_two_commands_of_the_readme_are_rules_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert {"make demo", "make test"} <= set(re.findall(r"make \w+", (ROOT / "README.md").read_text()))
    assert "\ndemo:" in makefile
    assert "\ntest:" in makefile
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_python_of_the_researchers_page_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(policy_table, "POLICIES", dict(policy_table.POLICIES))
    text = (ROOT / "docs" / "research.md").read_text()
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/research.md", "exec"), names)
    printed = capsys.readouterr().out
    assert re.findall(r"^(\S+) +TTFT P99 [\d.]+ s", printed, re.MULTILINE) == ["emptiest", "least-outstanding", "block"]
    assert "requests/s (" in printed
