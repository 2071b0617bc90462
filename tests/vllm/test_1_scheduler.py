"""The scheduler model beside vLLM's own classes, driven with random requests: see ``differential.py``."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from live import REPOSITORY


def test_the_model_and_its_snapshots_equal_vllms_scheduler_at_every_call(
    python: Path, model: Path, report: dict[str, Any]
) -> None:
    cases = os.environ.get("BLOCK_VLLM_CASES", "60")
    program = Path(__file__).parent / "differential.py"
    result = subprocess.run(
        [str(python), str(program), "--model", str(model), "--cases", cases, "--seed", "7000", "--json"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}, check=False,
    )  # fmt: skip
    assert result.stdout, result.stderr[-3000:]
    found = json.loads(result.stdout)
    report["differential"] = {
        k: found[k] for k in ("vllm", "cases", "calls", "tokens", "preemptions", "mismatched_cases", "cpu_s")
    }
    assert found["calls"] > 100 * found["cases"]
    assert found["preemptions"] > 0
    assert found["mismatched_cases"] == 0, found["first_mismatch"]
