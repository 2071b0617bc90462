"""How much of an effect is believed."""

import numpy as np
import pytest

from block.length.learn.belief import Prior, Seen, seen

PRIOR = Prior(0.5, 0.3)


def evidence(prompts: int, weight: float, *, answers: int = 1, noise: float = 0.3) -> Seen:
    """What answers to so many prompts say of an effect that holds by ``weight``; those to one prompt are alike."""
    rng = np.random.default_rng(prompts)
    effect = np.repeat(rng.standard_normal(prompts), answers)
    target = weight * effect + np.repeat(noise * rng.standard_normal(prompts), answers)
    return seen(target, effect, np.repeat(np.arange(prompts), answers))


def test_many_prompts_are_believed_and_few_are_not() -> None:
    assert evidence(3000, 0.9).believed(PRIOR, most=1.0) == pytest.approx(0.9, abs=0.05)
    assert evidence(3, 0.0, noise=2.0).believed(PRIOR, most=1.0) == pytest.approx(0.5, abs=0.25)
    assert evidence(1, 3.0).believed(PRIOR, most=1.0) < 0.8


def test_more_answers_to_the_same_prompts_are_no_more_evidence() -> None:
    assert evidence(30, 0.7, answers=20) == pytest.approx(evidence(30, 0.7), abs=1e-6)


def test_what_is_believed_stays_within_its_bounds() -> None:
    assert evidence(1000, 2.0).believed(PRIOR, most=1.0) == 1.0
    assert evidence(1000, -2.0).believed(PRIOR, most=1.0) == 0.0
