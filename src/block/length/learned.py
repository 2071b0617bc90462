"""The learned estimator as a gateway runs it: model, then history, then prior; corrected by what finishes."""

import math
from collections import OrderedDict
from pathlib import Path

from block.core import Request
from block.length.distribution import Estimate
from block.length.features import features_of
from block.length.grid import TOKENS_MAX
from block.length.model import LengthModel, Place, load_model
from block.length.simple import PENDING_MAX, Estimator, HistoryEstimator

DRIFTS_MAX = 1024
"""Served models and clients whose drift is remembered; the one silent longest is forgotten first."""

PROMPTLESS_MAX_CHARS = 0


class Drift:
    """How far lately the log-lengths lie from what was told (``shift``) and how much wider (``widening``, a factor).

    Stochastic quantile tracking: each finished request moves the shift by a step up or down by which side of the
    told median it fell (so the shift settles where half fall on each side), and the widening so that a fifth ends
    outside the 80 % interval (adaptive conformal inference, Gibbs and Candes 2021). Steps shrink as 1/n to a floor:
    a constant memory of some hundred requests.
    """

    __slots__ = ("observed", "shift", "widening")

    STEP = 0.02
    SHIFT_MAX = 2.5
    WIDENING_MAX = 3.0

    def __init__(self) -> None:
        self.shift, self.widening, self.observed = 0.0, 1.0, 0

    def observe(self, above_median: bool, outside: bool, scale: float) -> None:
        """Learn from one finished request: on which side of its median, and whether outside its 80 % interval."""
        self.observed += 1
        step = max(self.STEP, 1.0 / (self.observed + 8.0))
        moved = self.shift + step * 2.0 * scale * (0.5 if above_median else -0.5) * 2.0
        self.shift = min(max(moved, -self.SHIFT_MAX), self.SHIFT_MAX)
        wider = self.widening * math.exp(step * (0.8 if outside else -0.2))
        self.widening = min(max(wider, 1.0 / self.WIDENING_MAX), self.WIDENING_MAX)
