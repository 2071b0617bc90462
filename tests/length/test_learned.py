"""Training, the model file, and the learned estimator in service."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from length_records import KINDS, made_up

from block.core import Request
from block.errors import BadInputError
from block.length.evaluation.report import report
from block.length.evaluation.scores import (
    TELLERS,
    cross_validate,
    hindsight,
    noise_floor,
    score,
    tell_corrected,
    tell_learned,
)
from block.length.learn.model import LengthModel, load_model
from block.length.learned import LearnedEstimator
from block.length.prompt.features import features_of
from block.length.table import make_estimator

pytest.importorskip("lightgbm", reason="training needs LightGBM: pip install 'block-llm[length]'")
from block.length.learn.tabulate import fold_of, tabulate
from block.length.learn.train import fit

FACTORS = {"short": 0.5, "long": 2.0}


@pytest.fixture(scope="module")
def model() -> LengthModel:
    return fit(made_up(1500, models=FACTORS), rounds=60)


def asked(text: str, number: int = 0, **fields: object) -> Request:
    known = {"id": f"r{number}", "arrived_s": 0.0, "prompt_tokens": 9, "model": "long", "prompt": text}
    return Request(**{**known, **fields})  # type: ignore[arg-type]


def test_it_learns_what_prompts_and_served_models_tell(model: LengthModel) -> None:
    estimator = LearnedEstimator(model=model)
    for kind, tokens in KINDS.items():
        for name, factor in FACTORS.items():
            estimate = estimator.estimate(asked(f"{kind} owls near Nantes moss and Bern", model=name))
            assert estimate.source == "learned"
            assert estimate.quantile(0.5) == pytest.approx(tokens * factor, rel=0.35)


def test_unseen_prompts_are_told_better_than_by_the_baselines_and_with_honest_intervals() -> None:
    records = made_up(1500, models=FACTORS, seed=3)
    tellers = {**TELLERS, "learned": lambda train: tell_learned(fit(train, rounds=40))}
    told = cross_validate(records, tellers, folds=3)
    true = np.array([float(r.output_tokens) for r in records])
    scores = {name: score(quantiles, true) for name, quantiles in told.items()}
    for baseline in ("constant", "constant mean", "history", "prompt length"):
        assert scores["learned"].mae_tokens < 0.65 * scores[baseline].mae_tokens
        assert scores["learned"].pinball_tokens < 0.65 * scores[baseline].pinball_tokens
    assert 0.76 <= scores["learned"].coverage_80_fraction <= 0.84


def test_a_saved_model_says_the_same(model: LengthModel, tmp_path: Path) -> None:
    model.save(tmp_path / "m.npz")
    loaded = load_model(tmp_path / "m.npz")
    for kind in KINDS:
        one, two = (m.place(f"{kind} owls", 100, "short") for m in (model, loaded))
        assert (one.location, one.scale) == pytest.approx((two.location, two.scale), abs=0.02)
    assert (tmp_path / "m.npz").stat().st_size < 2e6
    assert make_estimator(f"learned:{tmp_path / 'm.npz'}").estimate(asked("Explain owls")).source == "learned"


def test_a_base_knows_what_few_records_do_not_hold_and_travels_in_the_file(model: LengthModel, tmp_path: Path) -> None:
    """Another served model at another level, and records of two kinds of prompt alone: the base knows the others."""
    of_two_kinds = [r for r in made_up(300, seed=11, models={"other": 3.0}) if r.text.startswith(("Explain", "Name"))]
    few, test = of_two_kinds[:80], made_up(300, seed=12, models={"other": 3.0})
    true = np.array([float(r.output_tokens) for r in test])
    alone, based = fit(few, rounds=30), fit(few, base=model, rounds=30)
    errors = [score(tell_learned(one)(test), true).mae_tokens for one in (alone, based)]
    assert errors[1] < 0.8 * errors[0]
    based.save(tmp_path / "m.npz")
    loaded = load_model(tmp_path / "m.npz")
    assert loaded.base is not None
    one, two = (m.place(test[0].text, None, "other") for m in (based, loaded))
    assert (one.location, one.scale) == pytest.approx((two.location, two.scale), abs=0.02)


def test_a_base_of_odd_records_does_no_harm() -> None:
    odd = [msgspec.structs.replace(r, output_tokens=40) for r in made_up(200, seed=20)] + made_up(20, seed=21)
    base = fit(odd, rounds=20)
    records, test = made_up(150, seed=22), made_up(200, seed=23)
    true = np.array([float(r.output_tokens) for r in test])
    told = tell_learned(fit(records, base=base, rounds=30))(test)
    assert score(told, true).pinball_tokens < 0.7 * score(TELLERS["constant"](records)(test), true).pinball_tokens
    assert told[:, 2].max() < 20 * max(KINDS.values())


def test_many_effects_at_once_are_those_of_one_at_a_time(model: LengthModel) -> None:
    based = fit(made_up(80, seed=13), base=model, rounds=20)
    table = tabulate(made_up(20, seed=14))
    effect, log_scale = based.effects(table.dense, table.words)
    for i, record in enumerate(made_up(20, seed=14)):
        one = based.effect(features_of(record.text), record.text, based.unknown)
        assert (based.unknown.slope * one.told, one.log_scale) == pytest.approx((effect[i], log_scale[i]), abs=1e-3)


def test_a_model_remembers_prompts_only_when_told_to(model: LengthModel, tmp_path: Path) -> None:
    records = made_up(100, seed=15)
    assert not model.has_seen([r.group for r in made_up(1500, models=FACTORS)]).any()
    fit(records, rounds=20, remember=True).save(tmp_path / "m.npz")
    loaded = load_model(tmp_path / "m.npz")
    assert loaded.has_seen([r.group for r in records]).all()
    assert not loaded.has_seen([r.group for r in made_up(100, seed=16)]).any()


def test_in_service_the_level_of_an_unknown_model_is_corrected(model: LengthModel) -> None:
    records = made_up(900, seed=17, models={"other": 6.0})
    true = np.array([float(r.output_tokens) for r in records[600:]])
    plain, corrected = tell_learned(model), tell_corrected(model, records[:600])
    errors = [score(tell(records[600:]), true).mae_tokens for tell in (plain, corrected)]
    assert errors[1] < 0.6 * errors[0]


def test_training_twice_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        fit(made_up(300), rounds=20).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_model_file_that_is_none_is_damaged_or_is_of_another_version_is_one_sentence(
    model: LengthModel, tmp_path: Path
) -> None:
    path = tmp_path / "m.npz"
    with pytest.raises(BadInputError, match="There is no length model"):
        load_model(path)
    for content in (b"", b"not a zip", b"PK\x03\x04 half"):
        path.write_bytes(content)
        with pytest.raises(BadInputError, match="not a length model"):
            load_model(path)
    np.savez(path, x=np.zeros(3))
    with pytest.raises(BadInputError, match="not a length model"):
        load_model(path)
    np.savez(path, header=np.array([{"code": print}], dtype=object))  # a pickle: never unpacked
    with pytest.raises(BadInputError, match="not a length model"):
        load_model(path)
    model.save(path)
    with np.load(path) as file:
        arrays = dict(file)
    header = arrays["header"].tobytes()
    np.savez(path, **{**arrays, "header": np.frombuffer(header.replace(b'"version": 3', b'"version": 2'), np.uint8)})
    with pytest.raises(BadInputError, match="another version"):
        load_model(path)
    np.savez(path, **{**arrays, "location_left": arrays["location_left"] + 10**6})
    with pytest.raises(BadInputError, match="do not fit together"):
        load_model(path)


@pytest.mark.parametrize(
    "text", ["", None, "\ud800", "x" * 1_000_000, "\x1e\x1f", "日本語で説明してください", "<image>"]
)
def test_any_prompt_gets_a_sane_estimate(model: LengthModel, text: str | None) -> None:
    estimator = LearnedEstimator(model=model)
    estimate = estimator.estimate(asked("", prompt=text))
    assert 1 <= estimate.quantile(0.1) <= estimate.quantile(0.9) < 100_000
    assert estimate.source == ("learned" if text else "prior")


def test_without_text_it_falls_back_to_history_and_before_that_to_the_prior(model: LengthModel) -> None:
    estimator = LearnedEstimator(model=model)
    for number in range(200):
        request = asked("", number, prompt=None)
        estimator.estimate(request)
        estimator.observe(request, 60)
    assert estimator.estimate(asked("", prompt=None)).source == "history"
    assert estimator.sources["prior"] >= 1
    assert estimator.sources["history"] > 150


def serve(
    estimator: LearnedEstimator, count: int, factor: float, *, seed: int, noise: float = 0.3, **fields: object
) -> None:
    for number, record in enumerate(made_up(count, models={"long": 2.0 * factor}, seed=seed, noise=noise)):
        request = asked(record.text, number, **fields)
        estimator.estimate(request)
        estimator.observe(request, record.output_tokens)


def test_drift_of_a_served_model_is_followed(model: LengthModel) -> None:
    told = LearnedEstimator(model=model)
    before = told.estimate(asked("Explain bees near Rome coal and Oslo")).quantile(0.5)
    serve(told, 600, 2.5, seed=5)
    assert told.estimate(asked("Explain bees near Rome coal and Oslo")).quantile(0.5) == pytest.approx(
        2.5 * before, rel=0.2
    )
    fixed = LearnedEstimator(model=model, correct=False)
    serve(fixed, 600, 2.5, seed=5)
    assert told.accuracy.error_tokens is not None
    assert fixed.accuracy.error_tokens is not None
    assert told.accuracy.error_tokens < 0.6 * fixed.accuracy.error_tokens


def test_intervals_widen_until_they_cover(model: LengthModel) -> None:
    estimator = LearnedEstimator(model=model)
    serve(estimator, 1200, 1.0, seed=6, noise=0.8)
    drift = estimator.drift_of("long")
    assert drift is not None
    assert drift.widening > 1.5
    assert estimator.accuracy.coverage_fraction == pytest.approx(0.8, abs=0.08)


def test_clients_have_their_own_drift(model: LengthModel) -> None:
    estimator = LearnedEstimator(model=model)
    for block in range(20):
        serve(estimator, 30, 1.0, seed=block, client="plain")
        serve(estimator, 30, 3.0, seed=100 + block, client="chatty")
    plain, chatty = (
        estimator.estimate(asked("Explain bees near Rome coal and Oslo", client=c)).quantile(0.5)
        for c in ("plain", "chatty")
    )
    assert chatty / plain == pytest.approx(3.0, rel=0.35)


def test_an_unknown_served_model_begins_at_the_typical_level_and_is_corrected(model: LengthModel) -> None:
    estimator = LearnedEstimator(model=model)
    request = asked("Explain bees near Rome coal and Oslo", model="never seen")
    assert 150 < estimator.estimate(request).quantile(0.5) < 600
    for number, record in enumerate(made_up(600, models={"m": 8.0}, seed=9)):
        one = asked(record.text, number, model="never seen")
        estimator.estimate(one)
        estimator.observe(one, record.output_tokens)
    assert estimator.estimate(request).quantile(0.5) == pytest.approx(8 * KINDS["Explain"], rel=0.3)


def test_answers_cut_at_max_tokens_do_not_pull_the_estimate_down(model: LengthModel) -> None:
    estimator = LearnedEstimator(model=model)
    before = estimator.estimate(asked("Write an essay about bees near Rome coal and Oslo")).quantile(0.5)
    for number in range(400):
        request = asked("Write an essay about bees near Rome coal and Oslo", number, max_tokens=50)
        estimator.estimate(request)
        estimator.observe(request, 50)
    assert estimator.estimate(asked("Write an essay about bees near Rome coal and Oslo")).quantile(0.5) > 0.9 * before


def test_truncated_training_records_count_as_longer_than() -> None:
    records = [
        msgspec.structs.replace(r, output_tokens=min(r.output_tokens, 400), max_tokens=400)
        for r in made_up(1200, seed=4)
    ]
    estimator = LearnedEstimator(model=fit(records, rounds=40))
    essay = estimator.estimate(asked("Write an essay about bees near Rome coal and Oslo", model="m"))
    assert essay.quantile(0.9) > 420


def test_readings_name_the_error_the_calibration_and_the_sources(model: LengthModel) -> None:
    estimator = LearnedEstimator(model=model)
    serve(estimator, 100, 1.0, seed=2)
    readings = {(r.name, *r.labels.values()): r.value for r in estimator.readings()}
    assert readings["block_length_estimates_total", "learned"] == 100
    assert 0.5 < readings["block_length_coverage_fraction", "long"] <= 1
    assert readings["block_length_error_tokens", "long"] > 0


def test_too_few_records_are_one_sentence() -> None:
    with pytest.raises(BadInputError, match="Too few"):
        fit(made_up(20))
    with pytest.raises(BadInputError, match="too few different prompts"):
        fit([msgspec.structs.replace(r, text="the same") for r in made_up(100)])


def test_a_prompt_falls_in_one_fold_however_it_is_written() -> None:
    assert fold_of("What's up?") == fold_of("what s  UP")


def test_the_noise_floor_is_what_repeats_differ_by() -> None:
    rng = np.random.default_rng(0)
    prompts = made_up(60, seed=8, noise=0.0)
    records = [
        msgspec.structs.replace(
            r, output_tokens=round(r.output_tokens * float(np.exp(0.3 * rng.standard_normal()))) + 1
        )
        for r in prompts
        for _ in range(8)
    ]
    floor = noise_floor(records)
    assert floor is not None
    assert floor.cv == pytest.approx(0.3, abs=0.06)
    assert floor.mae_best_tokens < floor.mae_tokens < floor.mae_constant_tokens
    assert noise_floor(prompts[:10]) is None


def test_the_reachable_gain_is_what_other_answers_to_the_prompt_tell() -> None:
    rng = np.random.default_rng(1)
    prompts = made_up(80, seed=4, noise=0.6)
    answers = [
        msgspec.structs.replace(r, model=m, output_tokens=round(r.output_tokens * f * rng.lognormal(0.0, 0.1)) + 1)
        for r in prompts
        for m, f in (("a", 1.0), ("b", 3.0), ("c", 0.5))
    ]
    true = np.array([float(r.output_tokens) for r in answers])
    hints = hindsight(answers)
    assert np.isfinite(hints).all()
    assert np.abs(np.log(hints / true)).mean() < 0.2
    told = cross_validate(answers, {"constant": TELLERS["constant"]}, folds=2)
    told["hindsight"] = np.repeat(hints[:, None], 3, axis=1)
    by_model = {one.name: one for one in report(answers, told)}
    assert set(by_model) == {"made-up / a", "made-up / b", "made-up / c", "made-up / all"}
    for one in by_model.values():
        assert one.reachable is not None
        assert one.reachable > 0.7
        assert one.reached["hindsight"] == pytest.approx(1.0)
        assert one.reached["constant"] == 0.0
    assert np.isnan(hindsight(prompts[:10])).all()


def test_the_shipped_model_knows_a_word_from_an_essay() -> None:
    estimator = make_estimator("learned")
    essay, word = (
        estimator.estimate(asked(text, model="")).quantile(0.5)
        for text in ("Write a detailed 800 word essay on the history of bridges", "Answer in one word: is ice cold?")
    )
    assert essay > 10 * word
