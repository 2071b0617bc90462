"""The learned estimator as a gateway runs it: model, then history, then prior; corrected by what finishes."""

import math
from collections import OrderedDict
from pathlib import Path

from block.core import Request
from block.length.distribution import Estimate
from block.length.grid import TOKENS_MAX
from block.length.learn.model import Place, Placer, load_model
from block.length.simple import PENDING_MAX, Estimator, HistoryEstimator

SHIPPED = Path(__file__).parent / "models" / "public-sets.npz"
"""Trained on public sets (docs/length.md names them): a start, before there are logs of one's own."""

DRIFTS_MAX = 1024
"""Served models and clients whose drift is remembered; the one silent longest is forgotten first."""


class Drift:
    """How far lately the log-lengths lie from what was told (``shift``) and how much wider (``widening``, a factor).

    Stochastic quantile tracking: each finished request moves the shift up or down by the side of the told median on
    which it fell, so that it settles where half fall on each side, and the widening so that a fifth ends outside the
    80 % interval (adaptive conformal inference, Gibbs and Candes 2021). The steps shrink as 1/n to a floor, which
    makes the memory some hundred requests.
    """

    __slots__ = ("observed", "shift", "widening")

    STEP = 0.01
    SHIFT_MAX = 2.5
    WIDENING_MAX = 3.0

    def __init__(self) -> None:
        self.shift, self.widening, self.observed = 0.0, 1.0, 0

    def observe(self, side: int, outside: bool | None, scale: float) -> None:
        """Learn from one finished request: the side of its median (-1, 0, 1) and whether it fell outside its 80 %
        interval (``None``: not known, it was cut short)."""
        self.observed += 1
        step = max(self.STEP, 1.0 / (self.observed + 8.0))
        self.shift = min(max(self.shift + 2.0 * step * scale * side, -self.SHIFT_MAX), self.SHIFT_MAX)
        if outside is not None:
            wider = self.widening * math.exp(step * (0.8 if outside else -0.2))
            self.widening = min(max(wider, 1.0 / self.WIDENING_MAX), self.WIDENING_MAX)


def load_placer(path: Path) -> Placer:
    """A model file of ``block length train``, or the folder of a transformer regressor.

    Raises:
        BadInputError, ConfigError: it cannot be used.
    """
    if path.is_dir():
        from block.length.learn.transformer import load_transformer

        return load_transformer(path)
    return load_model(path)


class LearnedEstimator(Estimator):
    """Reads the prompt. A request without text gets its model's history, and before there is any, the prior.

    ``model``: a file of ``block length train``, or a `Placer`; without it the shipped one. ``correct``: whether
    finished requests correct the estimates per served model and per client. Clients are told apart by
    ``Request.client``.

    Raises:
        BadInputError, ConfigError: the model file cannot be used.
    """

    reads_text = True

    def __init__(self, *, model: str | Path | Placer | None = None, correct: bool = True) -> None:
        super().__init__()
        self.model: Placer = load_placer(Path(model or SHIPPED)) if isinstance(model, str | Path | None) else model
        self._first = self.bank.extend(self.model.family.survivals())
        self._history = HistoryEstimator(bank=self.bank)
        self._correct = correct
        self._drifts: OrderedDict[tuple[str, str | None], Drift] = OrderedDict()
        self._scales: OrderedDict[str, float] = OrderedDict()

    def drift_of(self, model: str, client: str | None = None) -> Drift | None:
        """The correction learned so far of a served model, or of one client's requests to it."""
        return self._drifts.get((model, client))

    def _row_for(self, request: Request) -> Estimate:
        if not request.prompt:
            return self._history._row_for(request)
        at = self._corrected(self.model.place(request.prompt, request.max_tokens, request.model), request)
        self._scales[request.id] = at.scale
        if len(self._scales) > PENDING_MAX:
            self._scales.popitem(last=False)
        return Estimate(self.bank, self._first + self.model.family.row(at.location, at.scale), TOKENS_MAX, "learned")

    def _corrected(self, at: Place, request: Request) -> Place:
        if not self._correct:
            return at
        location, scale = at.location, at.scale
        for key in _keys(request):
            drift = self._drifts.get(key)
            if drift is not None:
                location, scale = location + drift.shift, scale * drift.widening
        return Place(location, scale, at.known)

    def _learn(self, request: Request, output_tokens: int, estimate: Estimate | None) -> None:
        self._history._learn(request, output_tokens, estimate)
        scale = self._scales.pop(request.id, None)
        if estimate is None or scale is None or estimate.source != "learned":
            return
        whole = Estimate(self.bank, estimate.row)  # told before the cap
        low, median, high = (whole.quantile(q) for q in (0.1, 0.5, 0.9))
        outside: bool | None = not low <= output_tokens <= high
        side = (output_tokens > median) - (output_tokens < median)
        if request.max_tokens is not None and output_tokens >= request.max_tokens:  # cut: longer than this, is all
            side, outside = max(side, 0), True if output_tokens > high else None
        for key in _keys(request):
            self._drift(key).observe(side, outside if key[1] is None else None, scale)

    def _drift(self, key: tuple[str, str | None]) -> Drift:
        drift = self._drifts.get(key)
        if drift is None:
            drift = self._drifts[key] = Drift()
            if len(self._drifts) > DRIFTS_MAX:
                self._drifts.popitem(last=False)
        self._drifts.move_to_end(key)
        return drift


def _keys(request: Request) -> list[tuple[str, str | None]]:
    served: tuple[str, str | None] = (request.model, None)
    return [served] if request.client is None else [served, (request.model, request.client)]
