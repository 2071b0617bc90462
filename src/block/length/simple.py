"""Estimators that look at no text: an oracle for experiments, a constant, the running history of each model."""

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from block.core import Request
from block.length import shapes
from block.length.accuracy import Accuracy
from block.length.distribution import EXACT, DistributionBank, Estimate, Floats
from block.length.grid import BUCKET, BUCKETS, EDGES, TOKENS_MAX

PENDING_MAX = 65_536
"""Estimates remembered until their request finishes; the oldest are forgotten first."""


MODELS_SCORED_MAX = 64
"""Served models whose accuracy is kept apart; the one silent longest is forgotten first."""


READINGS = {
    "block_length_estimates_total": "Estimates of output lengths by where they came from: learned, history, prior ...",
    "block_length_error_tokens": "Mean absolute error of expected output tokens, over some 500 finished requests.",
    "block_length_bias_tokens": "Expected minus true output tokens, over some 500 finished requests.",
    "block_length_coverage_fraction": "Finished requests within their 80 % interval, of some 500.",
}
"""What `Estimator.readings` tells of, by metric."""


class Reading(NamedTuple):
    """One figure for the metrics: a counter where the name ends in ``_total``, else a gauge."""

    name: str
    labels: dict[str, str]
    value: float


class Estimator:
    """What all estimators share: the bank, fixed lengths, the score of what finished. Subclasses say which row.

    ``bank`` answers for whole snapshots; ``sources`` counts the estimates by where they came from; ``accuracy``
    scores the finished ones, ``accuracy_of`` those of each served model. ``estimate`` raises nothing whatever the request holds.
    """

    def __init__(self, bank: DistributionBank | None = None) -> None:
        self.bank = bank or DistributionBank()
        self.accuracy = Accuracy()
        self.accuracy_of: OrderedDict[str, Accuracy] = OrderedDict()
        self.sources: Counter[str] = Counter()
        self._pending: OrderedDict[str, Estimate] = OrderedDict()

    def estimate(self, request: Request) -> Estimate:
        """The distribution of the request's output tokens, cut at its ``max_tokens``."""
        if request.exact_output and request.max_tokens is not None:
            return Estimate(self.bank, EXACT, request.max_tokens, "fixed")
        estimate = self._row_for(request).capped(request.max_tokens)
        if request.id:  # without one it is a question about a request that somebody else sent
            self.sources[estimate.source] += 1
            self._remember(request.id, estimate)
        return estimate

    def observe(self, request: Request, output_tokens: int) -> None:
        """Learn from a finished request: one that the client cut short says nothing and must not come here."""
        if request.exact_output or output_tokens < 1:
            return
        estimate = self._pending.pop(request.id, None)
        if estimate is not None:
            told = estimate.expected_total(0), estimate.quantile(0.1), estimate.quantile(0.9)
            self.accuracy.record(*told, output_tokens)
            self._accuracy_of(request.model).record(*told, output_tokens)
        self._learn(request, output_tokens, estimate)

    def readings(self) -> Iterator[Reading]:
        """What a gateway exports: how many estimates came from where, and each served model's accuracy of late."""
        for source, count in self.sources.items():
            yield Reading("block_length_estimates_total", {"source": source}, float(count))
        for model, accuracy in self.accuracy_of.items():
            for name, value in (
                ("block_length_error_tokens", accuracy.error_tokens),
                ("block_length_bias_tokens", accuracy.bias_tokens),
                ("block_length_coverage_fraction", accuracy.coverage_fraction),
            ):
                if value is not None:
                    yield Reading(name, {"model": model}, value)

    def _row_for(self, request: Request) -> Estimate:
        raise NotImplementedError

    def _learn(self, request: Request, output_tokens: int, estimate: Estimate | None) -> None:
        pass

    def _accuracy_of(self, model: str) -> Accuracy:
        if model not in self.accuracy_of:
            self.accuracy_of[model] = Accuracy()
            if len(self.accuracy_of) > MODELS_SCORED_MAX:
                self.accuracy_of.popitem(last=False)
        self.accuracy_of.move_to_end(model)
        return self.accuracy_of[model]

    def _remember(self, request_id: str, estimate: Estimate) -> None:
        self._pending[request_id] = estimate
        if len(self._pending) > PENDING_MAX:
            self._pending.popitem(last=False)


class ConstantEstimator(Estimator):
    """The same for every request: a log-normal with this mean, or the bare number when ``sigma`` is 0."""

    def __init__(self, *, tokens: float = 330.0, sigma: float = 1.0) -> None:
        super().__init__()
        if tokens < 1 or sigma < 0:
            raise ValueError("tokens must be at least 1 and sigma not negative")
        if sigma == 0:
            self._estimate = Estimate(self.bank, EXACT, round(tokens), "constant")
        else:
            row = self.bank.add(shapes.lognormal(tokens * math.exp(-(sigma**2) / 2), sigma))
            self._estimate = Estimate(self.bank, row, TOKENS_MAX, "constant")

    def _row_for(self, request: Request) -> Estimate:
        return self._estimate


class History:
    """Lengths that one model answered with lately: a histogram that forgets, kept as a row of the bank.

    One observation weighs half as much as one ``half_life`` observations later. The prior counts as
    ``PRIOR_OBSERVATIONS`` of them. The row is rewritten when what came since it was last is a twentieth of the
    history, not at every observation.
    """

    PRIOR_OBSERVATIONS = 8.0
    _RENEWED = 0.05

    def __init__(self, bank: DistributionBank, *, half_life: float = 2000.0) -> None:
        self._bank = bank
        self._prior = -np.diff(shapes.prior()) * self.PRIOR_OBSERVATIONS
        self._counts = np.zeros(BUCKETS)
        self._keep = 0.5 ** (1.0 / half_life)
        self._since = 0.0
        self.row = bank.add(shapes.prior())
        self.observed = 0

    def observe(self, output_tokens: int, *, truncated: bool = False) -> None:
        """Add a finished request's length; of one cut at its ``max_tokens`` only "longer than" is known, so that it
        counts as what is expected of those that are longer."""
        self._counts *= self._keep
        bucket = BUCKET[min(max(output_tokens, 1), TOKENS_MAX) - 1]
        if truncated:
            longer = -np.diff(self._bank.survival(self.row))
            longer[: bucket + 1] = 0.0
            self._counts += longer / max(longer.sum(), 1e-300)
        else:
            self._counts[bucket] += 1.0
        self.observed += 1
        self._since += 1.0
        if self._since >= self._RENEWED * min(self.observed, 1.0 / (1.0 - self._keep)):
            self._bank.replace(self.row, shapes.from_counts(_spread(self._counts) + self._prior))
            self._since = 0.0

    def restart(self) -> None:
        """Forget everything (the row passes to another model)."""
        self._counts[:] = 0.0
        self.observed, self._since = 0, 0.0
        self._bank.replace(self.row, shapes.prior())


class HistoryEstimator(Estimator):
    """Each model's own recent lengths; a model that nobody has seen gets the prior. Bounded: ``models_max``."""

    def __init__(
        self, *, half_life: float = 2000.0, models_max: int = 256, bank: DistributionBank | None = None
    ) -> None:
        super().__init__(bank)
        if half_life <= 0 or models_max < 1:
            raise ValueError("half_life must be positive and models_max at least 1")
        self._half_life, self._models_max = half_life, models_max
        self._prior = Estimate(self.bank, self.bank.add(shapes.prior()), TOKENS_MAX, "prior")
        self._histories: OrderedDict[str, History] = OrderedDict()

    def _row_for(self, request: Request) -> Estimate:
        history = self._histories.get(request.model)
        if history is None or not history.observed:
            return self._prior
        return Estimate(self.bank, history.row, TOKENS_MAX, "history")

    def _learn(self, request: Request, output_tokens: int, estimate: Estimate | None) -> None:
        cut = request.max_tokens is not None and output_tokens >= request.max_tokens
        self._of(request.model).observe(output_tokens, truncated=cut)

    def _of(self, model: str) -> History:
        history = self._histories.get(model)
        if history is None:
            if len(self._histories) >= self._models_max:
                _, history = self._histories.popitem(last=False)  # the model that was silent longest
                history.restart()
            else:
                history = History(self.bank, half_life=self._half_life)
            self._histories[model] = history
        self._histories.move_to_end(model)
        return history


class OracleEstimator(Estimator):
    """True lengths by request id, for experiments: in advance (``lengths``) or one by one (`tell`).

    ``noise``: the told length is the true one times exp(noise * normal), drawn from ``seed``. With ``distribution``
    the estimate is what follows from it (Bayes' rule, the population of ``lengths`` being the prior), as of a
    calibrated estimator of that noise; without it the bare number. A request that nobody told of gets its model's
    history.
    """

    _STEP = 0.02

    def __init__(
        self, *, lengths: Mapping[str, int] | None = None, noise: float = 0.0, distribution: bool = True, seed: int = 0,
        told_max: int = PENDING_MAX,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 0 <= noise < math.inf:
            raise ValueError("noise must not be negative")
        self._lengths = lengths or {}
        self._told: OrderedDict[str, int] = OrderedDict()
        self._told_max = told_max
        self._noise, self._distribution = noise, distribution
        self._rng = np.random.default_rng(seed)
        self._history = HistoryEstimator(bank=self.bank)
        self._steps = np.arange(0, math.log(TOKENS_MAX), self._STEP)
        if noise and distribution:
            self._first = self.bank.extend(_posteriors(self._steps, noise, self._lengths.values()))

    def tell(self, request_id: str, output_tokens: int) -> None:
        """Tell the true length of a request that will come (an experiment's header, say). Bounded: the oldest go."""
        self._told[request_id] = max(1, output_tokens)
        if len(self._told) > self._told_max:
            self._told.popitem(last=False)

    def _row_for(self, request: Request) -> Estimate:
        tokens = self._told.get(request.id) or self._lengths.get(request.id)
        if tokens is None:
            return self._history._row_for(request)
        if not self._noise:
            return Estimate(self.bank, EXACT, tokens, "oracle")
        log_tokens = max(math.log(max(tokens, 1)) + self._noise * self._rng.standard_normal(), 0.0)
        if not self._distribution:
            return Estimate(self.bank, EXACT, round(math.exp(log_tokens)), "oracle")
        place = min(round(log_tokens / self._STEP), len(self._steps) - 1)
        return Estimate(self.bank, self._first + place, TOKENS_MAX, "oracle")

    def _learn(self, request: Request, output_tokens: int, estimate: Estimate | None) -> None:
        self._history._learn(request, output_tokens, estimate)


def _posteriors(told: Floats, noise: float, lengths: Iterable[int]) -> Floats:
    """Rows, (n, edges): lengths given a told log-length of each, (n,), and what lengths there are."""
    counts = np.bincount([BUCKET[min(max(one, 1), TOKENS_MAX) - 1] for one in lengths], minlength=BUCKETS).astype(float)
    prior = (_spread(counts) if counts.any() else -np.diff(shapes.prior())) + 1e-9
    middles = np.log(0.5 * (EDGES[1:] + np.maximum(EDGES[:-1], 0.5)))
    weight = np.exp(-0.5 * ((told[:, None] - middles[None, :]) / noise) ** 2) * prior[None, :] + 1e-300
    return np.array([shapes.from_counts(row) for row in weight])


def _spread(counts: Floats) -> Floats:
    """Let every observation count a little in the buckets beside its own, so that a short history has no holes."""
    padded = np.pad(counts, 2, mode="constant")
    blurred: Floats = np.convolve(padded, np.array([1.0, 2.0, 3.0, 2.0, 1.0]) / 9.0, mode="valid")
    return blurred
