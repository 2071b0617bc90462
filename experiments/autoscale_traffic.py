"""Days of traffic for the auto-provisioning experiments: recorded arrivals and lengths on a made daily course.

The recorded trace (Azure LLM inference traces 2023: conversation or code, CC BY 4.0) gives lengths and the pattern of gaps;
a smooth daily course with noise and bursts gives the rate. Time is warped so that the recorded process, made stationary,
runs at that rate: where the recorded requests came in a bunch, they still do. A seed draws the days' noise and bursts and
where in the trace each run begins.
"""

from pathlib import Path

import numpy as np

from block.simulate.provision import Floats, Traffic
from block.workload.chance import generator
from block.workload.trace import read_trace

DAY_S = 86_400.0
GRID_S = 10.0


def recorded(folder: Path, name: str) -> tuple[Floats, np.ndarray, np.ndarray]:
    """A trace on a stationary clock: (n,) times in expected requests, prompt tokens, output tokens."""
    trace = read_trace(folder / f"azure-2023-{name}.csv.gz")
    times_s = np.array([one.arrived_s for one in trace], dtype=float)
    times_s -= times_s[0]
    # A straight line through the rate (conversation doubles in its 39 minutes) is taken out; what is left is the pattern.
    slope, level = np.polyfit(np.arange(len(trace)) / len(trace), np.gradient(_smooth(times_s, len(trace) // 8)), 1)
    gap_s = np.maximum(level + slope * np.arange(len(trace)) / len(trace), 1e-3)
    units = np.cumsum(np.diff(times_s, prepend=0.0) / gap_s)
    units *= len(trace) / units[-1]
    prompts = np.array([one.prompt_tokens for one in trace], np.int32)
    outputs = np.array([max(one.output_tokens, 1) for one in trace], np.int32)
    return units, prompts, outputs


def _smooth(values: Floats, width: int) -> Floats:
    padded = np.concatenate((np.full(width // 2, values[0]), values, np.full(width - width // 2, values[-1])))
    sums = np.cumsum(np.concatenate(([0.0], padded)))
    return (sums[width:] - sums[:-width])[: len(values)] / width


def course(seed: int, days: int, *, bursts: int = 8, later_h: float = 0.0, day_s: float = DAY_S) -> Floats:
    """Relative rate every ``GRID_S`` seconds, the usual peak at 1: night at 0.15, two humps, noise of minutes, bursts."""
    rng = generator(seed, "course")
    t = np.arange(0, days * day_s, GRID_S)
    hour = (t / day_s * 24 - later_h) % 24
    humps = np.exp(-(((hour - 11) / 2.6) ** 2)) + 0.92 * np.exp(-(((hour - 16.5) / 3.2) ** 2))
    rate = 0.15 + 0.85 * np.minimum(humps / 1.02, 1.05)
    rate *= np.repeat(rng.normal(1.0, 0.07, days), len(t) // days)
    rate *= np.exp(0.05 * _wander(rng, len(t), 600.0 / GRID_S))
    for start in rng.integers(0, len(t), bursts * days):
        rate[start : start + int(rng.uniform(120, 600) / GRID_S)] *= rng.uniform(1.3, 2.0)
    return np.maximum(rate, 0.02)


def _wander(rng: np.random.Generator, count: int, steps: float) -> Floats:
    """Noise of unit variance that forgets over ``steps`` points."""
    keep = np.exp(-1.0 / steps)
    noise = rng.normal(0.0, np.sqrt(1 - keep**2), count)
    out = np.empty(count)
    level = 0.0
    for i in range(count):
        level = keep * level + noise[i]
        out[i] = level
    return out


def days(
    folder: Path, name: str, *, peak_rps: float, seed: int, count: int = 1, bursts: int = 8, later_h: float = 0.0
) -> Traffic:
    """``count`` days of traffic whose usual peak is ``peak_rps``, its course ``later_h`` hours later."""
    rate_rps = peak_rps * course(seed, count, bursts=bursts, later_h=later_h)
    expected = np.concatenate(([0.0], np.cumsum(rate_rps * GRID_S)))
    units, prompts, outputs = recorded(folder, name)
    offset = int(generator(seed, f"offset {name}").integers(len(units)))
    rounds = int(expected[-1] / len(units)) + 2
    which = (offset + np.arange(rounds * len(units))) % len(units)
    gaps = np.diff(units, prepend=0.0)[which]
    ticks = np.cumsum(gaps)
    ticks = ticks[ticks < expected[-1]]
    at_s = np.interp(ticks, expected, np.arange(len(expected)) * GRID_S)
    which = which[: len(ticks)]
    return Traffic(at_s, prompts[which], outputs[which])


def mixed(folder: Path, *, peak_rps: float, seed: int, count: int = 1) -> Traffic:
    """Two services on one pool: code in working hours, conversation six hours later, so that the mix drifts."""
    parts = [
        days(folder, "conv", peak_rps=0.7 * peak_rps, seed=seed, count=count, later_h=6.0),
        days(folder, "code", peak_rps=0.3 * peak_rps, seed=seed + 100, count=count),
    ]
    order = np.argsort(np.concatenate([part.at_s for part in parts]), kind="stable")
    return Traffic(
        np.concatenate([part.at_s for part in parts])[order],
        np.concatenate([part.prompts for part in parts])[order], np.concatenate([part.outputs for part in parts])[order],
    )  # fmt: skip
