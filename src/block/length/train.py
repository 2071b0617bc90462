"""Train a length model from records. Needs LightGBM (the extra ``block-llm[length]``); serving does not.

Order of work, every step seeing only out-of-fold scores of the one before (folds are split by prompt):

1. level of each served model: the median log-length; what the base tells above or below it, and how much that is worth;
2. linear part (`ridge`) of what is left;
3. trees for the location (absolute error) on the dense features, that score, the model's level and the base; both with
   and without what the text is about, whichever tells more;
4. how much of each to mix, and each served model's slope, shrunk towards 1;
5. trees for the spread and how much of it to believe, then the shapes of the standardised residuals by spread (`family`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from block.errors import BadInputError
from block.length.boost import Boost, leaf_rows
from block.length.distribution import Floats
from block.length.family import fit_family
from block.length.model import LengthModel, ServedModel, TextEncoder, Vector, asked_pull, prompt_hashes
from block.length.records import Record
from block.length.ridge import WordsRidge
from block.length.tabulate import FOLDS, Table, tabulate

RECORDS_MIN = 50
MIXES = (0.0, 0.25, 0.5, 0.75, 1.0)
_SHARES = np.linspace(0.0, 1.0, 21)
_SLOPES = np.linspace(0.0, 1.3, 27)
_BEYOND = 0.3  # how far beyond what training saw an effect may reach, in logs
_SHRINK = 30.0
OWN_SHRINK = 50.0
"""Prompts that what the records themselves taught must come from to be worth half, beside a base."""

BASE_PRIOR = 0.5
"""How much of a base's effect holds for other records, before there is evidence: between public sets 0 to 1, 0.5 in the mean."""

PULL_PRIOR = 0.6
"""How much of the way from its usual length to an asked one a model goes, before there is evidence."""


def fit(
    records: Sequence[Record],
    *,
    base: LengthModel | None = None,
    encoder: TextEncoder | None = None,
    rounds: int = 250,
    threads: int = 1,
    remember: bool = False,
) -> LengthModel:
    """A model of these records.

    ``base``: a model of other records to start from. ``encoder``: the linear part sees its sentence embeddings too.
    ``remember``: keep hashes of the prompts, by which `LengthModel.has_seen` tells what it was trained on.

    Raises:
        BadInputError: fewer than ``RECORDS_MIN`` records, or too few different prompts.
        ConfigError: LightGBM is not installed, or the base cannot be one.
    """
    table = _table(records, encoder)
    start = _start(table, base)
    located, table = min(
        ((_locate(one, start, rounds, threads), one) for one in (table, table.without_meaning())),
        key=lambda found: found[0].error,
    )
    slope = _slopes(table, located.target - located.pull, located.told)
    residual = located.target - located.pull - slope[table.model] * located.told
    spread = _spread(table, start, located, residual, rounds, threads)
    told = spread.scale * spread.width[table.model]
    linear = located.ridge.fit(located.rest)
    parts = (start.offset, start.spread, slope, spread.width)
    served = {
        name: ServedModel(name, int((table.model == m).sum()), *(float(part[m]) for part in parts))
        for m, name in enumerate(table.models)
    }
    return LengthModel(
        linear=linear.words, rarity=located.ridge.rarity, intercept=linear.intercept, dense_mean=located.ridge.mean,
        dense_weight=linear.dense, vector_mean=located.ridge.vector_mean, vector_weight=linear.vector, encoder=encoder,
        location_trees=located.boost.fit(located.columns, located.rest), scale_trees=spread.boost.fit(*spread.rows),
        pull_weight=located.pull_weight, own_low=float(np.quantile(located.own, 0.002)) - _BEYOND,
        own_high=float(np.quantile(located.own, 0.998)) + _BEYOND, mix=located.mix, own_weight=located.own_weight,
        scale_weight=spread.weight, base_scale_weight=spread.base_weight, served=served, unknown=typical(served),
        family=fit_family(residual, told, table.truncated, None if base is None else base.family),
        base=base, base_weight=start.weight, base_center=start.center,
        prompts=np.unique(prompt_hashes({r.group for r in records})) if remember else prompt_hashes(()),
        about={"records": len(table.fold), "prompts": table.prompts},
    )  # fmt: skip


def _table(records: Sequence[Record], encoder: TextEncoder | None) -> Table:
    kept = [r for r in records if r.has_prompt]
    if len(records) >= RECORDS_MIN and not kept:
        raise BadInputError(
            "The records hold no prompts to learn from: log them with `block serve --log-prompts features`."
        )
    if len(kept) < RECORDS_MIN:
        raise BadInputError(f"Too few records to train on: {len(kept)}, and at least {RECORDS_MIN} are needed.")
    table = tabulate(kept, encoder)
    if len(np.unique(table.fold)) < FOLDS:
        raise BadInputError(f"The records are of too few different prompts to train on: at least {FOLDS} are needed.")
    return table


class _Start(NamedTuple):
    """Levels of the served models, (models,), and what the base tells of each record, (n,): its effect above or below
    ``center``, worth ``weight``, and its log-scale. All 0 without a base (``based`` is false)."""

    based: bool
    offset: Floats
    spread: Floats
    told: Floats
    told_scale: Floats
    weight: float
    center: float


def _start(table: Table, base: LengthModel | None) -> _Start:
    """Levels of what the base does not explain."""
    offset, spread = levels(table.log_tokens, table.model)
    if base is None:
        none = np.zeros(len(table.log_tokens))
        return _Start(False, offset, spread, none, none, 0.0, 0.0)
    told, told_scale = base.effects(table.dense, table.words)
    center = float(np.median(told))
    told = told - center
    target = table.log_tokens - offset[table.model]
    weight = _share(target, told, _SLOPES, prompts=table.prompts, prior=BASE_PRIOR, worth=_SHRINK)
    return _Start(True, *levels(table.log_tokens - weight * told, table.model), told, told_scale, weight, center)


class _Located(NamedTuple):
    """How log-lengths lie above or below their levels (``target``), and what is said of that out of fold: what prompts
    ask for (``pull``) and what they tell (``told``: the base, and what the records taught of the ``rest``, ``own``). All (n,)."""

    target: Floats
    rest: Floats
    own: Floats
    told: Floats
    pull: Floats
    columns: Vector
    level: Floats
    ridge: WordsRidge
    boost: Boost
    pull_weight: float
    mix: float
    own_weight: float

    @property
    def error(self) -> float:
        """Mean absolute error, in logs."""
        return float(np.abs(self.target - self.told - self.pull).mean())


def _locate(table: Table, start: _Start, rounds: int, threads: int) -> _Located:
    offset = start.offset[table.model]
    target = table.log_tokens - offset
    pull = asked_pull(table.dense, offset)
    base = start.weight * start.told
    pull_weight = _pull_weight(table, target - base, pull, 0.0 if start.based else PULL_PRIOR)
    pull = pull_weight * pull
    rest = target - base - pull

    ridge = WordsRidge(table.words, table.dense, table.vectors, table.prompt, table.fold)
    score = ridge.out_of_fold(rest)
    level = np.column_stack([offset, start.spread[table.model], start.told, start.told_scale])
    columns = np.column_stack([table.dense, score, level]).astype(np.float32)
    boost = Boost(rounds, threads, leaf_rows(table), "l1")
    guess = boost.out_of_fold(columns, rest, table.fold)
    mix = min(MIXES, key=lambda m: float(np.abs(rest - m * guess - (1 - m) * score).mean()))
    own = mix * guess + (1 - mix) * score
    own_weight = 1.0
    if start.based:
        own_weight = _share(rest, own, _SHARES, prompts=table.prompts, prior=0.0, worth=OWN_SHRINK)
    own = own_weight * own
    return _Located(target, rest, own, base + own, pull, columns, level, ridge, boost, pull_weight, mix, own_weight)


class _Spread(NamedTuple):
    """How widely log-lengths lie around what is told: ``scale``, (n,), out of fold, times ``width``, (models,)."""

    scale: Floats
    width: Floats
    rows: tuple[Vector, Floats]
    boost: Boost
    weight: float
    base_weight: float


def _spread(table: Table, start: _Start, located: _Located, residual: Floats, rounds: int, threads: int) -> _Spread:
    columns = np.column_stack([table.dense, located.told + located.pull, located.level]).astype(np.float32)
    size = np.log(np.abs(residual) + 0.05)
    boost = Boost(max(rounds // 4, 20), threads, 2 * leaf_rows(table), "l2")
    wide = boost.out_of_fold(columns, size, table.fold)
    weight, base_weight = _scale_weights(residual, wide, start.told_scale)
    scale = np.exp(weight * wide + base_weight * start.told_scale)
    return _Spread(scale, _widths(table, residual, scale), (columns, size), boost, weight, base_weight)


def _share(target: Floats, told: Floats, shares: Floats, *, prompts: int, prior: float, worth: float) -> float:
    """How much of ``told`` the target holds: least absolute error, with a prior worth so many prompts."""
    errors = np.abs(target[:, None] - told[:, None] * shares[None, :]).mean(axis=0)
    return float((prompts * shares[int(np.argmin(errors))] + worth * prior) / (prompts + worth))


def _scale_weights(residual: Floats, wide: Floats, told_scale: Floats) -> tuple[float, float]:
    """How much of the trees' and of the base's log-scale to believe: the likeliest under a Laplace distribution."""
    size = np.abs(residual) + 1e-3
    best, chosen = np.inf, (0.0, 0.0)
    for own in MIXES:
        for other in MIXES if np.ptp(told_scale) > 0 else (0.0,):
            log_scale = own * wide + other * told_scale
            loss = float(log_scale.mean() + np.log((size / np.exp(log_scale)).mean()))
            if loss < best - 1e-9:
                best, chosen = loss, (own, other)
    return chosen


def _pull_weight(table: Table, target: Floats, pull: Floats, prior: float) -> float:
    """How much of an asked length is delivered, 0-1."""
    asked = pull != 0
    if not asked.any():
        return prior
    prompts = len(np.unique(table.prompt[asked]))
    return _share(target[asked], pull[asked], _SHARES, prompts=prompts, prior=prior, worth=_SHRINK)


def levels(log_tokens: Floats, model: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Median and mean absolute deviation of the log-lengths of each served model, shrunk towards those of all."""
    grand = float(np.median(log_tokens))
    wide = float(np.abs(log_tokens - grand).mean())
    models = int(model.max()) + 1
    offset, spread = np.zeros(models), np.zeros(models)
    for m in range(models):
        own = log_tokens[model == m]
        kept = len(own) / (len(own) + 5.0)
        offset[m] = kept * np.median(own) + (1 - kept) * grand
        spread[m] = kept * np.abs(own - np.median(own)).mean() + (1 - kept) * wide
    return offset, spread


def _slopes(table: Table, target: Floats, effect: Floats) -> Floats:
    """How strongly each model follows what is told for all: least absolute error, shrunk towards that of all."""

    def best(rows: NDArray[np.bool_] | slice) -> float:
        errors = np.abs(target[rows][:, None] - effect[rows][:, None] * _SLOPES[None, :]).mean(axis=0)
        return float(_SLOPES[int(np.argmin(errors))])

    shared = best(slice(None))
    slope = np.full(len(table.models), shared)
    for m in range(len(table.models)):
        own = table.model == m
        prompts = len(np.unique(table.prompt[own]))
        slope[m] = (prompts * best(own) + _SHRINK * shared) / (prompts + _SHRINK)
    return slope


def _widths(table: Table, residual: Floats, told: Floats) -> Floats:
    """How much wider than told each model's residuals lie, shrunk towards those of all."""
    shared = float(np.median(np.abs(residual) / told))
    width = np.full(len(table.models), shared)
    for m in range(len(table.models)):
        own = table.model == m
        count = int(own.sum())
        width[m] = (count * float(np.median(np.abs(residual[own]) / told[own])) + _SHRINK * shared) / (count + _SHRINK)
    floored: Floats = np.maximum(width, 1e-3)
    return floored


def typical(served: dict[str, ServedModel]) -> ServedModel:
    """What to believe of a served model that the records do not hold: the record-weighted mean of those they do."""
    models = list(served.values())
    weight = np.array([min(model.records, 500) for model in models], dtype=float)
    mean = {part: float(np.average([getattr(model, part) for model in models], weights=weight))
            for part in ("offset", "spread", "slope", "width")}  # fmt: skip
    return ServedModel("", int(sum(model.records for model in models)), **mean)
