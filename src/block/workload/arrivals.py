"""Arrival processes: when do requests come? All return ascending seconds from 0, shape (requests,)."""

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from block.errors import ConfigError

Times = npt.NDArray[np.float64]


def _gaps(rate_rps: float, requests: int) -> None:
    if not rate_rps > 0:
        raise ConfigError(f"The rate must be above 0 requests/s, not {rate_rps}.")
    if requests < 1:
        raise ConfigError(f"A workload needs at least 1 request, not {requests}.")


def poisson(rate_rps: float, requests: int, rng: np.random.Generator) -> Times:
    """Independent exponential gaps."""
    _gaps(rate_rps, requests)
    return np.cumsum(rng.exponential(1.0 / rate_rps, requests))


def gamma(rate_rps: float, requests: int, rng: np.random.Generator, *, gap_cv2: float = 1.0) -> Times:
    """Gamma gaps with the given squared coefficient of variation (shape 1 / gap_cv2; 1 is Poisson, above is bursty)."""
    _gaps(rate_rps, requests)
    if not gap_cv2 > 0:
        raise ConfigError(f"gap_cv2 must be above 0, not {gap_cv2}: for equal gaps use constant arrivals.")
    return np.cumsum(rng.gamma(1.0 / gap_cv2, gap_cv2 / rate_rps, requests))


def constant(rate_rps: float, requests: int, rng: np.random.Generator) -> Times:
    """Equal gaps."""
    _gaps(rate_rps, requests)
    return np.arange(1, requests + 1) / rate_rps


def bursts(
    rate_rps: float,
    requests: int,
    rng: np.random.Generator,
    *,
    on_s: float = 10.0,
    off_s: float = 10.0,
    quiet_fraction: float = 0.0,
) -> Times:
    """Poisson arrivals switched on and off: exponential phases of mean ``on_s`` and ``off_s`` seconds.

    ``quiet_fraction`` is the rate in an off phase over that in an on phase. The mean rate is ``rate_rps``.
    """
    _gaps(rate_rps, requests)
    if not (on_s > 0 and off_s > 0 and 0 <= quiet_fraction <= 1):
        raise ConfigError("Bursts need on_s and off_s above 0 and a quiet_fraction of 0 to 1.")
    # Time is warped: in units of expected arrivals the process is Poisson of rate 1, and each phase passes
    # duration x its rate of them; so draw unit arrivals and map them back through the phases.
    on_rps = rate_rps * (on_s + off_s) / (on_s + quiet_fraction * off_s)
    units = np.cumsum(rng.exponential(1.0, requests))
    phases = 16 + int(4 * units[-1] / (on_rps * on_s))
    edges_s, edges_units = [0.0], [0.0]
    while edges_units[-1] < units[-1]:
        durations_s = rng.exponential(1.0, 2 * phases) * np.tile([on_s, off_s], phases)
        passed = durations_s * np.tile([on_rps, on_rps * quiet_fraction], phases)
        edges_s.extend(edges_s[-1] + np.cumsum(durations_s))
        edges_units.extend(edges_units[-1] + np.cumsum(passed))
    edge = np.searchsorted(edges_units, units, side="left")
    start_s, start_units = np.array(edges_s)[edge - 1], np.array(edges_units)[edge - 1]
    rates = np.where(edge % 2 == 1, on_rps, on_rps * quiet_fraction)
    return np.asarray(start_s + (units - start_units) / rates)


def rescaled(times_s: npt.ArrayLike, rate_rps: float | None, requests: int | None = None) -> Times:
    """Recorded times, moved to start at 0 and stretched to the mean rate asked for (``None``: as recorded).

    Raises:
        ConfigError: fewer than two times, or more requests asked for than recorded.
    """
    times = np.sort(np.asarray(times_s, dtype=float))
    if requests is not None and requests > len(times):
        raise ConfigError(f"The trace has {len(times)} requests, not {requests}.")
    times = times[: requests or len(times)]
    if rate_rps is None:
        return times - times[0] if len(times) else times
    _gaps(rate_rps, len(times))
    if len(times) < 2 or times[-1] <= times[0]:
        raise ConfigError("A trace needs at least two different times to be stretched to a rate.")
    return np.asarray((times - times[0]) * ((len(times) - 1) / rate_rps / (times[-1] - times[0])))


ARRIVALS: Final[dict[str, Callable[..., Times]]] = {
    "poisson": poisson,
    "gamma": gamma,
    "constant": constant,
    "bursts": bursts,
}
