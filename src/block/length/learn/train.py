"""Train a length model from records. Needs LightGBM (the extra ``block-llm[length]``); serving does not.

Order of work, every step seeing only out-of-fold scores of the one before (folds are split by prompt):

1. level of each served model: the median log-length; what the base tells above or below it;
2. linear part (`ridge`) of what is left;
3. trees for the location (absolute error) on the dense features, that score, the model's level and the base; both with
   and without what the text is about, whichever tells more;
4. how much of each to mix, and each served model's slope;
5. trees for the spread, then the shapes of the standardised residuals by spread (`family`).

How much of each part is believed follows from how surely the records speak for it and a prior (`belief`). The priors of
the base and of what records teach are in line with what other prompts of public sets bore out
(experiments/length_transfer.py), that of asked lengths too (experiments/length_pull.py).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from block.errors import BadInputError
from block.length.data.records import Record
from block.length.distribution import Floats
from block.length.learn.belief import SHARES, Prior, least, seen
from block.length.learn.boost import Boost, leaf_rows
from block.length.learn.family import fit_family
from block.length.learn.model import (
    LEVEL_RECORDS,
    LengthModel,
    ServedModel,
    TextEncoder,
    Vector,
    asked_pull,
    prompt_hashes,
)
from block.length.learn.ridge import WordsRidge
from block.length.learn.tabulate import FOLDS, Table, tabulate

RECORDS_MIN = 50
MIXES = (0.0, 0.25, 0.5, 0.75, 1.0)
BASE_PRIOR = Prior(1.0, 0.6)
"""How much of what a base tells of an unknown served model holds for other records."""

PULL_PRIOR = Prior(0.35, 0.15)
"""How much of the way from its usual length to an asked one a model goes."""

SLOPE_PRIOR = Prior(1.0, 0.15)
"""How strongly one served model follows what is told for all: those of the public sets vary by 0.19, errors included."""

SCALE_PRIOR = Prior(1.0, 0.5)
"""How much of a base's log-scale holds for other records."""

HALF_PROMPTS, OWN_WIDTH = 100, 0.3
"""From how many prompts what the records taught holds by half on others, and how widely that varies between sets."""

_BASE_MOST = (
    2.0  # a base speaks of an unknown model with half its voice (experiments/ship_lengths.py): this is all of it
)
_BASE_PASSES = 2
_BEYOND = 0.3  # how far beyond what training saw an effect may reach, in logs
_MUCH = 500  # records from which on a served model counts no more in what is typical
_ALIKE, _ALIKE_MODELS = (
    5.0,
    2.0,
)  # a level of 5 records is worth half, where not more than 2 models tell how much they differ
_WIDTH_PROMPTS = 6.0  # that tell the width as surely as a base does: between public sets its logarithm varies by 0.4
_WIDTH_RECORDS = 30.0  # of a served model that are worth as much as all others' width


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
    effect = slope[table.model] * located.told
    offset, spreads = levels(table.log_tokens - effect - located.pull, table.model)
    over = table.log_tokens - effect - located.pull_weight * asked_pull(table.dense, offset[table.model])
    residual = over - _held_out_levels(over, table)
    spread = _spread(table, start, located, residual, rounds, threads)
    told = spread.scale * spread.width[table.model]
    linear = located.ridge.fit(located.rest)
    parts = (offset, spreads, slope, spread.width)
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
        family=fit_family(residual, told, table.truncated, prompts=table.prompts, prior=None if base is None else base.family),
        base=base, base_weight=start.weight, base_center=start.center,
        prompts=np.unique(prompt_hashes({r.group for r in records})) if remember else prompt_hashes(()),
        about={"records": len(table.fold), "prompts": table.prompts},
    )  # fmt: skip


def _table(records: Sequence[Record], encoder: TextEncoder | None) -> Table:
    kept = [r for r in records if r.has_prompt]
    if len(records) >= RECORDS_MIN and not kept:
        raise BadInputError(
            "The records hold no prompts to learn from: log them with `block serve --log-prompts features`, or name their field "
            "prompt or messages."
        )
    if len(kept) < RECORDS_MIN:
        raise BadInputError(
            f"Too few records to train on: {len(kept)}, and at least {RECORDS_MIN} are needed. Until there are, serve the "
            "shipped model (`--length-estimator learned`), which what finishes corrects."
        )
    table = tabulate(kept, encoder)
    if len(np.unique(table.fold)) < FOLDS:
        raise BadInputError(f"The records are of too few different prompts to train on: at least {FOLDS} are needed.")
    return table


class _Start(NamedTuple):
    """Levels and spreads of the served models, (models,), and what the base tells of each record, (n,): its effect above
    or below ``center``, worth ``weight``, and its log-scale, of which ``width`` is one typical deviation. Without a base
    the width is ``None`` and the rest of it 0."""

    width: float | None
    offset: Floats
    spread: Floats
    told: Floats
    told_scale: Floats
    weight: float
    center: float
    pull: Prior


def _start(table: Table, base: LengthModel | None) -> _Start:
    """Levels of what the base does not explain."""
    if base is None:
        none = np.zeros(len(table.log_tokens))
        return _Start(None, *levels(table.log_tokens, table.model), none, none, 0.0, 0.0, PULL_PRIOR)
    pull = Prior(base.pull_weight, PULL_PRIOR.width)
    told, told_scale = base.effects(table.dense, table.words)
    center = float(np.median(told))
    told = told - center
    weight = BASE_PRIOR.mean
    for _ in range(_BASE_PASSES):  # what the base explains, then the levels without it, then the same again
        offset, spread = levels(table.log_tokens - weight * told, table.model)
        target = table.log_tokens - offset[table.model] - pull.mean * asked_pull(table.dense, offset[table.model])
        weight = seen(target, told, table.prompt).believed(BASE_PRIOR, most=_BASE_MOST)
    return _Start(base.unknown.width, offset, spread, told, told_scale, weight, center, pull)


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
    pull_weight = _pull_weight(table, target - base, pull, start.pull)
    pull = pull_weight * pull
    rest = target - base - pull

    ridge = WordsRidge(table.words, table.dense, table.vectors, table.prompt, table.fold)
    score = ridge.out_of_fold(rest)
    level = np.column_stack([*_seen_levels(table, start), start.told, start.told_scale])
    columns = np.column_stack([table.dense, score, level]).astype(np.float32)
    boost = Boost(rounds, threads, leaf_rows(table), "l1")
    guess = boost.out_of_fold(columns, rest, table.fold)
    mix = min(MIXES, key=lambda m: float(np.abs(rest - m * guess - (1 - m) * score).mean()))
    own = mix * guess + (1 - mix) * score
    own_weight = seen(rest, own, table.prompt).believed(_own_prior(table), most=1.0)
    own = own_weight * own
    return _Located(target, rest, own, base + own, pull, columns, level, ridge, boost, pull_weight, mix, own_weight)


def _seen_levels(table: Table, start: _Start) -> list[Floats]:
    """Level and spread that the trees see of each record's served model, (n,) each: of one with few records the typical,
    for its own would tell each of these records about itself."""
    count = np.bincount(table.model)
    typical = [np.average(part, weights=np.minimum(count, _MUCH)) for part in (start.offset, start.spread)]
    parts = zip((start.offset, start.spread), typical, strict=True)
    return [np.where(count >= LEVEL_RECORDS, part, of_all)[table.model] for part, of_all in parts]


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
    base_weight = (
        _scale_weight(table, residual, np.zeros(len(size)), start.told_scale, SCALE_PRIOR)
        if start.width is not None
        else 0.0
    )
    told_scale = base_weight * start.told_scale
    weight = _scale_weight(table, residual, told_scale, wide, _own_prior(table))
    scale = np.exp(weight * wide + told_scale)
    prior = None if start.width is None else float(np.median(start.width * np.exp(start.told_scale) / scale))
    return _Spread(scale, _widths(table, residual, scale, prior), (columns, size), boost, weight, base_weight)


def _own_prior(table: Table) -> Prior:
    return Prior(table.prompts / (table.prompts + HALF_PROMPTS), OWN_WIDTH)


def _scale_weight(table: Table, residual: Floats, known: Floats, told: Floats, prior: Prior) -> float:
    """How much of a log-scale to believe beside what is ``known`` of it: the likeliest under a Laplace distribution."""
    log_scale = known[:, None] + told[:, None] * SHARES[None, :]
    size = np.abs(residual)[:, None] / np.exp(log_scale)
    width = np.maximum(size.mean(axis=0), 1e-6)
    return least(log_scale + np.log(width) + size / width, table.prompt).believed(prior, most=1.0)


def _pull_weight(table: Table, target: Floats, pull: Floats, prior: Prior) -> float:
    """How much of an asked length is delivered, 0-1."""
    asked = pull != 0
    if not asked.any():
        return prior.mean
    return seen(target[asked], pull[asked], table.prompt[asked]).believed(prior, most=1.0)


def levels(log_tokens: Floats, model: NDArray[np.int64], models: int = 0) -> tuple[Floats, Floats]:
    """Median and mean absolute deviation of the log-lengths of each served model, shrunk towards those of all by as much
    as they differ less than chance has them differ. ``models``: how many there are, where some may have no record."""
    grand = float(np.median(log_tokens))
    wide = float(np.abs(log_tokens - grand).mean())
    count = np.bincount(model, minlength=models)
    median, spread = np.full(len(count), grand), np.full(len(count), wide)
    for m in np.flatnonzero(count):
        own = log_tokens[model == m]
        median[m] = np.median(own)
        spread[m] = np.abs(own - median[m]).mean()
    seen = count > 0
    kept = count / (count + _alike(median[seen], count[seen], 1.6 * float(np.average(spread, weights=count))))
    return kept * median + (1 - kept) * grand, kept * spread + (1 - kept) * wide


def _held_out_levels(log_tokens: Floats, table: Table) -> Floats:
    """The level of each record's served model by the other folds, (n,): what is left then holds the level's own error too."""
    level = np.zeros(len(log_tokens))
    for k in range(FOLDS):
        out = table.fold == k
        level[out] = levels(log_tokens[~out], table.model[~out], len(table.models))[0][table.model[out]]
    return level


def _alike(median: Floats, count: NDArray[np.int64], deviation: float) -> float:
    """How many records of a served model are worth as much as all others' level: the variance of one record over that
    between models, by moments, beside a prior of `_ALIKE_MODELS` models."""
    error = (deviation**2 + 1e-6) / count
    between = float(((median - np.average(median, weights=count)) ** 2 - error).sum())
    before = (deviation**2 + 1e-6) / _ALIKE
    variance = max(between + _ALIKE_MODELS * before, 0.0) / (len(median) + _ALIKE_MODELS)
    return float(np.clip((deviation**2 + 1e-6) / max(variance, 1e-9), 0.5, 1e4))


def _slopes(table: Table, target: Floats, effect: Floats) -> Floats:
    """How strongly each model follows what is told for all."""
    slope = np.full(len(table.models), SLOPE_PRIOR.mean)
    if np.ptp(effect) > 0 and len(slope) > 1:
        for m in range(len(slope)):
            own = table.model == m
            slope[m] = seen(target[own], effect[own], table.prompt[own]).believed(SLOPE_PRIOR, most=2.0)
    return slope


def _widths(table: Table, residual: Floats, told: Floats, prior: float | None) -> Floats:
    """How much wider than told each model's residuals lie, shrunk towards those of all, and these towards the ``prior``."""
    shared = float(np.median(np.abs(residual) / told))
    if prior is not None:
        kept = table.prompts / (table.prompts + _WIDTH_PROMPTS)
        shared = max(shared, 1e-3) ** kept * prior ** (1 - kept)
    width = np.full(len(table.models), shared)
    for m in range(len(table.models)):
        own = table.model == m
        count = int(own.sum())
        width[m] = (count * float(np.median(np.abs(residual[own]) / told[own])) + _WIDTH_RECORDS * shared) / (
            count + _WIDTH_RECORDS
        )
    floored: Floats = np.maximum(width, 1e-3)
    return floored


def typical(served: dict[str, ServedModel]) -> ServedModel:
    """What to believe of a served model that the records do not hold: the record-weighted mean of those they do."""
    models = list(served.values())
    weight = np.array([min(model.records, _MUCH) for model in models], dtype=float)
    mean = {part: float(np.average([getattr(model, part) for model in models], weights=weight))
            for part in ("offset", "spread", "slope", "width")}  # fmt: skip
    return ServedModel("", int(sum(model.records for model in models)), **mean)
