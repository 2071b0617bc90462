"""Logs and public sets as training records."""

import gzip
import json
import tarfile
from pathlib import Path

import pytest

from block.errors import BadInputError
from block.length.features import DENSE_NAMES, features_of
from block.length.records import features_row, prompt_key, read_log
from block.length.sets import read_records


def write_lines(path: Path, rows: list[object]) -> Path:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["log.jsonl", "log.jsonl.gz"])
def test_a_log_gives_model_text_limit_and_length(tmp_path: Path, name: str) -> None:
    path = write_lines(
        tmp_path / name,
        [
            {"model": "a", "prompt": "Hi", "max_tokens": 10, "output_tokens": 10},
            {"model": "a", "messages": [{"role": "user", "content": "Hello"}], "output_tokens": 3},
            {"model": "a", "prompt": "no length"},
            "",
            {"model": "a", "prompt": "words", "response": "one two three four five six seven eight nine ten"},
            {"output_tokens": 7, "unknown field": [1]},
        ],
    )
    records = list(read_log(path))
    assert [(r.text, r.output_tokens, r.max_tokens, r.truncated) for r in records] == [
        ("Hi", 10, 10, True), ("Hello", 3, None, False), ("words", 13, None, False), ("", 7, None, False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{broken"], "line 1 is not JSON"),
        (["[1, 2]"], "not a JSON object"),
        ([{"prompt": "x"}], "no record"),
        ([{"prompt": "x", "output_tokens": -5}, {"prompt": "x", "output_tokens": True}], "no record"),
        ([], "no record"),
    ],
)
def test_a_log_that_cannot_be_used_is_one_sentence(tmp_path: Path, rows: list[object], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        read_records([write_lines(tmp_path / "log.jsonl", rows)])


def test_a_row_may_hold_features_instead_of_a_prompt(tmp_path: Path) -> None:
    features = features_of("Write an essay about the sea", 300)
    row = {"model": "m", "output_tokens": 9, "features": features_row(features), "prompt_hash": "ab12"}
    (record,) = read_records([write_lines(tmp_path / "log.jsonl", [row])])
    assert record.features is not None
    assert record.features.dense == pytest.approx(features.dense, abs=1e-3)
    assert record.features.words.tolist() == features.words.tolist()
    assert (record.text, record.key, record.has_prompt) == ("", "ab12", True)


@pytest.mark.parametrize(
    "change",
    [
        {"layout": 1}, {"dense": [1.0]}, {"dense": ["x"]}, {"words": [10**6]}, {"words": [-1]}, {"words": "no"},
        {"dense": [float("nan")] * len(DENSE_NAMES)},
    ],
)  # fmt: skip
def test_features_of_another_version_or_damaged_ones_are_one_sentence(
    tmp_path: Path, change: dict[str, object]
) -> None:
    row = {"output_tokens": 9, "features": features_row(features_of("Hi")) | change}
    with pytest.raises(BadInputError, match=r"line 1 (cannot be understood|is not JSON)"):
        read_records([write_lines(tmp_path / "log.jsonl", [row])])


def test_what_does_not_exist_or_is_no_archive_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="does not exist"):
        read_records([tmp_path / "nothing.jsonl"])
    (tmp_path / "bad.tar.gz").write_bytes(b"no archive")
    with pytest.raises(BadInputError, match="cannot be read"):
        read_records([tmp_path / "bad.tar.gz"])


def test_a_folder_of_sets_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "instructions.json").write_text(
        json.dumps([{"instruction": "Add", "input": "1, 2", "response": "three"}])
    )
    write_lines(tmp_path / "queries.jsonl", [{"ID": "1", "user_query": "Why?", "chatgpt_response": "Because of rain."}])
    write_lines(tmp_path / "timed.jsonl", [{"requests": [{"Prompt Length": 1, "Output Length": 8, "prompt": "Go"}]}])
    answers = tmp_path / "set" / "model_answer"
    answers.mkdir(parents=True)
    write_lines(tmp_path / "set" / "question.jsonl", [{"question_id": "q", "turns": [{"content": "Sing"}]}])
    answer = {"question_id": "q", "model_id": "m1", "choices": [{"turns": [{"content": "la la", "token_len": 5}]}]}
    write_lines(answers / "m1.jsonl", [answer])
    found = {(r.text, r.model, r.output_tokens) for r in read_records([tmp_path])}
    assert found == {("Add\n1, 2", "gpt-4", 1), ("Why?", "chatgpt", 4), ("Go", "sharegpt", 8), ("Sing", "m1", 5)}


def test_sampling_reports_keep_their_limits(tmp_path: Path) -> None:
    report = {
        "model_name": "base",
        "prompts": [
            {"prompt": "Hi", "results": [{"sampling_params": {"max_new_tokens": 4}, "outputs": ["a b c d e f", "a"]}]}
        ],
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    with tarfile.open(tmp_path / "reports.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "report.json", "reports/report.json")
    records = read_records([tmp_path / "reports.tar.gz"])
    assert [(r.output_tokens, r.truncated) for r in records] == [(4, True), (1, False)]


def test_prompts_that_differ_in_punctuation_and_case_alone_are_one_prompt() -> None:
    assert prompt_key("What's  up, Doc?") == prompt_key("what s up doc")
