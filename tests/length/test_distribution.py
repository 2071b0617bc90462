"""Laws of the length distributions: what is left of a request that goes on."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from block.length import shapes
from block.length.distribution import EXACT, OUTLIVED_TOKENS, DistributionBank, Estimate
from block.length.grid import BUCKET, BUCKETS, EDGES, TOKENS_MAX

medians = st.floats(1.0, 20_000.0)
sigmas = st.floats(0.05, 2.0)
tokens = st.integers(0, 2 * TOKENS_MAX)


def estimate_of(median: float, sigma: float) -> Estimate:
    bank = DistributionBank()
    return Estimate(bank, bank.add(shapes.lognormal(median, sigma)))


def arrays(*columns: list[int]) -> list[np.ndarray]:
    return [np.array(column, dtype=np.int32) for column in columns]


def test_every_token_count_has_the_bucket_that_contains_it() -> None:
    x = np.arange(TOKENS_MAX)
    assert (EDGES[BUCKET] <= x).all()
    assert (x < EDGES[BUCKET.astype(int) + 1]).all()


def test_the_conditional_mean_is_that_of_the_samples_that_outlive() -> None:
    rng = np.random.default_rng(1)
    lengths = np.ceil(np.exp(rng.normal(np.log(200), 0.8, 400_000)))
    estimate = estimate_of(200, 0.8)
    for generated in (0, 50, 400, 1500):
        left = lengths[lengths > generated]
        assert estimate.expected_total(generated) == pytest.approx(left.mean(), rel=0.03)
        assert estimate.quantile(0.7, generated) == pytest.approx(np.quantile(left, 0.7), rel=0.03)
        assert estimate.capped(600).expected_total(min(generated, 599)) == pytest.approx(
            np.minimum(lengths[lengths > min(generated, 599)], 600).mean(), rel=0.03
        )


@given(medians, sigmas, tokens)
def test_the_expected_total_lies_above_what_was_generated_even_far_in_the_tail(
    median: float, sigma: float, generated: int
) -> None:
    estimate = estimate_of(median, sigma)
    expected = estimate.expected_total(generated)
    assert np.isfinite(expected)
    assert expected >= generated + 1


@given(medians, sigmas, st.lists(st.integers(0, TOKENS_MAX - 1), min_size=2, max_size=6))
def test_outliving_more_never_lowers_the_expected_total(median: float, sigma: float, generated: list[int]) -> None:
    estimate = estimate_of(median, sigma)
    totals = [estimate.expected_total(g) for g in sorted(generated)]
    assert all(later >= earlier - 1e-6 * earlier for earlier, later in itertools.pairwise(totals))


@given(medians, sigmas, st.integers(0, 30_000), st.integers(1, 60_000))
def test_a_cap_bounds_the_estimate_and_a_larger_cap_never_lowers_it(
    median: float, sigma: float, generated: int, cap: int
) -> None:
    estimate = estimate_of(median, sigma)
    capped = estimate.capped(cap)
    assert capped.expected_total(generated) <= max(cap, generated + 1) + 1e-9
    assert capped.expected_total(generated) <= estimate.capped(2 * cap).expected_total(generated) + 1e-6
    assert capped.quantile(0.99, generated) <= max(cap, generated + 1)
    assert estimate.capped(cap, 10).cap == min(cap, 10)


@given(medians, sigmas, st.integers(0, 10_000), st.floats(0.01, 0.98))
def test_quantiles_rise_and_agree_with_the_conditional_probability(
    median: float, sigma: float, generated: int, q: float
) -> None:
    estimate = estimate_of(median, sigma)
    low, high = estimate.quantile(q, generated), estimate.quantile(q + 0.01, generated)
    assert generated < low <= high
    above_low, above_generated = estimate.bank.above(estimate.row, np.array([int(low), generated]))
    assert 1 - above_low / above_generated >= q - 1e-6


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 300_000), st.integers(1, TOKENS_MAX)), min_size=1, max_size=20)
)
def test_all_requests_at_once_get_what_each_gets_alone(requests: list[tuple[int, int, int]]) -> None:
    bank = DistributionBank()
    for median, sigma in ((20, 0.4), (300, 0.9), (4000, 0.2)):
        bank.add(shapes.lognormal(median, sigma))
    rows, generated, caps = arrays(*map(list, zip(*requests, strict=True)))
    together = bank.expected_totals(rows, generated, caps)
    alone = [Estimate(bank, row, cap).expected_total(g) for row, g, cap in requests]
    assert together.dtype == np.int32
    np.testing.assert_allclose(together, alone, atol=0.51, rtol=1e-9)
    medians = bank.totals("median", rows, generated, caps)
    assert medians.tolist() == [Estimate(bank, row, cap).quantile(0.5, g) for row, g, cap in requests]


def test_sampled_totals_follow_the_distribution() -> None:
    bank = DistributionBank()
    row = bank.add(shapes.lognormal(100, 0.5))
    rows, generated, caps = arrays([row] * 5000, [80] * 5000, [100_000] * 5000)
    drawn = bank.totals("sampled", rows, generated, caps, np.random.default_rng(0))
    assert drawn.mean() == pytest.approx(bank.expected_total(row, 80, 100_000), rel=0.05)


def test_a_known_length_is_itself_and_is_raised_a_little_when_it_is_passed() -> None:
    bank = DistributionBank()
    known = Estimate(bank, EXACT, 120)
    assert known.expected_total(0) == known.expected_total(119) == known.quantile(0.1) == 120
    assert known.expected_total(120) == 120 + OUTLIVED_TOKENS


def test_a_request_that_outlives_all_that_was_seen_is_estimated_from_a_tail_that_goes_on() -> None:
    bank = DistributionBank()
    counts = np.zeros(BUCKETS)
    counts[BUCKET[99]] = 1000.0
    seen = Estimate(bank, bank.add(shapes.from_counts(counts)))
    assert seen.quantile(0.5) == pytest.approx(100, rel=0.1)
    assert 510 < seen.expected_total(500) < 5000
