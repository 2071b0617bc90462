"""Sweeps on a Ray cluster give what they give here. Skipped without Ray: pip install block-llm[ray]."""

import pytest

from block.errors import ConfigError
from block.simulate import SimulationConfig
from block.simulate.sweep import run_one, runner, varied
from block.workload import WorkloadConfig

CONFIGS = [
    varied(SimulationConfig(workload=WorkloadConfig(rate_rps=5.0, requests=60)), policy=policy, seed=seed)
    for policy in ("round-robin", "block")
    for seed in (1, 2)
]


@pytest.mark.filterwarnings("ignore")
def test_a_sweep_on_a_local_ray_cluster_is_the_sweep_here() -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install block-llm[ray]")
    with runner(1, executor="ray") as run_all:
        assert run_all(CONFIGS) == [run_one(config) for config in CONFIGS]


def test_an_unknown_executor_is_refused_and_a_missing_one_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match="local, ray"), runner(1, executor="slurm"):
        pass
    try:
        import ray  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="pip install"), runner(1, executor="ray"):
            pass
