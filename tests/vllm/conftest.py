"""Real vLLM on this machine's CPU. ``make test-vllm`` installs it and sets ``BLOCK_VLLM_ENV``; everywhere else these
tests skip."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from live import REPOSITORY, VllmServer

LIMITS = (
    "--max-model-len",
    "1024",
    "--max-num-seqs",
    "32",
    "--max-num-batched-tokens",
    "256",
    "--num-gpu-blocks-override",
    "400",
)
_report: dict[str, Any] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not os.environ.get("BLOCK_VLLM_ENV"):
        reason = "needs a real vLLM (2 GB): run `make test-vllm`"
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _report:
        terminalreporter.write_sep("=", "measured")
        for name, value in _report.items():
            terminalreporter.write_line(f"{name}: {json.dumps(value)}")


@pytest.fixture(scope="session")
def report() -> dict[str, Any]:
    """Figures that are printed at the end."""
    return _report


@pytest.fixture(scope="session")
def python() -> Path:
    """The interpreter of vLLM's environment."""
    return Path(os.environ["BLOCK_VLLM_ENV"]).absolute() / "bin" / "python"


@pytest.fixture(scope="session")
def model(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights: about 3 ms a step."""
    return _make(python, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def large_config(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shape of an 8B model without its weights, for an emulated GPU."""
    shape = (
        "--hidden",
        "4096",
        "--layers",
        "32",
        "--heads",
        "32",
        "--kv-heads",
        "8",
        "--inner",
        "14336",
        "--vocab",
        "1000",
    )
    return _make(python, tmp_path_factory.mktemp("large"), *shape, "--no-weights")


def _make(python: Path, directory: Path, *arguments: str) -> Path:
    program = str(REPOSITORY / "tools" / "vllm" / "make_tiny_model.py")
    subprocess.run([str(python), program, str(directory), *arguments], check=True, capture_output=True)
    return directory


@pytest.fixture(scope="session")
def servers(python: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[VllmServer]]:
    """Two real instances; the first one also records its decisions."""
    logs = tmp_path_factory.mktemp("servers")
    pid, trace = os.getpid(), {"BLOCK_VLLM_TRACE": str(logs / "first.trace.jsonl.gz")}
    first = VllmServer(python, model, logs / "first.log", name=f"test-{pid}-a", arguments=LIMITS, environment=trace)
    second = VllmServer(python, model, logs / "second.log", name=f"test-{pid}-b", core=1, arguments=LIMITS)
    try:
        for server in (first, second):
            server.wait()
        yield [first, second]
    finally:
        for server in (first, second):
            server.stop()
