"""The demo's own cluster, in the simulator: short answers, slots that turn over in fractions of a second."""

from functools import cache

import pytest

from block.demo.scenario import INSTANCES, PROFILE, workload
from block.engine.limits import EngineLimits
from block.metrics.summary import Summary, summarize
from block.simulate import SimulationConfig, simulate
from block.simulate.config import GatewayModel, InstanceGroup, LengthModel


@cache
def figures(policy: str) -> Summary:
    groups = [
        InstanceGroup(
            profile=PROFILE,
            speed=kind.speed,
            limits=EngineLimits(
                num_gpu_blocks=kind.kv_blocks,
                max_num_seqs=kind.batch,
                max_num_batched_tokens=512,
                max_model_len=2304,
            ),
        )
        for kind in INSTANCES
    ]
    config = SimulationConfig(
        policy=policy,
        instances=groups,
        lengths=LengthModel(estimator="history"),
        gateways=GatewayModel(snapshot_interval_s=0.02),
    )
    return summarize(simulate(config, workload(66, 14, 0)))


@pytest.mark.parametrize(
    "baseline", ["least-outstanding", "llumnix-minus", "lmetric", "token-load", "nosim", "block-paper"]
)
def test_where_lengths_are_hardly_known_block_starts_and_ends_requests_sooner_than_any_baseline(baseline: str) -> None:
    ours, theirs = figures("block"), figures(baseline)
    for name in ("ttft_s_mean", "ttft_s_p99", "e2e_s_mean"):
        assert getattr(ours, name) < getattr(theirs, name)
