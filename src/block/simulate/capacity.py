"""Capacity: the highest rate at which a criterion still holds, by bracketing, with an interval over seeds.

Common random numbers: a seed gives the same lengths and the same pattern of gaps at every rate and under every policy, so
the metric is nearly monotone in the rate and policies can be compared seed by seed.
"""

import math
import re
from collections.abc import Sequence

import msgspec
import numpy as np

from block.errors import ConfigError
from block.metrics.summary import Summary
from block.simulate.config import SimulationConfig
from block.simulate.sweep import RunAll, varied

_LATENCY = re.compile(r"(ttft|e2e|tpot)_(mean|p50|p90|p99)<=([0-9]*\.?[0-9]+)s?")
_ATTAINMENT = re.compile(r"attainment>=([0-9]*\.?[0-9]+)(%?)")


TOLERANCE_MIN = 1e-4


class Criterion(msgspec.Struct, frozen=True):
    """What must hold: a latency figure at most ``target`` seconds, or SLO attainment at least ``target``."""

    text: str
    field: str
    target: float

    def excess(self, summary: Summary) -> float:
        """Above 0: does not hold; log of the ratio to the target for latencies, so that it can be interpolated."""
        value = getattr(summary, self.field)
        if self.field == "slo_attainment_fraction":
            return self.target - (0.0 if value is None else value)
        if value is None or summary.finished < summary.requests:
            return math.inf  # a policy must not win by losing requests
        return math.log(max(value, 1e-6) / self.target)


def parse_criterion(text: str) -> Criterion:
    """``ttft_p99<=3``, ``e2e_mean<=20``, ``attainment>=99%``.

    Raises:
        ConfigError: something else.
    """
    plain = text.replace(" ", "")
    if match := _LATENCY.fullmatch(plain):
        field = f"{match[1]}_s_{match[2]}"
        if field in Summary.__struct_fields__ and float(match[3]) > 0:
            return Criterion(plain, field, float(match[3]))
    if match := _ATTAINMENT.fullmatch(plain):
        target = float(match[1]) / (100 if match[2] else 1)
        if 0 < target <= 1:
            return Criterion(plain, "slo_attainment_fraction", target)
    raise ConfigError(f"Write a criterion as ttft_p99<=3, e2e_mean<=20 or attainment>=99%, not {text!r}.")


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """Mean over seeds of the highest rate that holds, in requests/s, with its 95 % bootstrap interval."""

    capacity_rps: float
    ci_low: float
    ci_high: float
    criterion: str
    seeds: list[int]
    per_seed: list[float]
    policy: str


def find_capacity(
    config: SimulationConfig, criterion: Criterion, seeds: Sequence[int], run_all: RunAll, *, tolerance: float = 0.01,
    start_rps: float | None = None, first_step: float = 1.08,
) -> Capacity:  # fmt: skip
    """Search every seed at once, until each bracket is narrower than ``tolerance`` of its rate. ``first_step``: how far to
    look from ``start_rps`` first; small where the start is a good guess, for rates beyond capacity take long to simulate.

    Raises:
        ConfigError: attainment without an SLO, a tolerance out of bounds, or the criterion holds nowhere, or everywhere,
            between 1/64 and 64 times the start.
    """
    if not TOLERANCE_MIN <= tolerance < 1:
        raise ConfigError(f"The tolerance must be from {TOLERANCE_MIN:g} to below 1, not {tolerance}.")
    if criterion.field == "slo_attainment_fraction" and config.slo is None:
        raise ConfigError("The criterion is SLO attainment, but the configuration has no [slo].")
    start = start_rps or config.workload.rate_rps or 10.0
    searches = [_Search(criterion.text, start, tolerance, first_step) for _ in seeds]
    while open_now := [i for i, search in enumerate(searches) if not search.done]:
        configs = [varied(config, rate_rps=searches[i].next_rps(), seed=seeds[i]) for i in open_now]
        for i, summary in zip(open_now, run_all(configs), strict=True):
            searches[i].learn(criterion.excess(summary))
    found = [search.capacity_rps() for search in searches]
    low, high = bootstrap_interval(found)
    return Capacity(
        capacity_rps=float(np.mean(found)), ci_low=low, ci_high=high, criterion=criterion.text, seeds=list(seeds),
        per_seed=found, policy=config.policy,
    )  # fmt: skip


def bootstrap_interval(values: Sequence[float], *, resamples: int = 10_000, level: float = 0.95) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean, seeded."""
    array = np.asarray(values, dtype=float)
    picks = np.random.default_rng(0).integers(0, len(array), (resamples, len(array)))
    low, high = np.quantile(array[picks].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class _Search:
    """One seed's bracket: the highest rate known to hold, the lowest known not to."""

    def __init__(self, criterion: str, start_rps: float, tolerance: float, first_step: float) -> None:
        self._criterion = criterion
        self._start_rps, self._tolerance = start_rps, tolerance
        self._holds: tuple[float, float] | None = None
        self._fails: tuple[float, float] | None = None
        self._asked_rps = start_rps
        self._step = first_step

    @property
    def done(self) -> bool:
        if self._holds is None or self._fails is None:
            return False
        return self._fails[0] / self._holds[0] <= 1 + self._tolerance

    def next_rps(self) -> float:
        if self._holds is None and self._fails is None:
            self._asked_rps = self._start_rps
        elif self._holds is None or self._fails is None:
            known = self._holds or self._fails
            assert known is not None
            self._asked_rps = known[0] * self._step if self._fails is None else known[0] / self._step
            self._step = min(self._step**2, 2.0)  # 1.08, 1.17, 1.36, 1.85, 2, 2 ...
            if not 1 / 64 <= self._asked_rps / self._start_rps <= 64:
                found = "still holds" if self._fails is None else "does not hold even"
                raise ConfigError(
                    f"{self._criterion} {found} at {known[0]:.3g} requests/s: give another criterion, more requests or, as the "
                    "workload's rate_rps, a better rate to start from."
                )
        else:
            self._asked_rps = math.sqrt(self._holds[0] * self._fails[0])
        return self._asked_rps

    def learn(self, excess: float) -> None:
        if excess <= 0:
            self._holds = (self._asked_rps, excess)
        else:
            self._fails = (self._asked_rps, excess)

    def capacity_rps(self) -> float:
        """Where the criterion is crossed, interpolated inside the last bracket."""
        assert self._holds is not None
        assert self._fails is not None
        (low, below), (high, above) = self._holds, self._fails
        if not math.isfinite(above):
            return low
        return low + (high - low) * (-below / (above - below))
