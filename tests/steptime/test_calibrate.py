"""A running engine corrects its profile: slowly, boundedly, and not because of a pause."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from block.engine.limits import EngineLimits
from block.engine.pipeline import Engine
from block.engine.sequence import Sequence
from block.predict.capture import Recorder
from block.predict.snapshot import decode
from block.steptime.calibrate import LEAST, MOST, Calibration
from block.steptime.profile import load_profile

from .emulated import LIMITS, known_profile, steps_of

SEEN_AT_ONCE = 16


def shown(steps: np.ndarray, limits: EngineLimits = LIMITS, epoch: int = 1, shared_tokens: int = 0) -> SimpleNamespace:
    """What the calibration looks at of a snapshot."""
    return SimpleNamespace(steps=steps, limits=limits, epoch=epoch, shared_tokens=shared_tokens)


def fed(calibration: Calibration, steps: np.ndarray, every: int = 4) -> list[float]:
    """Show the calibration overlapping snapshots of a step log; the scale after each."""
    scales = []
    for end in range(every, len(steps) + 1, every):
        rows = steps[max(0, end - SEEN_AT_ONCE) : end]
        calibration.observe(shown(rows))
        scales.append(calibration.scale)
    return scales


def noisy(steps: np.ndarray, rng: np.random.Generator, pauses: float = 0.003) -> np.ndarray:
    """The same steps, each up to some per cent off, and a pause of a tenth of a second now and then."""
    took = np.diff(steps["finished_s"], prepend=steps["scheduled_s"][0]) * rng.lognormal(0, 0.05, len(steps))
    took += 0.1 * (rng.random(len(steps)) < pauses)
    moved = steps.copy()
    moved["finished_s"] = steps["scheduled_s"][0] + np.cumsum(took)
    moved["scheduled_s"] += moved["finished_s"] - steps["finished_s"]
    return moved


@pytest.mark.parametrize("truth", [0.8, 1.0, 1.2])
def test_a_profile_that_is_off_is_corrected_within_a_few_hundred_steps(truth):
    scales = fed(Calibration(known_profile()), steps_of(known_profile(), scale=truth, requests=80))
    assert scales[400 // 4] == pytest.approx(truth, rel=0.01)
    assert scales[-1] == pytest.approx(truth, rel=0.005)


def test_noise_and_pauses_move_it_little():
    steps = noisy(steps_of(known_profile(), scale=1.2, requests=150), np.random.default_rng(7))
    scales = np.array(fed(Calibration(known_profile()), steps))
    assert np.median(scales[150:]) == pytest.approx(1.2, rel=0.02)
    assert np.abs(scales[150:] / 1.2 - 1).max() < 0.06


def test_it_moves_slowly():
    scales = fed(Calibration(known_profile()), steps_of(known_profile(), scale=1.9, requests=80))
    assert max(b / a for a, b in pairwise(scales)) <= 1.05 + 1e-9


@pytest.mark.parametrize(("truth", "bound"), [(5.0, MOST), (0.1, LEAST)])
def test_it_is_bounded(truth, bound):
    scales = fed(Calibration(known_profile()), steps_of(known_profile(), scale=truth, requests=60))
    assert min(scales) >= LEAST
    assert max(scales) <= MOST
    assert scales[-1] == pytest.approx(bound, rel=0.05)


def test_the_same_steps_shown_again_count_once():
    steps = steps_of(known_profile(), scale=1.2, requests=40)[:200]
    once, often = Calibration(known_profile()), Calibration(known_profile())
    fed(once, steps)
    for end in range(4, len(steps) + 1, 4):
        for _ in range(3):
            often.observe(shown(steps[max(0, end - SEEN_AT_ONCE) : end]))
    assert often.scale == once.scale
    assert often.state.windows == once.state.windows


def test_steps_that_went_by_unseen_are_not_counted_as_slowness():
    steps = steps_of(known_profile(), requests=150)
    calibration = Calibration(known_profile())
    for end in range(SEEN_AT_ONCE, len(steps), 3 * SEEN_AT_ONCE):  # two of three rows are never shown
        calibration.observe(shown(steps[end - SEEN_AT_ONCE : end]))
    assert calibration.scale == pytest.approx(1.0, rel=1e-6)


def test_a_restarted_engine_begins_a_new_window_and_keeps_the_scale():
    calibration = Calibration(known_profile())
    steps = steps_of(known_profile(), scale=1.2, requests=80)
    fed(calibration, steps)
    before = calibration.scale
    again = steps[:8].copy()
    calibration.observe(shown(again, EngineLimits(), epoch=2))
    assert calibration.scale == before


def test_its_state_says_how_far_off_the_last_windows_are():
    calibration = Calibration(known_profile())
    assert calibration.state.error_fraction is None
    fed(calibration, steps_of(known_profile(), scale=1.2, requests=80))
    assert abs(calibration.state.error_fraction) < 0.01


def test_steps_that_are_fast_because_requests_share_context_are_not_taken_for_a_fast_engine():
    profile = load_profile("h200-llama3.1-8b")
    limits = EngineLimits(enable_prefix_caching=True)
    engine = Engine(limits, profile.curve(limits=limits))
    for i in range(30):
        engine.add(Sequence(i, 2000, 400, block_keys=[("common", block) for block in range(120)]), 0.05 * i)
    recorder, calibration = Recorder(engine), Calibration(profile)
    for tick in range(200):
        engine.advance(0.02 * tick)
        calibration.observe(decode(recorder.capture(0.02 * tick)))
    assert calibration.state.windows > 10
    assert calibration.scale == pytest.approx(1.0, abs=0.01)
