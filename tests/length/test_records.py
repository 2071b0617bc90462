"""Logs and public sets as training records."""

import gzip
import json
import tarfile
from pathlib import Path

import pytest

from block.errors import BadInputError
from block.length.data.records import features_row, prompt_key
from block.length.data.rows import records_of
from block.length.data.sets import read_records
from block.length.prompt.features import DENSE_NAMES, features_of
from block.length.prompt.text import split_chat


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
    records = read_records([path])
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
    assert found == {("Add\n1, 2", "", 1), ("Why?", "", 4), ("Go", "", 8), ("Sing", "m1", 5)}


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"instruction": "Add", "input": "", "output": "three"}, [("Add", 1)]),
        ({"instruction": "Sum up", "context": "It rains.", "response": "Rain, much rain"}, [("Sum up\nIt rains.", 4)]),
        ({"question": "Why?", "answer": "So it is"}, [("Why?", 4)]),
        ({"prompt": "Go", "completion": "gone"}, [("Go", 1)]),
        ({"prompt": "Go", "completion_tokens": 7, "output": "of no matter"}, [("Go", 7)]),
        ({"prompt": "Go", "usage": {"prompt_tokens": 1, "completion_tokens": 8}}, [("Go", 8)]),
        ({"prompt": "Go", "response": {"usage": {"completion_tokens": 9}}}, [("Go", 9)]),
        ({"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "a b c"}]},
         [("Hi", 4)]),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a b"}]}, [("Hi", 3)]),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a b"}], "output_tokens": 5},
         [("Hi", 5)]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "a b"}]}, [("Hi", 3)]),
        ({"input": "Go", "output": "gone"}, [("Go", 1)]),
        ({"question": "Who?", "context": "Ann sang.", "answer": "Ann"}, [("Who?\nAnn sang.", 1)]),
        ({"inputs": "Go", "targets": "gone"}, [("Go", 1)]),
        ({"prompt": "Go", "output_tokens": "12"}, [("Go", 12)]),
        ({"data": ["Hi", "a b", "More", "c"]}, [("Hi", 3), ("\x1euser\x1fHi\x1eassistant\x1fa b\x1euser\x1fMore", 1)]),
        ({"request": {"messages": [{"role": "user", "content": "Hi"}]}, "response": {"usage": {"completion_tokens": 9}}},
         [("Hi", 9)]),
        ({"request": {"prompt": "Hi"}, "response": {"choices": [{"message": {"content": "a b"}}]}}, [("Hi", 3)]),
        ({"body": {"prompt": "Hi"}, "response": {"body": {"usage": {"completion_tokens": 9}}}}, [("Hi", 9)]),
        ({"conversation_a": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"}],
          "conversation_b": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a b"}]},
         [("Hi", 1), ("Hi", 3)]),
        ({"prompt": "Go", "output": ""}, []),
        ({"prompt": "Go", "output_tokens": 0}, []),
        ({"prompt": "Go", "output_tokens": None}, []),
        ({"prompt": {"no": "text"}, "output_tokens": 3}, [("", 3)]),
    ],
)  # fmt: skip
def test_rows_of_many_shapes_are_records(row: dict[str, object], found: list[tuple[str, int]]) -> None:
    assert [(r.text, r.output_tokens) for r in records_of(row, "set")] == found


def test_every_answer_of_a_conversation_is_a_record_and_none_is_split_from_the_others() -> None:
    said = [("human", "Hi"), ("gpt", "Hello you"), ("human", "More"), ("gpt", "one two three four")]
    row = {"id": "1", "conversations": [{"from": who, "value": what} for who, what in said]}
    first, second = records_of(row, "set")
    assert (first.output_tokens, second.output_tokens) == (3, 5)
    assert split_chat(second.text) == [("user", "Hi"), ("assistant", "Hello you"), ("user", "More")]
    assert first.key != second.key
    assert first.group == second.group


def test_two_models_side_by_side_are_told_apart() -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"}]
    row = {"conversation_a": turns, "conversation_b": turns, "model_a": "x", "model_b": "y"}
    assert [r.model for r in records_of(row, "set")] == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.csv", 'prompt,response,model\n"Go, now",one two,m\nStay,one,m\n'),
        ("rows.tsv", "\ufeffprompt\toutput_tokens\tmodel\nGo, now\t3\tm\nStay\t1\tm\n"),
        ("rows.json", '{"prompt": ["Go, now", "Stay"], "response": ["one two", "one"], "model": ["m", "m"]}'),
        ("rows.json", '{"data": [{"prompt": "Go, now", "response": "one two"}, {"prompt": "Stay", "response": "one"}]}'),
        ("rows.json", '{"a": [{"prompt": "Go, now", "response": "one two"}],\n"b": [{"prompt": "Stay", "response": "one"}]}'),
    ],
)  # fmt: skip
def test_tables_columns_and_rows_in_a_field_are_rows(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = [(r.text, r.output_tokens, r.model) for r in read_records([tmp_path / name], model="m")]
    assert found == [("Go, now", 3, "m"), ("Stay", 1, "m")]


def test_a_file_without_records_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"found: text, label"):
        read_records([write_lines(tmp_path / "log.jsonl", [{"text": "a", "label": 1}])])
    (tmp_path / "log.parquet").write_bytes(b"PAR1 and so on")
    with pytest.raises(BadInputError, match=r"a Parquet file, which is not read: write its rows as JSON lines"):
        read_records([tmp_path / "log.parquet"])


@pytest.mark.parametrize("name", ["rows.json", "rows.json.gz", "rows.jsonl", "rows.jsonl.gz", "rows.log"])
@pytest.mark.parametrize("as_lines", [True, False])
def test_what_a_file_holds_is_told_by_its_content(tmp_path: Path, name: str, as_lines: bool) -> None:
    rows = [{"prompt": f"Go {n}", "output_tokens": 5} for n in range(3)]
    text = "\n".join(map(json.dumps, rows)) if as_lines else json.dumps(rows, indent=1)
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert [r.text for r in read_records([tmp_path / name], model="m")] == ["Go 0", "Go 1", "Go 2"]


def test_a_log_that_is_still_written_may_end_in_half_a_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "log.jsonl", [{"prompt": "Hi", "output_tokens": 3}, '{"prompt": "He'])
    assert [r.text for r in read_records([path])] == ["Hi"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("log.jsonl.gz", gzip.compress(b'{"prompt": "Hi", "output_tokens": 3}' * 99, mtime=0)[:40]),
        ("log.jsonl", b"\xff\xfe\x00"), ("log.csv", b"a,b\n1,2\n"), ("log.csv", b"\xff\xfe\x00,"),
        ("log.json", b'{"a": [{"b": 1}]}'), ("log.parquet", b"PAR1...PAR1"), ("log.jsonl", b'{"request": 3, "conversation_a": []}'),
        ("log.jsonl", b"[[[[" * 5000),
        ("set.json", b'{"prompts": [{"results": 3}]}'), ("set.json", b'{"prompts": [1]}'), ("log.json", b"[1, 2]"),
        ("log.jsonl", b'{"conversations": [{"from": "human"}]}'), ("log.jsonl", b'{"output_tokens": 3, "features": 7}'),
    ],
)  # fmt: skip
def test_a_file_that_holds_nothing_usable_is_one_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInputError, match=name) as error:
        read_records([tmp_path / name])
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


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
