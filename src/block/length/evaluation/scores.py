"""How good length estimates are, on prompts that they have not seen, against baselines and the noise floor.

Protocol: folds by normalised prompt. Every estimator, the baselines too, sees the other folds of the same records
and is scored on the fold left out. The point estimate is the median (it minimises the absolute error).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from block.core import Request
from block.errors import BadInputError
from block.length.data.records import Record
from block.length.distribution import DistributionBank, Floats
from block.length.grid import TOKENS_MAX
from block.length.learn.model import LengthModel, Place, Placer
from block.length.learn.tabulate import fold_of
from block.length.learn.train import fit
from block.length.learned import LearnedEstimator
from block.length.simple import HistoryEstimator

QUANTILES = (0.1, 0.5, 0.9)
Told = NDArray[np.float64]
"""Quantiles told for n records, (n, 3): 10, 50 and 90 %."""

HINTS_MIN = 20
"""Records of a served model whose prompt has other answers, for `hindsight` to say something."""

Teller = Callable[[Sequence[Record]], Told]


class Score(msgspec.Struct, frozen=True):
    """Scores over n records; lengths in tokens."""

    records: int
    mean_tokens: float
    mae_tokens: float
    mae_over_mean: float
    median_relative_error: float
    pinball_tokens: float
    pinball_10: float
    pinball_50: float
    pinball_90: float
    coverage_80_fraction: float
    rank_correlation: float | None


def score(told: Told, true: Floats) -> Score:
    """Scores of quantiles told for n records, shape (n, 3), against their true lengths, (n,)."""
    from scipy.stats import spearmanr

    error = np.abs(told[:, 1] - true)
    pinball = [_pinball(q, true, told[:, i]) for i, q in enumerate(QUANTILES)]
    varied = len(true) > 2 and np.ptp(told[:, 1]) > 0 and np.ptp(true) > 0
    return Score(
        records=len(true),
        mean_tokens=float(true.mean()),
        mae_tokens=float(error.mean()),
        mae_over_mean=float(error.mean() / true.mean()),
        median_relative_error=float(np.median(error / true)),
        pinball_tokens=float(np.mean(pinball)),
        pinball_10=pinball[0],
        pinball_50=pinball[1],
        pinball_90=pinball[2],
        coverage_80_fraction=float(((true >= told[:, 0]) & (true <= told[:, 2])).mean()),
        rank_correlation=float(spearmanr(told[:, 1], true).statistic) if varied else None,
    )


def _pinball(q: float, true: Floats, told: Floats) -> float:
    over = true - told
    return float(np.maximum(q * over, (q - 1.0) * over).mean())


def tell_learned(model: Placer) -> Teller:
    """Quantiles of a trained model, before any online correction."""
    bank = DistributionBank()
    first = bank.extend(model.family.survivals())

    def tell(records: Sequence[Record]) -> Told:
        places = [_place(model, r) for r in records]
        rows = np.array([first + model.family.row(at.location, at.scale) for at in places], dtype=np.int32)
        return _asked(bank, rows, records)

    return tell


def _place(model: Placer, record: Record) -> Place:
    if record.features is not None and isinstance(model, LengthModel):
        return model.place_features(record.features, record.text, record.model)
    return model.place(record.text, record.max_tokens, record.model)


def tell_corrected(model: Placer, train: Sequence[Record]) -> Teller:
    """The same model in service: after it has told, and learned of, every training record once."""
    estimator = LearnedEstimator(model=model)
    for i in np.random.default_rng(0).permutation(len(train)):
        request = _request(train[int(i)], "served")
        estimator.estimate(request)
        estimator.observe(request, train[int(i)].output_tokens)
    return lambda records: np.array(
        [[told.quantile(q) for q in QUANTILES] for told in map(estimator.estimate, map(_request, records))]
    )


def tell_constant(train: Sequence[Record], point: str = "quantiles") -> Teller:
    """Baseline: of each served model the quantiles of its lengths, or its mean thrice, whatever the prompt."""
    lengths = _by_model(train)
    grand = np.array([r.output_tokens for r in train], dtype=float)

    def of(lengths: Floats) -> list[float]:
        return [float(lengths.mean())] * 3 if point == "mean" else np.quantile(lengths, QUANTILES).tolist()

    told = {model: of(own) for model, own in lengths.items()}
    return lambda records: np.array([told.get(r.model) or of(grand) for r in records])


def tell_prompt_length(train: Sequence[Record]) -> Teller:
    """Baseline: log-length linear in the log of the prompt's characters, per served model, with its residuals."""
    fits: dict[str, tuple[float, float, Floats]] = {}
    for model in {r.model for r in train}:
        own = [r for r in train if r.model == model]
        x = np.log1p([len(r.text) for r in own])
        y = np.log([r.output_tokens for r in own])
        slope = float(np.cov(x, y)[0, 1] / max(float(x.var(ddof=1)), 1e-9)) if len(own) > 2 else 0.0
        start = float(y.mean() - slope * x.mean())
        fits[model] = (start, slope, np.quantile(y - start - slope * x, QUANTILES))

    def tell(records: Sequence[Record]) -> Told:
        lines = [fits.get(r.model) or next(iter(fits.values())) for r in records]
        at = [(a + b * np.log1p(len(r.text))) + res for r, (a, b, res) in zip(records, lines, strict=True)]
        told: Told = np.exp(np.array(at))
        return told

    return tell


def tell_history(train: Sequence[Record]) -> Teller:
    """Baseline: the running history of each served model after it has seen the training records."""
    history = HistoryEstimator()
    order = np.random.default_rng(0).permutation(len(train))
    for i in order:
        record = train[int(i)]
        history.observe(_request(record), record.output_tokens)
    return lambda records: np.array([[history.estimate(_request(r)).quantile(q) for q in QUANTILES] for r in records])


TELLERS: dict[str, Callable[[Sequence[Record]], Teller]] = {
    "constant mean": lambda train: tell_constant(train, "mean"),
    "constant": tell_constant,
    "history": tell_history,
    "prompt length": tell_prompt_length,
    "learned": lambda train: tell_learned(fit(train)),
}


def cross_validate(
    records: Sequence[Record],
    tellers: dict[str, Callable[[Sequence[Record]], Teller]],
    *,
    folds: int = 5,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Told]:
    """What each estimator tells of every record when trained on the other folds. Shapes (n, 3), records' order.

    Raises:
        BadInputError: fewer different prompts than folds.
    """
    prompts = len({r.group for r in records})
    if prompts < folds:
        counted = f"{prompts} different prompt{'s' * (prompts != 1)}"
        raise BadInputError(f"The records are of {counted}, too few for {folds} folds to score on.")
    fold = np.array([fold_of(r.group, folds) for r in records])
    told = {name: np.zeros((len(records), 3)) for name in tellers}
    for k in range(folds):
        train = [r for r, f in zip(records, fold, strict=True) if f != k]
        out = np.flatnonzero(fold == k)
        if not len(out):
            continue
        for name, make in tellers.items():
            progress(f"fold {k + 1} of {folds}: {name}")
            told[name][out] = make(train)([records[int(i)] for i in out])
    return told


def groups(records: Sequence[Record]) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """("set / served model", indices) in order, for a report."""
    places: dict[str, list[int]] = defaultdict(list)
    for i, r in enumerate(records):
        places[f"{r.dataset} / {r.model or '-'}"].append(i)
    for name in sorted(places):
        yield name, np.array(places[name])


class Floor(msgspec.Struct, frozen=True):
    """What no estimator that sees only the prompt can beat, from prompts that one model answered several times.

    ``cv``: mean coefficient of variation within a prompt. ``mae_tokens``: mean absolute error of the median of a
    prompt's own *other* answers (what repeating the prompt would tell); ``mae_best_tokens``: of the median of all its
    answers, the one told included (a lower bound). ``mae_constant_tokens``: of the model's median, same records.
    """

    prompts: int
    records: int
    cv: float
    mae_tokens: float
    mae_best_tokens: float
    mae_constant_tokens: float


def noise_floor(records: Sequence[Record]) -> Floor | None:
    """The floor of these records; ``None`` when no prompt was answered twice by one model."""
    answers: dict[tuple[str, str], list[float]] = defaultdict(list)
    for r in records:
        answers[r.model, r.key].append(float(r.output_tokens))
    medians = {model: float(np.median(own)) for model, own in _by_model(records).items()}
    repeated = [(model, np.array(own)) for (model, _), own in answers.items() if len(own) > 1]
    if not repeated:
        return None
    others = [[np.median(np.delete(own, i)) for i in range(len(own))] for _, own in repeated]
    true = np.concatenate([own for _, own in repeated])
    return Floor(
        prompts=len(repeated),
        records=len(true),
        cv=float(np.mean([own.std(ddof=1) / own.mean() for _, own in repeated])),
        mae_tokens=float(np.abs(np.concatenate(others) - true).mean()),
        mae_best_tokens=float(np.concatenate([np.abs(np.median(own) - own) for _, own in repeated]).mean()),
        mae_constant_tokens=float(np.concatenate([np.abs(medians[model] - own) for model, own in repeated]).mean()),
    )


def hindsight(records: Sequence[Record]) -> Floats:
    """What the other answers to the same prompt tell of each record's length, (n,); NaN where there are none.

    Of the same served model where it answered the prompt several times, else of the other models. Per served model the
    log-length is regressed on the mean log of those answers (each over its model's median), so that a noisy hint is not
    taken at its word. No estimator that sees only prompts can be expected to do better; what lies between this and the
    constant is the reachable gain.
    """
    logs = np.log([r.output_tokens for r in records])
    models = sorted({r.model for r in records})
    model = np.array([models.index(r.model) for r in records])
    offset = np.array([np.median(logs[model == m]) for m in range(len(models))])
    over = logs - offset[model]
    prompts: dict[str, list[int]] = defaultdict(list)
    for i, r in enumerate(records):
        prompts[r.key].append(i)
    hint = np.full(len(records), np.nan)
    for rows in map(np.array, prompts.values()):
        for i in rows if len(rows) > 1 else ():
            same = rows[(model[rows] == model[i]) & (rows != i)]
            others = same if len(same) else rows[model[rows] != model[i]]
            if len(others):
                hint[i] = over[others].mean()
    told = np.full(len(records), np.nan)
    for m in range(len(models)):
        own = np.flatnonzero((model == m) & np.isfinite(hint))
        if len(own) >= HINTS_MIN and np.ptp(hint[own]) > 0:
            slope, start = np.polyfit(hint[own], over[own], 1)
            told[own] = np.exp(offset[m] + start + slope * hint[own])
    return told


def _by_model(records: Sequence[Record]) -> dict[str, Floats]:
    lengths: dict[str, list[float]] = defaultdict(list)
    for r in records:
        lengths[r.model].append(float(r.output_tokens))
    return {model: np.array(own) for model, own in lengths.items()}


def _request(record: Record, name: str = "") -> Request:
    return Request(
        id=name, arrived_s=0.0, prompt_tokens=0, model=record.model, max_tokens=record.max_tokens, prompt=record.text
    )


def _asked(bank: DistributionBank, rows: NDArray[np.int32], records: Sequence[Record]) -> Told:
    caps = np.array([r.max_tokens or TOKENS_MAX for r in records], dtype=np.int32)
    none = np.zeros(len(rows), dtype=np.int32)
    return np.column_stack([bank.quantiles(q, rows, none, caps) for q in QUANTILES]).astype(np.float64)
