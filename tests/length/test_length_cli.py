"""``block length`` as a user runs it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from length_records import made_up

from block.cli.length import command
from block.errors import BadInputError, ConfigError

pytest.importorskip("lightgbm", reason="training needs LightGBM: pip install 'block-llm[length]'")
from block.length.learn.train import fit


def run(*arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(command, list(arguments), input=text, catch_exceptions=False)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("logs") / "log.jsonl"
    rows = [{"model": r.model, "prompt": r.text, "output_tokens": r.output_tokens} for r in made_up(400)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_train_then_predict_then_eval(log: Path, tmp_path: Path) -> None:
    file = str(tmp_path / "m.npz")
    made = json.loads(run("train", str(log), "-o", file, "--rounds", "30", "--json").stdout)
    assert made["records"] == 400
    assert made["served_models"] == ["m"]
    picture = tmp_path / "p.svg"
    asked = ["predict", "Explain bees near Rome coal and Oslo", "--model-file", file, "--served", "m", "--json"]
    told = json.loads(run(*asked, "--picture", str(picture)).stdout)
    assert told["quantiles"]["0.1"] < told["expected_total_tokens"] < told["quantiles"]["0.9"]
    assert picture.read_text().lstrip().startswith("<?xml")
    later = json.loads(run(*asked, "--generated", "500").stdout)
    assert later["expected_total_tokens"] > 500
    reports = json.loads(run("eval", str(log), "--model-file", file, "--folds", "2", "--json").stdout)
    assert {"constant", "constant mean", "history", "prompt length", "learned", "corrected"} == set(
        reports[0]["scores"]
    )
    assert reports[0]["gains"]["learned"]["mae_vs_mean"] > 0.3


def test_eval_prints_tables_for_people(log: Path) -> None:
    shown = run("eval", str(log), "--folds", "2", "--rounds", "10").stdout
    assert "unseen prompts" in shown
    assert "constant mean" in shown
    assert shown.count("made-up") == 0
    assert shown.count("log / m") >= 2  # in both tables: every served model against every baseline


def test_predict_reads_messages_from_standard_input_and_has_a_shipped_model() -> None:
    messages = json.dumps([{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Why is ice cold?"}])
    told = json.loads(run("predict", "-", "--max-tokens", "30", "--json", text=messages).stdout)
    assert told["quantiles"]["0.95"] <= 30
    assert "expected" in run("predict", "Why is ice cold?").stdout


def test_training_starts_from_the_shipped_model_from_another_or_from_nothing(log: Path, tmp_path: Path) -> None:
    sizes = {}
    bases = {"nothing": ["--base", "none"], "shipped": [], "another": ["--base", str(tmp_path / "nothing.npz")]}
    for name, options in bases.items():
        file = str(tmp_path / f"{name}.npz")
        sizes[name] = json.loads(run("train", str(log), "-o", file, "--rounds", "10", "--json", *options).stdout)[
            "bytes"
        ]
    assert sizes["nothing"] < sizes["another"] < sizes["shipped"]


def test_eval_does_not_start_from_a_base_nor_score_a_model_that_saw_the_prompts(tmp_path: Path, log: Path) -> None:
    seen = tmp_path / "seen.npz"
    fit(made_up(400), rounds=10, remember=True).save(seen)
    shown = run("eval", str(log), "--folds", "2", "--rounds", "5", "--base", str(seen))
    assert "400 of 400 prompts were in the base's training" in shown.stderr
    with pytest.raises(BadInputError, match="score it on others"):
        run("eval", str(log), "--model-file", str(seen))


def test_predict_reads_a_whole_request_body() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "Why is ice cold?"}], "max_tokens": 12}
    told = json.loads(run("predict", json.dumps(body), "--json").stdout)
    assert told["quantiles"]["0.95"] <= 12
    assert json.loads(run("predict", "", "--json").stdout)["source"] == "prior"
    for odd in ("{}", '{"a":', "[{}]", "[{", "\x00"):
        assert json.loads(run("predict", odd, "--json").stdout)["expected_total_tokens"] > 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "x", "output_tokens": 4}], "Too few records to train on: 1"),
        ([{"prompt": "x", "output_tokens": 4}] * 60, "too few different prompts"),
        ([{"prompt": "", "output_tokens": 4}] * 60, "no prompts to learn from"),
    ],
)
def test_too_little_to_learn_from_is_one_sentence(tmp_path: Path, rows: list[object], message: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(BadInputError, match=message):
        run("train", str(path), "-o", str(tmp_path / "m.npz"))
    with pytest.raises(BadInputError, match=r"different prompts?, too few|Too few records"):
        run("eval", str(path))


def test_too_few_records_to_score_are_told_by_what_the_user_has(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": r.text, "output_tokens": 9}) for r in made_up(40)))
    with pytest.raises(BadInputError, match="5 folds: 40, and at least 63 are needed"):
        run("eval", str(path))


@pytest.mark.parametrize("tokens", [1, 40, 200_000])
def test_answers_of_one_length_are_told_as_such(tmp_path: Path, tokens: int) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": r.text, "output_tokens": tokens}) for r in made_up(80)))
    for base in ("none", ""):
        run("train", str(path), "-o", str(tmp_path / "m.npz"), "--rounds", "5", *(["--base", base] if base else []))
        told = json.loads(run("predict", "Explain owls", "--model-file", str(tmp_path / "m.npz"), "--json").stdout)
        assert told["quantiles"]["0.5"] == pytest.approx(tokens, rel=0.1)


def test_every_command_says_how_it_is_used() -> None:
    for name in ("train", "eval", "predict"):
        shown = run(name, "--help").stdout
        assert "Examples:" in shown
        assert "--json" in shown


def test_bad_input_is_one_sentence(log: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="does not exist"):
        run("train", str(tmp_path / "no.jsonl"), "-o", str(tmp_path / "m.npz"))
    with pytest.raises(ConfigError, match="folder"):
        run("train", str(log), "-o", str(tmp_path / "no" / "m.npz"))
    with pytest.raises(ConfigError, match="--base or --transformer"):
        run("train", str(log), "-o", str(tmp_path / "m"), "--base", "none", "--transformer", str(tmp_path))
    with pytest.raises(ConfigError, match="png"):
        run("predict", "x", "--picture", "x.gif")
    with pytest.raises(BadInputError, match="not a length model"):
        run("predict", "x", "--model-file", str(log))
