"""Many simulations at once, on all cores: each is a function of its configuration, so any process may run it."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from os import cpu_count

import msgspec

from block.metrics.summary import Summary, summarize
from block.simulate.cluster import simulate
from block.simulate.config import SimulationConfig

RunAll = Callable[[Sequence[SimulationConfig]], list[Summary]]


def run_one(config: SimulationConfig) -> Summary:
    """Simulate and sum up, the warm-up left out."""
    return summarize(simulate(config), config.slo, warmup_fraction=config.warmup_fraction)


def varied(
    config: SimulationConfig, *, policy: str | None = None, rate_rps: float | None = None, seed: int | None = None
) -> SimulationConfig:
    """The same experiment with another policy, rate or seed."""
    workload = config.workload
    if rate_rps is not None:
        workload = msgspec.structs.replace(workload, rate_rps=rate_rps)
    return msgspec.structs.replace(
        config, workload=workload, policy=policy or config.policy, seed=config.seed if seed is None else seed
    )


@contextmanager
def runner(jobs: int | None = None, on_done: Callable[[Summary], None] | None = None) -> Iterator[RunAll]:
    """A function that runs a list of configurations on ``jobs`` processes (``None``: one a core) and keeps their order."""
    jobs = jobs or cpu_count() or 1

    def note(summary: Summary) -> Summary:
        if on_done is not None:
            on_done(summary)
        return summary

    if jobs == 1:
        yield lambda configs: [note(run_one(config)) for config in configs]
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        try:
            yield lambda configs: [note(summary) for summary in pool.map(run_one, configs)]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
