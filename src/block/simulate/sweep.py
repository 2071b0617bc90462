"""Many simulations at once, on all cores or on a Ray cluster: each is a function of its configuration, so any process may
run it."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from os import cpu_count, environ
from typing import Any

import msgspec

from block.errors import ConfigError
from block.metrics.summary import Summary, summarize
from block.simulate.cluster import simulate
from block.simulate.config import SimulationConfig

EXECUTORS = ("local", "ray")
RunAll = Callable[[Sequence[SimulationConfig]], list[Summary]]


def run_one(config: SimulationConfig) -> Summary:
    """Simulate and sum up, the warm-up left out."""
    return summarize(simulate(config), config.slo, warmup_fraction=config.warmup_fraction)


def varied(
    config: SimulationConfig, *, policy: str | None = None, rate_rps: float | None = None, seed: int | None = None,
    requests: int | None = None,
) -> SimulationConfig:  # fmt: skip
    """The same experiment with another policy, rate, seed or number of requests."""
    workload = config.workload
    if rate_rps is not None:
        workload = msgspec.structs.replace(workload, rate_rps=rate_rps)
    if requests is not None:
        workload = msgspec.structs.replace(workload, requests=requests)
    return msgspec.structs.replace(
        config, workload=workload, policy=policy or config.policy, seed=config.seed if seed is None else seed
    )


@contextmanager
def runner(
    jobs: int | None = None, on_done: Callable[[Summary], None] | None = None, executor: str = "local"
) -> Iterator[RunAll]:
    """A function that runs a list of configurations on ``jobs`` processes (``None``: one a core) and keeps their order.

    ``executor``: ``local`` or ``ray``: the cluster that ``RAY_ADDRESS`` names, else one started here for as long.

    Raises:
        ConfigError: another executor, or Ray is not installed.
    """
    if executor not in EXECUTORS:
        raise ConfigError(f"There is no executor {executor!r}: there are {', '.join(EXECUTORS)}.")
    jobs = jobs or cpu_count() or 1

    def note(summary: Summary) -> Summary:
        if on_done is not None:
            on_done(summary)
        return summary

    if executor == "ray":
        with _ray(jobs) as ray:
            yield lambda configs: [note(summary) for summary in _on_ray(ray, configs)]
        return
    if jobs == 1:
        yield lambda configs: [note(run_one(config)) for config in configs]
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        try:
            yield lambda configs: [note(summary) for summary in pool.map(run_one, configs)]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _ray(jobs: int) -> Iterator[Any]:
    """Ray, connected to a cluster; what was started here is stopped."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError("The executor ray needs Ray: pip install block-llm[ray].") from error
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {} if "RAY_ADDRESS" in environ else {"num_cpus": jobs, "include_dashboard": False}
    ray.init(logging_level="ERROR", log_to_driver=False, **options)
    try:
        yield ray
    finally:
        ray.shutdown()


def _on_ray(ray: Any, configs: Sequence[SimulationConfig]) -> Iterator[Summary]:
    """Summaries in the order of ``configs``, each a task of one core. Configurations travel as JSON."""
    task = ray.remote(num_cpus=1)(_run_encoded)
    for answer in [task.remote(msgspec.json.encode(config)) for config in configs]:
        yield msgspec.json.decode(ray.get(answer), type=Summary)


def _run_encoded(config: bytes) -> bytes:
    return msgspec.json.encode(run_one(msgspec.json.decode(config, type=SimulationConfig)))
