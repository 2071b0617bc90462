"""The engine model, replayed against runs measured on an H200, and what it says about directories that hold none."""

import gzip
import shutil
from pathlib import Path

import pytest

from block.engine.validate import compare, read_stage, replay
from block.errors import BadInputError
from block.steptime.profile import load_profile
from block.steptime.steplog import read_run

DATA = Path(__file__).parent / "data"


def fidelity_of(directory: str, stage: str, profile: str):
    run = read_run(DATA / directory)
    requests = read_stage(run.path, stage, run.limits.block_size)
    return compare(stage, profile, requests, replay(requests, run.limits, load_profile(profile)), None)


def test_light_load_is_modelled_within_one_and_a_half_per_cent():
    fidelity = fidelity_of("llama2-7b", "q8", "h200-llama2-7b")
    assert fidelity.e2e_error_p50 < 0.015
    assert fidelity.e2e_mean_ratio == pytest.approx(1, abs=0.02)
    assert fidelity.ttft_error_p50 < 0.15
    assert 3 <= fidelity.preemptions <= 12  # measured: 7


def test_multi_turn_sessions_find_what_the_real_prefix_cache_held():
    fidelity = fidelity_of("llama3.1-8b.prefix", "turns12", "h200-llama3.1-8b")
    assert fidelity.cached_tokens == pytest.approx(fidelity.cached_tokens_measured, rel=0.001)
    assert fidelity.e2e_error_p50 < 0.02
    assert fidelity.e2e_mean_ratio == pytest.approx(1, abs=0.02)


def test_a_profile_of_another_gpu_is_shown_to_be_wrong():
    assert fidelity_of("llama2-7b", "q8", "a30-llama2-7b").e2e_mean_ratio > 2


def test_a_stage_that_does_not_exist_lists_those_that_do():
    with pytest.raises(BadInputError, match="no stage 'q9'; its stages: q8, sweep"):
        read_stage(DATA / "llama2-7b", "q9", 16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", "not a gzip CSV"),
        (gzip.compress(b"a,b\n1,2\n"), "has no rows with the columns"),
        (
            gzip.compress(b"request,arrived_s,prompt_tokens,output_tokens,ttft_s,e2e_s\n0,now,1,1,1,1\n"),
            "not a table of requests",
        ),
    ],
    ids=["no gzip", "other columns", "not numbers"],  # the bytes hold the time of their making
)
def test_a_broken_table_of_requests_is_named(tmp_path, content, message):
    shutil.copy(DATA / "llama2-7b" / "engine.json", tmp_path)
    (tmp_path / "q.requests.csv.gz").write_bytes(content)
    with pytest.raises(BadInputError, match=message):
        read_stage(tmp_path, "q", 16)


def test_a_request_that_can_never_run_is_named():
    run = read_run(DATA / "llama2-7b")
    requests = read_stage(run.path, "q8", 16)[:1]
    import msgspec

    huge = msgspec.structs.replace(requests[0], prompt_tokens=10_000_000)
    with pytest.raises(BadInputError, match="can never run"):
        replay([huge], run.limits, load_profile("h200-llama2-7b"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "missing", "not a run directory"),
        (lambda d: d, "holds no engine.json"),
        (lambda d: (d / "engine.json").write_text("{") and d, "cannot be read"),
        (lambda d: (d / "engine.json").write_text("[]") and d, "not a JSON object"),
        (lambda d: (d / "engine.json").write_text("{}") and d, "holds no stage"),
    ],
)
def test_a_directory_that_is_no_run_is_refused_with_a_reason(tmp_path, make, message):
    with pytest.raises(BadInputError, match=message):
        read_run(make(tmp_path))
