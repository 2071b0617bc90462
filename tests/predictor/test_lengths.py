import random

import pytest

from block.engine.limits import EngineLimits
from block.engine.pipeline import Engine
from block.engine.sequence import Sequence
from block.predict.capture import Recorder
from block.predict.snapshot import MAX_TOKENS, OUTPUT, decode
from block.predictor.lengths import SCENARIOS, LengthHistory, scenarios_of

from .profile import PROFILE


def watched(lengths, history, exact=frozenset(), max_tokens=2000, seed=1):
    """Play requests of these lengths through an engine and let the history watch; returns the last snapshot with requests."""
    rng = random.Random(seed)
    limits = EngineLimits(num_gpu_blocks=100_000)
    engine = Engine(limits, PROFILE.curve(1.0, limits))
    recorder, at_s, busy = Recorder(engine, epoch=seed), 0.0, None
    for key, length in enumerate(lengths, 1):
        at_s += rng.expovariate(50.0)
        engine.add(Sequence(key, 10, max_tokens, length), at_s)
    now_s = 0.0
    while engine.next_event_s() is not None:
        now_s += 0.005
        engine.advance(now_s)
        snapshot = decode(recorder.capture(now_s, exact=exact))
        history.watch(snapshot)
        busy = snapshot if snapshot.running else busy
    history.watch(decode(recorder.capture(now_s)))
    return busy


def test_what_left_is_learned_from():
    history = LengthHistory()
    before = sum(history.scenarios(5000)) / SCENARIOS
    watched([40] * 200, history)
    after = sum(history.scenarios(5000)) / SCENARIOS
    assert history.observed == 200
    assert before > 150
    assert 30 < after < 60


def test_fixed_and_cut_lengths_teach_nothing():
    history = LengthHistory()
    watched([40] * 20, history, exact=set(range(1, 21)))
    watched([40] * 20, history, max_tokens=40, seed=2)
    assert history.observed == 0


def test_a_restart_of_the_engine_is_no_departure():
    history = LengthHistory()
    for epoch in (1, 2):
        engine = Engine(EngineLimits(), PROFILE.curve())
        if epoch == 1:
            engine.add(Sequence(1, 10, 500), 0.0)
            engine.advance(0.1)
        history.watch(decode(Recorder(engine, epoch=epoch).capture(0.1)))
    assert history.observed == 0


def test_expected_totals_lie_between_what_is_there_and_the_bound():
    history = LengthHistory()
    snapshot = watched([300] * 5, history, exact={2}, max_tokens=400)
    totals = history.totals(snapshot)
    assert (totals > snapshot.requests[OUTPUT]).all()
    assert (totals <= snapshot.requests[MAX_TOKENS]).all()
    assert totals.dtype.name == "int32"
    for key, total in zip(snapshot.keys.tolist(), totals.tolist(), strict=True):
        assert (key == 2) <= (total == 400)


@pytest.mark.parametrize(
    ("quantiles", "low", "high"),
    [([(0.5, 100)], 100, 100), ([(0.0, 10), (1.0, 100)], 15, 95), ([(0.1, 5), (0.9, 5)], 5, 5)],
)
def test_quantiles_become_equally_likely_lengths(quantiles, low, high):
    found = scenarios_of(quantiles, 1000)
    assert len(found) == SCENARIOS
    assert (found[0], found[-1]) == (low, high)
    assert max(scenarios_of(quantiles, 20)) <= 20


@pytest.mark.parametrize("quantiles", [[(0.5, 10), (0.5, 20)], [(0.9, 10), (0.1, 20)], [(0.1, 20), (0.9, 10)]])
def test_quantiles_that_do_not_rise_are_refused(quantiles):
    with pytest.raises(ValueError, match="rise"):
        scenarios_of(quantiles, 100)
