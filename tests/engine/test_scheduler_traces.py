"""The scheduler model against recorded decisions of the real vLLM scheduler.

``preempt``, ``prefix`` and ``poisson`` come from a vLLM 0.32 server on a CPU; the others from its scheduler classes,
driven with random requests (``tests/vllm/differential.py --record``): contents shared between prompts and answers, EOS
before max_tokens, aborts.
"""

import gzip
import json
from pathlib import Path

import pytest

from block.engine.trace import validate_trace
from block.errors import BadInputError

TRACES = sorted((Path(__file__).parent / "traces").glob("*.jsonl.gz"))


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.name.removesuffix(".jsonl.gz"))
def test_every_recorded_decision_of_vllm_is_reproduced(path: Path) -> None:
    verdict = validate_trace(path)
    assert verdict.calls > 100
    assert verdict.mismatches == 0, verdict.first_mismatch


def lines_of(path: Path) -> list[str]:
    return gzip.decompress(path.read_bytes()).decode().splitlines()


def test_the_traces_cover_every_feature_that_the_model_claims() -> None:
    engines = [json.loads(lines_of(path)[0])["engine"] for path in TRACES]
    for feature, values in {
        "policy": {"fcfs", "priority"},
        "async_scheduling": {False, True},
        "enable_chunked_prefill": {False, True},
        "enable_prefix_caching": {False, True},
        "scheduler_reserve_full_isl": {False, True},
    }.items():
        assert {engine.get(feature, True) for engine in engines} == values, feature
    assert any(engine["long_prefill_token_threshold"] for engine in engines)
    assert any(engine["watermark"] for engine in engines)


def test_a_wrong_decision_is_found_and_named(tmp_path: Path) -> None:
    header, *calls = lines_of(TRACES[0])
    changed = json.loads(calls[40])
    changed["blocks_free"] += 1
    calls[40] = json.dumps(changed)
    path = tmp_path / "changed.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("\n".join([header, *calls]))
    verdict = validate_trace(path)
    assert verdict.mismatches == 1
    assert verdict.first_mismatch is not None
    assert verdict.first_mismatch["call"] == 40
    assert "blocks_free" in verdict.first_mismatch


def test_a_file_that_is_no_trace_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "not-a-trace.jsonl.gz"
    path.write_bytes(b"plainly not gzip")
    with pytest.raises(BadInputError, match=r"not-a-trace\.jsonl\.gz"):
        validate_trace(path)
