"""The report of ``block length eval``: scores by set and served model, gains over the baselines, the floor; pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from block.length.data.records import Record
from block.length.distribution import Estimate, Floats
from block.length.evaluation.scores import Floor, Score, Told, groups, hindsight, noise_floor, score
from block.length.grid import EDGES

CONSTANT, CONSTANT_MEAN = "constant", "constant mean"


class GroupReport(msgspec.Struct, frozen=True):
    """One group of records: the scores of each estimator and the noise floor (``None``: no prompt repeats).

    ``gains``: of each estimator over the constant baselines, as fractions of their error. ``reachable``: how far below
    the constant median's error the prompt's other answers would get (`scores.hindsight`), as a fraction; ``reached``: each
    estimator's share of that, on the same records.
    """

    name: str
    records: int
    prompts: int
    scores: dict[str, Score]
    gains: dict[str, dict[str, float]]
    floor: Floor | None
    reachable: float | None
    reached: dict[str, float]


def report(records: Sequence[Record], told: Mapping[str, Told], *, by_model: bool = True) -> list[GroupReport]:
    """Per set and served model, then per set, then over all (where there are several). ``told``: (n, 3) each."""
    parts = dict(groups(records)) if by_model else {}
    by_set: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        by_set.setdefault(record.dataset, []).append(i)
    parts |= {f"{name} / all": np.array(rows) for name, rows in sorted(by_set.items()) if f"{name} / all" not in parts}
    if len(by_set) > 1:
        parts["all"] = np.arange(len(records))
    hints = np.full(len(records), np.nan)
    for rows in by_set.values():
        hints[rows] = hindsight([records[i] for i in rows])
    return [
        _group(name, [records[int(i)] for i in rows], {n: t[rows] for n, t in told.items()}, hints[rows])
        for name, rows in parts.items()
    ]


def _group(name: str, records: list[Record], told: dict[str, Told], hints: Floats) -> GroupReport:
    true = np.array([float(r.output_tokens) for r in records])
    scores = {estimator: score(quantiles, true) for estimator, quantiles in told.items()}
    reachable, reached = _reach(true, told, hints)
    return GroupReport(
        name=name,
        records=len(records),
        prompts=len({r.key for r in records}),
        scores=scores,
        gains={estimator: _gains(one, scores) for estimator, one in scores.items()},
        floor=noise_floor(records),
        reachable=reachable,
        reached=reached,
    )


def _reach(true: Floats, told: dict[str, Told], hints: Floats) -> tuple[float | None, dict[str, float]]:
    seen = np.isfinite(hints)
    if CONSTANT not in told or not seen.any():
        return None, {}
    constant = float(np.abs(told[CONSTANT][seen, 1] - true[seen]).mean())
    room = constant - float(np.abs(hints[seen] - true[seen]).mean())
    if constant <= 0 or room <= 0:
        return None, {}
    shares = {
        name: (constant - float(np.abs(quantiles[seen, 1] - true[seen]).mean())) / room
        for name, quantiles in told.items()
    }
    return room / constant, shares


def _gains(one: Score, scores: dict[str, Score]) -> dict[str, float]:
    gains: dict[str, float] = {}
    if CONSTANT in scores:
        gains["mae_vs_median"] = 1 - one.mae_tokens / max(scores[CONSTANT].mae_tokens, 1e-9)
        gains["pinball_vs_quantiles"] = 1 - one.pinball_tokens / max(scores[CONSTANT].pinball_tokens, 1e-9)
    if CONSTANT_MEAN in scores:
        gains["mae_vs_mean"] = 1 - one.mae_tokens / max(scores[CONSTANT_MEAN].mae_tokens, 1e-9)
        gains["pinball_vs_mean"] = 1 - one.pinball_tokens / max(scores[CONSTANT_MEAN].pinball_tokens, 1e-9)
    return gains


def report_tables(reports: Sequence[GroupReport], estimator: str) -> list[Table]:
    """Three tables by group: the estimator's scores; its gains over the constants, and what could be gained; all estimators."""
    scores = _table(f"{estimator}: unseen prompts, lengths in tokens", _SCORES, "cover: share within the 80 % interval")
    gains = _table(f"{estimator}: how much lower than the constants of the same served model", _GAINS, _GAINS_SAY)
    for one in reports:
        s, gain, floor = one.scores[estimator], one.gains[estimator], one.floor
        scores.add_row(
            one.name, str(one.records), f"{s.mean_tokens:.0f}", f"{s.mae_tokens:.1f}", f"{s.mae_over_mean:.0%}",
            f"{s.median_relative_error:.0%}", f"{s.pinball_tokens:.1f}", f"{s.coverage_80_fraction:.0%}",
            "-" if s.rank_correlation is None else f"{s.rank_correlation:.2f}",
        )  # fmt: skip
        gains.add_row(
            one.name, _gain(gain, "mae_vs_mean"), _gain(gain, "mae_vs_median"), _gain(gain, "pinball_vs_quantiles"),
            "-" if floor is None else f"{floor.mae_tokens:.1f}", "-" if floor is None else f"{floor.cv:.2f}",
            "-" if one.reachable is None else f"{-one.reachable:+.0%}",
            "-" if one.reachable is None else f"{one.reached[estimator]:.0%}",
        )  # fmt: skip
    return [scores, gains, _comparison(reports)]


_SCORES = ("records", "mean", "MAE", "MAE/mean", "rel. err.", "pinball", "cover", "rank")
_GAINS = ("MAE vs mean", "vs median", "pinball", "floor MAE", "CV", "reachable", "reached")
_GAINS_SAY = (
    "floor: error of the median of a prompt's other answers; reachable: how far below the constant median a prompt's "
    "other answers would get (of other models, if need be); reached: the share of that"
)


def _table(title: str, heads: Sequence[str], caption: str | None = None) -> Table:
    table = Table("set / served model", title=title, caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left",
                  caption_justify="left")  # fmt: skip
    for head in heads:
        table.add_column(head, justify="right")
    return table


def _comparison(reports: Sequence[GroupReport]) -> Table:
    heads = list(reports[0].scores) if reports else []
    table = _table("estimators and baselines: MAE / mean pinball, tokens; cover; rank", heads)
    for one in reports:
        table.add_row(one.name, *(_brief(s) for s in one.scores.values()))
    return table


def _brief(s: Score) -> str:
    rank = "" if s.rank_correlation is None else f"; {s.rank_correlation:.2f}"
    return f"{s.mae_tokens:.1f} / {s.pinball_tokens:.1f}; {s.coverage_80_fraction:.0%}{rank}"


def _gain(gains: Mapping[str, float], name: str) -> str:
    return f"{-gains[name]:+.0%}" if name in gains else "-"


def draw(estimate: Estimate, path: Path, *, generated: int = 0, title: str = "") -> None:
    """A picture (.png or .svg) of a distribution: how likely the answer is to go on beyond each length."""
    from matplotlib.figure import Figure

    last = min(1.1 * estimate.quantile(0.98, generated), estimate.cap)
    x = np.concatenate([[generated], EDGES[(generated < EDGES) & (last > EDGES)], [last]]).astype(np.int32)
    above = estimate.bank.above(estimate.row, x)
    if last == estimate.cap:  # there all end
        x, above = np.append(x, x[-1]), np.append(above, 0.0)
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.fill_between(x, above / above[0], step=None, alpha=0.25)
    axes.plot(x, above / above[0])
    for q in (0.1, 0.5, 0.9):
        axes.axvline(estimate.quantile(q, generated), linestyle=":", color="black", linewidth=1)
        tokens = estimate.quantile(q, generated)
        axes.text(tokens, 1.02 + 0.05 * (q == 0.5), f"{q:.0%}: {tokens:.0f}", ha="center", fontsize=8)
    expected = estimate.expected_total(generated)
    axes.axvline(expected, color="tab:red", linewidth=1, label=f"expected {expected:.0f}")
    axes.set(xlabel="output tokens", ylabel="share that goes on", ylim=(0, 1.15), xlim=(generated, None))
    axes.set_title(title, fontsize=9, loc="left", pad=12)
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(path)


def estimate_json(estimate: Estimate, generated: int) -> dict[str, Any]:
    """An estimate as JSON: expected total and quantiles of the total, given ``generated`` tokens."""
    return {
        "expected_total_tokens": round(estimate.expected_total(generated), 1),
        "quantiles": {
            f"{q:g}": int(estimate.quantile(q, generated)) for q in (0.05, 0.1, 0.25, 0.5, 0.7, 0.75, 0.9, 0.95)
        },
        "generated_tokens": generated,
        "source": estimate.source,
    }
