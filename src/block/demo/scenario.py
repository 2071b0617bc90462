"""What the demo runs: four instances that no counter can compare, and a load near what they can bear."""

from typing import Final

import msgspec

from block.engine.limits import EngineLimits
from block.simulate.config import GatewayModel, InstanceGroup, LengthModel, SimulationConfig
from block.workload.offer import WorkloadConfig, offer
from block.workload.offered import Offered

MODEL: Final = "demo"
PROFILE: Final = "h200-llama2-7b"
POLICIES: Final = ("round-robin", "least-outstanding", "llumnix-minus", "block")
SHORTEN: Final = 4  # answers are a quarter of ShareGPT's, so that a run settles within seconds


class Kind(msgspec.Struct, frozen=True):
    """One emulated instance: its speed against the profile and its limits."""

    speed: float
    kv_blocks: int
    batch: int = 16

    def flags(self) -> list[str]:
        """The flags of ``block emulate``."""
        return [
            "--profile", PROFILE, "--speed", str(self.speed), "--num-gpu-blocks", str(self.kv_blocks),
            "--max-num-seqs", str(self.batch), "--max-num-batched-tokens", "512", "--max-model-len", "2304",
        ]  # fmt: skip


INSTANCES: Final = (Kind(1.0, 512), Kind(1.0, 192), Kind(0.5, 512), Kind(0.5, 192))


def workload(rate_rps: float, seconds: float, seed: int) -> list[Offered]:
    """Poisson arrivals with ShareGPT's joint lengths, the answers shortened. The same for every policy."""
    config = WorkloadConfig(
        rate_rps=rate_rps, requests=max(1, int(rate_rps * seconds)), model=MODEL, total_tokens_max=1500, max_tokens=600
    )
    return [
        msgspec.structs.replace(one, output_tokens=max(1, one.output_tokens // SHORTEN)) for one in offer(config, seed)
    ]


def simulated(policy: str) -> SimulationConfig:
    """The same instances for the simulator, seen as the demo's gateway sees them: snapshots, lengths from history."""
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
    return SimulationConfig(
        policy=policy,
        instances=groups,
        lengths=LengthModel(estimator="history"),
        gateways=GatewayModel(snapshot_interval_s=0.02),
    )
