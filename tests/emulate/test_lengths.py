import statistics

import pytest

from block.emulate.lengths import output_lengths
from block.errors import UserError


def draws(spec, n=20_000, seed=1):
    lengths = output_lengths(spec, seed)
    return [lengths.next() for _ in range(n)]


def test_sharegpt_lengths_have_its_mean_and_a_long_tail():
    drawn = draws("sharegpt")
    assert statistics.mean(drawn) == pytest.approx(326, rel=0.05)
    assert statistics.median(drawn) < 230
    assert min(drawn) >= 1


def test_the_seed_alone_decides_the_lengths():
    assert draws("sharegpt", 50) == draws("sharegpt", 50)
    assert draws("sharegpt", 50) != draws("sharegpt", 50, seed=2)


def test_fixed_lengths_are_fixed():
    assert set(draws("fixed:7", 10)) == {7}


def test_uniform_lengths_stay_inside():
    assert {min(draws("uniform:3,5")), max(draws("uniform:3,5"))} == {3, 5}


def test_a_lognormal_has_the_mean_that_it_is_given():
    assert statistics.mean(draws("lognormal:100,0.5")) == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("spec", ["", "poisson:3", "fixed", "fixed:0", "fixed:a", "uniform:5,3", "uniform:5", "sharegpt:3",
                                  "lognormal:0", "lognormal:1,2,3"])  # fmt: skip
def test_a_length_distribution_that_makes_no_sense_is_refused_in_a_sentence(spec):
    with pytest.raises(UserError, match=r"\.$"):
        output_lengths(spec, 0)
