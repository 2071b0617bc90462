"""The engine model, replayed against runs measured on an H200, and what it says about directories that hold none."""

import gzip
import shutil
from pathlib import Path

import msgspec
import pytest

from block.engine.limits import EngineLimits
from block.engine.validate import MeasuredRequest, compare, measured_preemptions, read_stage, replay
from block.errors import BadInputError, ConfigError
from block.steptime.profile import check_writable, load_profile
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
        (lambda d: (d / "engine.json").write_text('{"tensor_parallel": "two"}') and d, "tensor_parallel must be"),
        (lambda d: (d / "engine.json").write_text('{"model_config": [1]}') and d, "model_config must be"),
    ],
)
def test_a_directory_that_is_no_run_is_refused_with_a_reason(tmp_path, make, message):
    with pytest.raises(BadInputError, match=message):
        read_run(make(tmp_path))


HEADER = "request,arrived_s,prompt_tokens,output_tokens,ttft_s,e2e_s"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("0,0,0,1,1,1", "request 0 has no prompt"),
        ("0,0,10,0,1,1", "request 0 has no prompt or no output"),
        ("0,nan,10,1,1,1", "needs a finite arrived_s"),
        ("0,0,10,1,0,1", "a ttft_s and an e2e_s above 0"),
        ("0,0,10,1,1,inf", "a ttft_s and an e2e_s above 0"),
        ("0,0,10,1,1,1\n0,1,10,1,1,1", "two of its requests have one number"),
    ],
)
def test_a_request_that_cannot_have_been_measured_is_named(tmp_path, rows, message):
    (tmp_path / "q.requests.csv.gz").write_bytes(gzip.compress(f"{HEADER}\n{rows}\n".encode()))
    with pytest.raises(BadInputError, match=message):
        read_stage(tmp_path, "q", 16)


def test_multi_turn_requests_without_groups_share_with_their_parents_alone(tmp_path):
    table = f"{HEADER},turn,shared_with_parent_tokens,parent_request\n1,0,64,9,1,1,0,32,0\n2,5,90,9,1,1,1,64,1\n"
    (tmp_path / "q.requests.csv.gz").write_bytes(gzip.compress(table.encode()))
    first, second = read_stage(tmp_path, "q", 16)
    assert not first.block_keys
    assert second.block_keys == [(1, i) for i in range(4)]
    (tmp_path / "q.requests.csv.gz").write_bytes(gzip.compress(f"{HEADER},parent_request\n1,0,64,9,1,1,0\n".encode()))
    with pytest.raises(BadInputError, match="needs turn and shared_with_parent_tokens too"):
        read_stage(tmp_path, "q", 16)


def test_requests_that_never_end_are_named():
    limits = EngineLimits(enable_chunked_prefill=False, max_num_batched_tokens=128, max_num_seqs=8)
    requests = [MeasuredRequest(7, 0.0, 300, 5, 1.0, 1.0), MeasuredRequest(8, 1.0, 20, 5, 1.0, 1.0)]
    with pytest.raises(BadInputError, match="2 requests never end within the engine's limits, the first of them 7"):
        replay(requests, limits, load_profile("h200-llama2-7b"))


def test_preemptions_that_a_log_does_not_tell_are_unknown(tmp_path):
    file = tmp_path / "q.steps.csv.gz"
    assert measured_preemptions(tmp_path, "q") is None
    file.write_bytes(gzip.compress(b"update_start_s\n1\n"))
    assert measured_preemptions(tmp_path, "q") is None
    file.write_bytes(gzip.compress(b"preempted\n1\n2\n"))
    assert measured_preemptions(tmp_path, "q") == 3
    file.write_bytes(gzip.compress(b"preempted\nx\n"))
    with pytest.raises(BadInputError, match="is not a step log"):
        measured_preemptions(tmp_path, "q")


def test_a_profile_that_cannot_be_written_is_said_before_the_work(tmp_path):
    check_writable(tmp_path / "new" / "a.json")
    with pytest.raises(ConfigError, match="cannot be written"):
        check_writable(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        check_writable(tmp_path / "file" / "a.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decode_knots": []}, "decode_knots needs knots"),
        ({"mixed_knots": [[1, 0.005], [1e12, 0.006]]}, "mixed_knots needs knots"),
        ({"decode_knots": [[8, 0.005], [1, 0.006]]}, "decode_knots must rise"),
        ({"decode_knots": [[1, 0.006], [8, 0.005]]}, "decode_knots must rise"),
        ({"kv_s": -1e-6}, "kv_s must not be negative"),
        ({"heat_memory_s": 0}, "heat_memory_s must be above 0"),
    ],
)
def test_a_profile_that_no_engine_could_have_is_refused(tmp_path, change, message):
    fields = msgspec.to_builtins(load_profile("h200-llama2-7b"))
    (tmp_path / "a.json").write_bytes(msgspec.json.encode(fields | change))
    with pytest.raises(BadInputError, match=message):
        load_profile(str(tmp_path / "a.json"))
