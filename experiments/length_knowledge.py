"""What a simulated gateway may know of output lengths, wrapped around the simulation's seams (the experiments of lengths use it).

oracle:NOISE        the true length with log-normal noise, and what follows from it (Bayes' rule); 0 is the truth
number:NOISE        the noisy number itself, raised by ten tokens when it is passed
history, constant   each model's recent lengths; one log-normal for all
learned:FILE        the learned estimator's own errors: FILE holds what it told of prompts that it had not seen (`told`)

An estimator of text cannot be asked about a workload of lengths without texts. ``learned`` therefore gives each simulated
request the distribution that the estimator told for a record of a public set whose true length has about the same rank there
as the request's has in the workload, both scales mapped onto each other by rank. Such a map keeps quantiles, so the
estimates stay as calibrated, as sharp and as wrong as they were.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from block.core import Prediction, Request
from block.length import shapes
from block.length.data.records import Record
from block.length.distribution import FUNCTIONALS, DistributionBank, Estimate, Floats, Ints
from block.length.evaluation.scores import Told
from block.length.grid import EDGES, TOKENS_MAX
from block.length.learn.tabulate import fold_of
from block.length.learn.train import fit
from block.length.simple import Estimator
from block.metrics import Summary, summarize
from block.simulate import SimulationConfig, simulate
from block.simulate import cluster as cluster_module
from block.simulate.config import LengthModel
from block.simulate.gateway import Gateway
from block.workload.offered import Offered


class Knowledge(msgspec.Struct, frozen=True):
    """``lengths`` as the module says; ``functional`` reads a distribution (see `Reader`; "own": as the policy does);
    ``scenarios``: what-ifs asked with so many joint draws of all lengths, averaged (0: asked once)."""

    lengths: str = "oracle:0"
    functional: str = "own"
    scenarios: int = 0


def run(config: SimulationConfig, known: Knowledge) -> Summary:
    """One simulation, the warm-up left out."""
    kind, _, detail = known.lengths.partition(":")
    noisy = {"noise": float(detail or 0)} if kind in ("oracle", "number") else {}
    models = {
        "oracle": LengthModel(options=noisy),
        "number": LengthModel(options={**noisy, "distribution": False}),
        "history": LengthModel(estimator="history"),
        "constant": LengthModel(estimator="constant", options={"tokens": 326.0}),
        "learned": LengthModel(),
    }
    config = msgspec.structs.replace(config, lengths=models[kind])
    made = cluster_module._estimator

    def estimator(config: SimulationConfig, offered: Sequence[Offered]) -> Estimator:
        one = Bootstrapped(Path(detail), offered, config.seed) if kind == "learned" else made(config, offered)
        if known.functional != "own" or known.scenarios:
            one.bank.__class__ = Reader
            one.bank.read_as(known.functional, known.scenarios, config.seed)  # type: ignore[attr-defined]
        return one

    with _replaced("_estimator", estimator), _replaced("Gateway", ScenarioGateway if known.scenarios else Gateway):
        rows = simulate(config)
    return summarize(rows, config.slo, warmup_fraction=config.warmup_fraction)


@contextmanager
def _replaced(name: str, what: Any) -> Iterator[None]:
    before = getattr(cluster_module, name)
    setattr(cluster_module, name, what)
    try:
        yield
    finally:
        setattr(cluster_module, name, before)


class Reader(DistributionBank):
    """Whatever it is asked for, answers with one functional: mean, p30, median, p70, a random draw ("sampled"), or with the
    draws of one scenario after the other.

    The scenarios of one question are a Latin hypercube: of k, every request gets one draw from each k-th of its distribution,
    in random order.
    """

    def read_as(self, functional: str, scenarios: int, seed: int) -> None:
        self._functional, self._scenarios, self._rng = functional, scenarios, np.random.default_rng(seed)
        self._scenario, self._levels, self._own = 0, np.zeros((1, 0)), np.zeros(1)

    def begin(self) -> None:
        """A new question: new draws."""
        self._levels, self._own = np.zeros((self._scenarios, 0)), self._drawn(1)[:, 0]

    def scenario(self, number: int) -> None:
        self._scenario = number

    def expected_totals(self, rows: Ints, generated: Ints, caps: Ints) -> Ints:
        if self._scenarios:
            if self._levels.shape[1] != len(rows):
                self._levels = self._drawn(len(rows))
            return super().quantiles(self._levels[self._scenario], rows, generated, caps)
        if self._functional == "mean":
            return super().expected_totals(rows, generated, caps)
        level = FUNCTIONALS[self._functional]  # type: ignore[index]
        return super().quantiles(self._rng.random(len(rows)) if level is None else level, rows, generated, caps)

    def quantiles(self, q: float | Floats, rows: Ints, generated: Ints, caps: Ints) -> Ints:
        return self.expected_totals(rows, generated, caps)

    def expected_total(self, row: int, generated: int, cap: int) -> float:
        if self._scenarios:
            return self.quantile(float(self._own[self._scenario]), row, generated, cap)
        one = (np.array([row], np.int32), np.array([generated], np.int32), np.array([cap], np.int32))
        return float(self.expected_totals(*one)[0])

    def _drawn(self, count: int) -> Floats:
        draws = self._rng.random((self._scenarios, count))
        levels: Floats = (np.argsort(draws, axis=0) + self._rng.random(draws.shape)) / self._scenarios
        return levels


class ScenarioGateway(Gateway):
    """Asks the what-if once a scenario and averages what comes of them."""

    def _predict(self, *question: Any) -> list[Prediction]:
        bank: Any = self._bank
        bank.begin()
        answers = []
        for number in range(bank._scenarios):
            bank.scenario(number)
            answers.append(super()._predict(*question))
        return [_mean(some) for some in zip(*answers, strict=True)]


def _mean(predictions: Sequence[Prediction]) -> Prediction:
    fields = {
        name: float(np.mean([getattr(one, name) for one in predictions]))
        for name in ("ttft_s", "e2e_s", "queue_delay_s", "preemptions", "harm_s", "tpot_s")
        if all(getattr(one, name) is not None for one in predictions)
    }
    return msgspec.structs.replace(predictions[0], **fields, truncated=any(one.truncated for one in predictions))


class Bootstrapped(Estimator):
    """The learned estimator's answers, dealt to requests without text by the rank of their true length."""

    def __init__(self, file: Path, offered: Sequence[Offered], seed: int) -> None:
        super().__init__()
        with np.load(file) as arrays:
            true, told = arrays["true"], arrays["survivals"]
        rng = np.random.default_rng([seed, 77])
        order = np.argsort(true + rng.random(len(true)), kind="stable")  # equal lengths in random order
        lengths = np.array([one.output_tokens for one in offered], float)
        ranks = (np.argsort(np.argsort(lengths + rng.random(len(lengths)))) + rng.random(len(lengths))) / len(lengths)
        near = ranks * len(true) + rng.normal(0.0, 0.003 * len(true), len(ranks))
        dealt = order[np.clip(near.astype(int), 0, len(true) - 1)]
        mapped = shapes.finished(
            _mapped(told, true, lengths), shapes.lognormal(float(np.median(lengths)), shapes.TAIL_SIGMA)
        )
        first = self.bank.extend(mapped)
        self._row_of = {one.request.id: first + int(d) for one, d in zip(offered, dealt, strict=True)}

    def _row_for(self, request: Request) -> Estimate:
        return Estimate(self.bank, self._row_of[request.id], TOKENS_MAX, "learned")


def _mapped(told: Floats, true: Floats, lengths: Floats) -> Floats:
    """Survival functions over one population's lengths as those over another's, rank for rank. (n, edges) both."""
    shares = (np.arange(len(true)) + 0.5) / len(true)
    ours = np.sort(lengths)
    shares_ours = (np.arange(len(ours)) + 0.5) / len(ours)
    shortest, longest = ours[0], ours[-1]
    rank = np.interp(EDGES, ours, shares_ours, left=0.0, right=1.0)
    there = np.interp(rank, shares, np.sort(true), left=0.0, right=float(true.max()))
    there = np.where((longest < EDGES) | (shortest > EDGES), there * EDGES / np.clip(EDGES, shortest, longest), there)
    return np.array([np.interp(there, EDGES, one) for one in told])


def told_out_of_fold(records: Sequence[Record], folds: int = 5) -> tuple[Floats, Floats]:
    """(true lengths, (n,); survival functions told by models that had not seen the prompt, (n, edges))."""
    fold = np.array([fold_of(r.text, folds) for r in records])
    told = np.zeros((len(records), len(EDGES)))
    for k in range(folds):
        model = fit([r for r, f in zip(records, fold, strict=True) if f != k])
        rows = model.family.survivals()
        for i in np.flatnonzero(fold == k):
            record = records[int(i)]
            at = model.place(record.text, record.max_tokens, record.model)
            told[i] = rows[model.family.row(at.location, at.scale)]
    return np.array([float(r.output_tokens) for r in records]), told


def error_figures(file: Path, offered: Sequence[Offered]) -> dict[str, float]:
    """How wrong the dealt estimates are over a workload: against the constant median; coverage of the 80 % interval."""
    estimator = Bootstrapped(file, offered, 1)
    true = np.array([one.output_tokens for one in offered], float)
    estimates = [estimator.estimate(one.request) for one in offered]
    told: Told = np.array([[e.quantile(q) for q in (0.1, 0.5, 0.9)] for e in estimates])
    mae, constant = np.abs(told[:, 1] - true).mean(), np.abs(np.median(true) - true).mean()
    inside = ((true >= told[:, 0]) & (true <= told[:, 2])).mean()
    return {"mae_tokens": float(mae), "against_median": float(mae / constant - 1), "coverage": float(inside)}
