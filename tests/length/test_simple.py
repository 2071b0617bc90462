"""The estimators that look at no text."""

import numpy as np
import pytest

from block.core import Request
from block.errors import ConfigError, UnknownNameError
from block.length.simple import PENDING_MAX, HistoryEstimator
from block.length.table import make_estimator


def request_of(number: int = 0, **fields: object) -> Request:
    return Request(**{"id": f"r{number}", "arrived_s": 0.0, "prompt_tokens": 10, "model": "m", **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["constant", "history", "oracle", "header"])
def test_every_estimator_survives_a_request_that_says_nothing(name: str) -> None:
    estimator = make_estimator(name)
    estimate = estimator.estimate(Request(id="", arrived_s=0.0, prompt_tokens=0))
    assert estimate.expected_total(0) >= 1
    estimator.observe(Request(id="never seen", arrived_s=0.0, prompt_tokens=0), 0)


@pytest.mark.parametrize("name", ["constant", "history", "oracle"])
def test_a_client_that_fixes_the_output_is_taken_at_its_word(name: str) -> None:
    estimate = make_estimator(name).estimate(request_of(max_tokens=77, exact_output=True))
    assert [estimate.expected_total(0), estimate.quantile(0.9)] == [77, 77]


def test_max_tokens_caps_every_estimate() -> None:
    for name in ("constant", "history"):
        assert make_estimator(name).estimate(request_of(max_tokens=5)).quantile(0.99) <= 5


def test_an_unknown_name_or_option_is_one_sentence_that_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="history"):
        make_estimator("clairvoyant")
    with pytest.raises(ConfigError, match="tokens"):
        make_estimator("constant", token=3)
    with pytest.raises(ConfigError, match="sigma"):
        make_estimator("constant", sigma=-1)


def test_the_constant_estimator_expects_its_tokens() -> None:
    assert make_estimator("constant", tokens=330).estimate(request_of()).expected_total(0) == pytest.approx(
        330, rel=0.02
    )
    assert make_estimator("constant", tokens=330, sigma=0).estimate(request_of()).expected_total(50) == 330


def test_history_learns_each_model_on_its_own_and_begins_with_a_prior() -> None:
    history = make_estimator("history")
    rng = np.random.default_rng(0)
    assert history.estimate(request_of()).source == "prior"
    for number, (short, long) in enumerate(zip(rng.integers(20, 40, 400), rng.integers(800, 1200, 400), strict=True)):
        history.observe(request_of(number, model="short"), int(short))
        history.observe(request_of(number, model="long"), int(long))
    assert history.estimate(request_of(model="short")).quantile(0.5) == pytest.approx(30, abs=4)
    assert history.estimate(request_of(model="long")).quantile(0.5) == pytest.approx(1000, rel=0.1)
    assert history.estimate(request_of(model="other")).source == "prior"


def test_history_forgets_what_is_long_ago() -> None:
    history = make_estimator("history", half_life=100)
    for number in range(1000):
        history.observe(request_of(number), 50)
    for number in range(1000):
        history.observe(request_of(number), 500)
    assert history.estimate(request_of()).quantile(0.5) == pytest.approx(500, rel=0.1)


def test_history_is_calibrated_on_what_it_has_learned() -> None:
    history = make_estimator("history")
    rng = np.random.default_rng(2)
    for number in range(3000):
        request = request_of(number)
        history.estimate(request)
        history.observe(request, int(np.exp(rng.normal(5, 0.8))) + 1)
    assert history.accuracy.coverage_fraction == pytest.approx(0.8, abs=0.06)
    assert history.accuracy.bias_tokens == pytest.approx(0, abs=25)


def test_history_keeps_a_bounded_number_of_models_and_pending_estimates() -> None:
    history = HistoryEstimator(models_max=4)
    for number in range(100):
        history.observe(request_of(number, model=f"m{number}"), 30)
    assert len(history.bank) <= 2 + 4
    assert history.estimate(request_of(model="m1")).source == "prior"
    assert history.estimate(request_of(model="m99")).source == "history"
    for number in range(PENDING_MAX + 10):
        history.estimate(request_of(number))
    assert len(history._pending) == PENDING_MAX


def test_the_oracle_tells_the_truth_and_noise_spoils_it_by_the_asked_amount() -> None:
    lengths = {f"r{number}": 400 for number in range(2000)}
    true = make_estimator("oracle", lengths=lengths)
    assert true.estimate(request_of(5)).expected_total(0) == 400
    point = make_estimator("oracle", lengths=lengths, noise=0.5, distribution=False, seed=3)
    told = np.log([point.estimate(request_of(number)).expected_total(0) for number in range(2000)])
    assert told.std() == pytest.approx(0.5, rel=0.1)


def test_a_noisy_oracle_is_calibrated_and_tells_less_the_noisier_it_is() -> None:
    rng = np.random.default_rng(1)
    lengths = {f"r{n}": int(np.exp(rng.normal(5.5, 1.0))) + 1 for n in range(2000)}
    errors = []
    for noise in (0.25, 0.5, 2.0):
        spread = make_estimator("oracle", lengths=lengths, noise=noise, seed=3)
        told = [(spread.estimate(request_of(n)), lengths[f"r{n}"]) for n in range(2000)]
        covered = np.mean([e.quantile(0.1) <= true <= e.quantile(0.9) for e, true in told])
        assert covered == pytest.approx(0.8, abs=0.035)
        assert np.mean([e.expected_total(0) - true for e, true in told]) == pytest.approx(0, abs=20)
        errors.append(np.mean([abs(e.quantile(0.5) - true) for e, true in told]))
    assert errors == sorted(errors)


def test_a_header_tells_one_request_and_the_others_get_the_history() -> None:
    header = make_estimator("header")
    header.tell("r1", 64)  # type: ignore[attr-defined]
    assert header.estimate(request_of(1)).expected_total(0) == 64
    assert header.estimate(request_of(2)).source == "prior"
