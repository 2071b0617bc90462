"""One source, two forms: compiled and uncompiled, they do the same."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("uncompiled.py")


def run(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_uncompiled_form_does_what_the_compiled_one_does() -> None:
    source, installed = run("uncompiled"), run()
    assert not source["compiled"]
    assert source["asked"] == pytest.approx(installed["asked"])
    for form in (source, installed):
        for fast, reference in zip(form["fast"], form["reference"], strict=True):
            assert fast == pytest.approx(reference)
    for ours, theirs in zip(source["fast"], installed["fast"], strict=True):
        assert ours == pytest.approx(theirs)
