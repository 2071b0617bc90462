"""The demo's own cluster, in the simulator: short answers, slots that turn over in fractions of a second."""

from functools import cache

import pytest

from block.demo.scenario import simulated, workload
from block.metrics.summary import Summary, summarize
from block.simulate import simulate


@cache
def figures(policy: str) -> Summary:
    return summarize(simulate(simulated(policy), workload(66, 14, 0)))


@pytest.mark.parametrize(
    "baseline", ["least-outstanding", "llumnix-minus", "lmetric", "token-load", "nosim", "block-paper"]
)
def test_where_lengths_are_hardly_known_block_starts_and_ends_requests_sooner_than_any_baseline(baseline: str) -> None:
    ours, theirs = figures("block"), figures(baseline)
    for name in ("ttft_s_mean", "ttft_s_p99", "e2e_s_mean"):
        assert getattr(ours, name) < getattr(theirs, name)
