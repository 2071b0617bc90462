"""A family of distributions by location and scale: where log-lengths lie, how widely, and in what shape.

Length = exp(location + scale * z), z from the shape that belongs to the scale. The shapes are residuals of requests
whose prompts the location had not been fitted to, so the quantiles are calibrated by construction (as in split
conformal prediction).
"""

import msgspec
import numpy as np
from numpy.typing import NDArray

from block.length import shapes
from block.length.distribution import Floats
from block.length.grid import TOKENS_MAX

LOCATION_STEP = 0.05
LOCATIONS: Floats = np.arange(0.0, np.log(TOKENS_MAX), LOCATION_STEP)
_SCALES = 20
_BEYOND = 2.5  # scales reach this far beyond those told in training, for what the online correction widens
_KNOTS = 61
PRIOR_PROMPTS = 100.0


class Family(msgspec.Struct, frozen=True):
    """``scales``: (s,) rising; ``residuals``: (s, knots) rising, in units of the scale; ``above``: (knots,) the share
    of lengths above each knot."""

    scales: Floats
    residuals: Floats
    above: Floats

    def survivals(self) -> Floats:
        """Rows for a bank, (scales * locations, edges): scale by scale, the locations as ``LOCATIONS``."""
        pairs = zip(self.residuals, self.scales, strict=True)
        return np.concatenate([shapes.around(knots * scale, self.above, LOCATIONS) for knots, scale in pairs])

    def row(self, location: float, scale: float) -> int:
        """The row of `survivals` nearest to a location and a scale."""
        nearest = int(np.searchsorted(np.sqrt(self.scales[1:] * self.scales[:-1]), scale))
        place = min(max(round(location / LOCATION_STEP), 0), len(LOCATIONS) - 1)
        return nearest * len(LOCATIONS) + place


def fit_family(
    residual: Floats, scale: Floats, truncated: NDArray[np.bool_], *, prompts: int, prior: Family | None = None
) -> Family:
    """The family of residuals of log-lengths, (n,), told with these scales, (n,); each shape weighs them by how near
    their scale is. A truncated one counts as "longer than" (Kaplan and Meier's estimator). The shape of a ``prior``
    counts as much as `PRIOR_PROMPTS` of the ``prompts`` that the records are of, if its 80 % interval is less than twice
    as wide or narrow as the records' own."""
    low, high = np.quantile(scale, [0.005, 0.995])
    scales = np.geomspace(low / _BEYOND, high * _BEYOND, _SCALES)
    z = residual / scale
    added = np.zeros(len(z))
    knots = None if prior is None else prior.residuals[len(prior.residuals) // 2]
    if knots is not None and 0.5 < _interval(knots) / max(_interval(z), 1e-9) < 2.0:
        middles = 0.5 * (knots[1:] + knots[:-1])
        z, scale = np.concatenate([z, middles]), np.concatenate([scale, np.ones(len(middles))])
        truncated = np.concatenate([truncated, np.zeros(len(middles), dtype=bool)])
        added = np.concatenate([added, np.full(len(middles), PRIOR_PROMPTS / len(middles))])
    known = added == 0
    order = np.argsort(z)
    above = np.linspace(1.0, 0.0, _KNOTS)
    band = max(float(np.log(scale[known]).std()) * 0.5, 0.1)
    rows = []
    for at in scales:
        weight = np.exp(-0.5 * ((np.log(scale) - np.log(np.clip(at, low, high))) / band) ** 2) + 1e-3
        weight = np.where(known, weight / weight[known].sum() * prompts, added)
        weight /= weight.sum()
        survival = _kaplan_meier(weight[order], truncated[order])
        rows.append(np.interp(-above, -survival, z[order]))
    return Family(scales, np.array(rows), above)


def _interval(z: Floats) -> float:
    low, high = np.quantile(z, [0.1, 0.9])
    return float(high - low)


def _kaplan_meier(weight: Floats, truncated: NDArray[np.bool_]) -> Floats:
    """P(Z > z) at sorted, weighted observations, mid-point rule; the truncated only leave the risk set."""
    at_risk = np.cumsum(weight[::-1])[::-1]
    hazard = np.where(truncated, 0.0, weight / at_risk)
    after = np.cumprod(1.0 - np.minimum(hazard, 1.0 - 1e-12))
    before = np.concatenate([[1.0], after[:-1]])
    middle: Floats = 0.5 * (before + after)
    return middle
