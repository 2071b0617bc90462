"""The commands that fit, list, show, import and validate profiles."""

import gzip
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from block.cli import app
from block.errors import UserError

from .test_importers import vidur_directory

DATA = Path(__file__).parent / "data"
TRACES = Path(__file__).parents[1] / "engine" / "traces"


def run(*words: str | Path):
    return CliRunner().invoke(app, [str(w) for w in words])


def test_a_fitted_profile_validates_the_run_it_was_fitted_to(tmp_path):
    fitted = run("fit", DATA / "llama2-7b", "-o", tmp_path / "mine.json", "--json")
    assert fitted.exit_code == 0
    errors = json.loads(fitted.stdout)["errors"]
    assert {e["regime"] for e in errors} >= {"decode, up to 32 requests", "with prefill"}
    checked = run("validate", DATA / "llama2-7b", "--stage", "q8", "--profile", tmp_path / "mine.json", "--json")
    assert json.loads(checked.stdout)["e2e_error_p50"] < 0.02
    assert json.loads((tmp_path / "mine.json").read_text())["name"] == "mine"


def test_fit_prints_a_table_by_regime(tmp_path):
    printed = run(
        "fit",
        DATA / "llama2-7b" / "q8.steps.csv.gz",
        DATA / "llama2-7b" / "sweep.steps.csv.gz",
        "-o",
        tmp_path / "p.json",
    )
    assert printed.exit_code == 0
    assert "with prefill" in printed.stdout


def test_validate_prints_the_documented_keys_with_the_matching_shipped_profile():
    printed = json.loads(run("validate", DATA / "llama2-7b", "--stage", "q8", "--json").stdout)
    assert printed["profile"] == "h200-llama2-7b"
    assert {
        "e2e_error_p50", "e2e_error_p90", "ttft_error_p50", "e2e_mean_ratio", "ttft_mean_ratio", "e2e_p99_ratio", "ttft_p99_ratio",
        "preemptions", "preemptions_measured",
    } <= set(printed)  # fmt: skip


def test_validate_prints_a_table_without_json():
    assert "e2e error p50" in run("validate", DATA / "llama2-7b", "--stage", "q8").stdout


def some_trace() -> Path:
    return min(TRACES.glob("*.jsonl.gz"), key=lambda p: p.stat().st_size)


def test_a_scheduler_trace_that_the_model_makes_too_exits_with_zero():
    result = run("validate", "--scheduler", some_trace(), "--json")
    printed = json.loads(result.stdout)
    assert result.exit_code == 0
    assert printed["calls"] > 0
    assert printed["mismatches"] == 0
    assert printed["first_mismatch"] is None


def test_a_scheduler_trace_with_another_decision_exits_with_one(tmp_path):
    lines = gzip.decompress(some_trace().read_bytes()).decode().splitlines()
    call = json.loads(lines[5])
    call["blocks_free"] += 1
    lines[5] = json.dumps(call)
    with gzip.open(tmp_path / "t.jsonl.gz", "wt") as out:
        out.write("\n".join(lines) + "\n")
    result = run("validate", "--scheduler", tmp_path / "t.jsonl.gz", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["mismatches"] == 1
    assert "blocks_free" in json.loads(result.stdout)["first_mismatch"]


def test_validate_wants_a_stage_or_a_trace():
    assert "--stage" in run("validate", DATA / "llama2-7b").output
    assert run("validate").exit_code == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("validate", DATA / "nowhere", "--stage", "q8"), "not a run directory"),
        (("validate", DATA / "llama2-7b", "--stage", "q9"), "no stage 'q9'"),
        (("validate", DATA / "llama2-7b", "--stage", "q8", "--profile", "h300"), "no profile named 'h300'"),
        (("validate", "--scheduler", DATA / "nowhere.jsonl.gz"), "no trace file"),
        (("fit", DATA / "nowhere", "-o", "x.json"), "no file or directory"),
        (("profile", "show", "h300"), "no profile named 'h300'"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(words, message):
    result = run(*words)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)


def test_profiles_are_listed_with_their_source_and_errors():
    listed = {p["name"]: p for p in json.loads(run("profiles", "--json").stdout)}
    assert {
        "h200-llama2-7b",
        "h200-llama3.1-8b",
        "h200-qwen2-7b",
        "h200-qwen2.5-32b",
        "a30-llama2-7b",
        "a30-qwen2-7b",
    } <= set(listed)
    assert listed["h200-qwen2-7b"]["errors"]
    assert "Vidur" in listed["a30-qwen2-7b"]["source"]
    assert "MIT" in listed["a30-qwen2-7b"]["licence"]
    assert "NVIDIA A30" in run("profiles").stdout


def test_a_profile_is_shown_as_step_times():
    assert "decode only" in run("profile", "show", "h200-qwen2.5-32b").stdout
    assert json.loads(run("profile", "show", "h200-qwen2.5-32b", "--json").stdout)["model"] == "qwen2.5-32b"


def test_vidurs_tables_are_imported(tmp_path):
    directory = vidur_directory(tmp_path)
    result = run("profile", "import", "vidur", directory, "--gpu", "made up", "--layers", 32, "-o", tmp_path / "v.json")
    assert result.exit_code == 0
    assert json.loads(run("profile", "show", tmp_path / "v.json", "--json").stdout)["gpu"] == "made up"
