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


def rewritten(path: Path, to: Path, header=lambda h: h, row=lambda r: r) -> Path:
    """A trace in another form."""
    first, *rest = map(json.loads, lines_of(path))
    with gzip.open(to / path.name, "wt") as file:
        file.write("\n".join(json.dumps(x) for x in [header(first), *map(row, rest)]))
    return to / path.name


def without_ends(row: dict) -> dict:
    """As a server writes it that does not know where a request will stop: only who was aborted stays."""

    def arrival(a: list) -> list | dict:
        named = dict(
            zip(("id", "prompt_tokens", "max_tokens", "priority", "output_tokens", "content"), a, strict=False)
        )
        if named.get("output_tokens") is not None:
            del named["output_tokens"]
        return named

    return {**row, "arrivals": [arrival(a) for a in row["arrivals"]]}


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.name.removesuffix(".jsonl.gz"))
def test_where_a_request_stops_is_inferred_from_its_disappearance(path: Path, tmp_path: Path) -> None:
    told, inferred = validate_trace(path), validate_trace(rewritten(path, tmp_path, row=without_ends))
    assert inferred.mismatches == 0, inferred.first_mismatch
    assert inferred.early_stops >= told.early_stops


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.name.removesuffix(".jsonl.gz"))
def test_other_forms_of_header_and_rows_mean_the_same(path: Path, tmp_path: Path) -> None:
    def header(h: dict) -> dict:
        engine = dict(h["engine"])
        scheduler = {"scheduling_policy": engine.pop("policy"), "max_num_seqs": engine.pop("max_num_seqs")}
        scheduler["chunked_prefill_enabled"] = engine.pop("enable_chunked_prefill", True)
        engine["num_gpu_blocks_override"] = engine.pop("num_gpu_blocks")
        return {"vllm_config": {**engine, "scheduler_config": scheduler, "lora_config": None, "seed": 0}}

    def row(r: dict) -> dict:
        other = {k: v for k, v in r.items() if k not in ("scheduled", "blocks_free", "preempted")}
        other["num_scheduled_tokens"] = {str(k): n for k, n in r["scheduled"]}
        other["preempted"] = len(r["preempted"])
        return {**other, "kv_blocks_free": r["blocks_free"], "step": 1, "finished": []}

    verdict = validate_trace(rewritten(path, tmp_path, header, row))
    assert verdict.mismatches == 0, verdict.first_mismatch
    assert verdict == validate_trace(path)


def test_token_ids_say_what_prompts_share(tmp_path: Path) -> None:
    header = json.loads(lines_of(TRACES[0].parent / "prefix.jsonl.gz")[0])["engine"]
    shared = list(range(header["shared_prefix_tokens"]))

    def row(r: dict) -> dict:
        ids = {a[0]: (shared + [10_000 * (a[0] + 1) + i for i in range(a[1])])[: a[1]] for a in r["arrivals"]}
        return {**r, "arrivals": [[a[0], ids[a[0]], *a[2:]] for a in r["arrivals"]]}

    path = rewritten(
        TRACES[0].parent / "prefix.jsonl.gz",
        tmp_path,
        lambda h: {"engine": {**header, "shared_prefix_tokens": None}},
        row,
    )
    assert validate_trace(path).mismatches == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("speculative_config", {"method": "ngram"}),
        ("pipeline_parallel_size", 2),
        ("num_spec_tokens", 3),
        ("enable_lora", True),
    ],
)
def test_an_engine_that_the_model_does_not_know_is_refused(key: str, value: object, tmp_path: Path) -> None:
    path = rewritten(TRACES[0], tmp_path, lambda h: {"engine": {**h["engine"], key: value}})
    with pytest.raises(BadInputError, match=key):
        validate_trace(path)


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.name.removesuffix(".jsonl.gz"))
def test_what_a_header_leaves_out_has_vllms_default(path: Path, tmp_path: Path) -> None:
    defaults = {
        "block_size": 16, "enable_chunked_prefill": True, "policy": "fcfs", "watermark": 0.0, "async_scheduling": True,
        "long_prefill_token_threshold": 0, "scheduler_reserve_full_isl": True, "enable_prefix_caching": False,
    }  # fmt: skip

    def header(h: dict) -> dict:
        return {"engine": {k: v for k, v in h["engine"].items() if k not in defaults or defaults[k] != v}}

    assert validate_trace(rewritten(path, tmp_path, header)).mismatches == 0


def test_prompts_that_are_said_to_share_a_prefix_mean_prefix_caching(tmp_path: Path) -> None:
    def header(h: dict) -> dict:
        return {"engine": {k: v for k, v in h["engine"].items() if k != "enable_prefix_caching"}}

    assert validate_trace(rewritten(TRACES[0].parent / "prefix.jsonl.gz", tmp_path, header)).mismatches == 0


def refused(to: Path, header: object, rows: list[object]) -> str:
    """What is said of a trace of these lines."""
    path = to / "odd.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("\n".join(json.dumps(x) for x in [header, *rows]))
    with pytest.raises(BadInputError) as found:
        validate_trace(path)
    return str(found.value)


@pytest.mark.parametrize(
    ("number", "change", "said"),
    [
        (2, {"scheduled": [[0, "1"]]}, "line 4: scheduled tokens is '1'"),
        (2, {"scheduled": None}, "line 4: scheduled must be pairs"),
        (2, {"blocks_free": "109"}, "line 4: blocks_free is '109'"),
        (2, {"running": "0"}, "line 4: running is not a list"),
        (0, {"arrivals": [[0, 309]]}, "line 2: an arrival lacks max_tokens"),
        (0, {"arrivals": [[0, -3, 177, 0]]}, "line 2: an arrival's prompt is -3"),
        (0, {"arrivals": [[0, 309, 177, "high"]]}, "line 2: an arrival's priority is 'high'"),
        (0, {"arrivals": []}, "line 2: request 0 is there before it arrived"),
        (9, {"arrivals": [[0, 30, 20, 0]]}, "line 11: request 0 arrives a second time"),
        (9, {"t_s": 0.0}, "line 11: t_s goes back"),
        (9, None, "line 11: a call is not a JSON object"),
    ],
)
def test_a_row_that_is_none_is_refused_with_its_line(number: int, change: dict, said: str, tmp_path: Path) -> None:
    header, *rows = map(json.loads, lines_of(TRACES[0].parent / "prefix.jsonl.gz")[:30])
    rows[number] = {**rows[number], **change} if change is not None else None
    assert said in refused(tmp_path, header, rows)


def test_a_trace_without_header_or_calls_is_refused(tmp_path: Path) -> None:
    header, *rows = map(json.loads, lines_of(TRACES[0])[:5])
    assert "not its engine's header: it lacks max_num_seqs" in refused(tmp_path, rows[0], rows[1:])
    assert "the header is not a JSON object" in refused(tmp_path, [1], rows)
    assert "no schedule() call" in refused(tmp_path, header, [])


@pytest.mark.parametrize("cut", [0, 30, 3000])
def test_a_file_that_was_cut_is_refused(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(TRACES[0].read_bytes()[:cut])
    with pytest.raises(BadInputError, match=r"cut\.jsonl\.gz"):
        validate_trace(path)


@pytest.mark.parametrize("at", [2, 12, 500])
def test_a_damaged_file_is_refused(at: int, tmp_path: Path) -> None:
    whole = TRACES[0].read_bytes()
    path = tmp_path / "damaged.jsonl.gz"
    path.write_bytes(whole[:at] + b"\xff\x00\xee\x55" + whole[at + 4 :])
    with pytest.raises(BadInputError, match=r"damaged\.jsonl\.gz"):
        validate_trace(path)


def test_a_trace_may_be_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "plain.jsonl"
    path.write_text("\n".join(lines_of(TRACES[0])))
    assert validate_trace(path) == validate_trace(TRACES[0])
