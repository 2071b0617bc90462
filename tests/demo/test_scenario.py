"""The demo's own cluster, in the simulator: short answers, slots that turn over in fractions of a second."""

from block.demo.scenario import INSTANCES, PROFILE, workload
from block.engine.limits import EngineLimits
from block.simulate import SimulationConfig, simulate
from block.simulate.config import GatewayModel, InstanceGroup, LengthModel


def mean_e2e_s(policy: str) -> float:
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
    seconds = [row.e2e_s for row in simulate(config, workload(66, 14, 0)) if row.e2e_s is not None]
    return sum(seconds) / len(seconds)


def test_block_does_not_hold_back_short_requests_that_the_engines_could_have_run() -> None:
    assert mean_e2e_s("block") < 1.2 * mean_e2e_s("block-paper")
