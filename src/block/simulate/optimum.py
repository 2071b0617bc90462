"""The clairvoyant optimum: how few instance hours would do for one who knows every request that will come?

Two steps. First the need: interval by interval, the fewest instances that serve the interval's requests with at most the
allowed fraction missed, from the state that the interval before left. Then the schedule: the n-th instance is needed in some
intervals and not in others; over a gap it is either kept or stopped and started again, which costs its cold start, so each gap
costs the smaller of its length and a cold start. Both are exact for their step, together a reference: spending the allowed
misses in a few intervals instead of evenly, or longer drains, could move it a little to either side.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from block.autoscale.terms import Kind
from block.core import Slo
from block.engine.kernel import FastEngine
from block.engine.spread import forget_labels, spread
from block.simulate.provision import Traffic, engines_for, fitting, within

AFTER_S = 30.0
NEVER_S = float("inf")


class Optimum(NamedTuple):
    """``needed``: (intervals,) instances; ``kept``: the same with the gaps that are kept; ``instance_s``: what it costs in
    all; ``missed``: the fraction of requests missed when the needed count serves them."""

    needed: npt.NDArray[np.int64]
    kept: npt.NDArray[np.int64]
    instance_s: float
    missed: float


def optimum(traffic: Traffic, kind: Kind, slo: Slo, allowed: float, interval_s: float = 60.0) -> Optimum:
    """The least instances of one kind that keep every interval's missed fraction at ``allowed`` or below."""
    needed, missed = _needed(fitting(traffic, [kind]), kind, slo, allowed, interval_s)
    kept = needed.copy()
    for level in range(1, int(needed.max(initial=0)) + 1):
        used = np.flatnonzero(needed >= level)
        for before, after in pairwise(used):
            if (after - before - 1) * interval_s <= kind.cold_start_s:
                kept[before:after] = np.maximum(kept[before:after], level)
    starts = np.maximum(np.diff(kept), 0).sum()  # the first ones are there at the start
    return Optimum(needed, kept, float(kept.sum() * interval_s + starts * kind.cold_start_s), missed)


def _needed(
    traffic: Traffic, kind: Kind, slo: Slo, allowed: float, interval_s: float
) -> tuple[npt.NDArray[np.int64], float]:
    engines = engines_for([kind])
    trial = engines_for([kind])
    count = max(int(np.ceil(traffic.at_s[-1] / interval_s)), 1)
    edges = np.searchsorted(traffic.at_s, np.arange(count + 1) * interval_s)
    needed = np.zeros(count, np.int64)
    missed = 0.0
    for number in range(count):
        which = np.arange(edges[number], edges[number + 1])
        if len(which):
            needed[number], misses = _fewest(
                engines, trial, traffic, which, kind, slo, allowed, needed[max(number - 1, 0)]
            )
            missed += misses
        until_s = (number + 1) * interval_s
        _serve(engines, traffic, which, int(needed[number]), until_s)
    return needed, missed / max(len(traffic.at_s), 1)


def _fewest(
    engines: list[FastEngine], trial: list[FastEngine], traffic: Traffic, which: npt.NDArray[np.int64], kind: Kind, slo: Slo,
    allowed: float, guess: int,
) -> tuple[int, float]:  # fmt: skip
    """The fewest from the present state, and how many requests they miss. ``kind.most`` if no count does."""

    def missed(count: int) -> float:
        for copy, engine in zip(trial, engines, strict=True):
            copy.copy_from(engine)
        out = _serve(trial, traffic, which, count, float(traffic.at_s[which[-1]]) + AFTER_S)
        ttft_s, e2e_s = out[:, 0] - traffic.at_s[which], out[:, 1] - traffic.at_s[which]
        # One that streams at the end of the look ahead is judged by what it had till then.
        e2e_s = np.where(out[:, 1] >= 0, e2e_s, ttft_s)
        ttft_s = np.where(out[:, 0] >= 0, ttft_s, np.inf)
        return float((~within(ttft_s, e2e_s, traffic.outputs[which], slo)).sum())

    bound = allowed * len(which)
    count = min(max(guess, 1), kind.most)
    misses = missed(count)
    if misses <= bound:
        while count > 1:
            fewer = missed(count - 1)
            if fewer > bound:
                break
            count, misses = count - 1, fewer
    else:
        while misses > bound and count < kind.most:
            count += 1
            misses = missed(count)
    return count, misses


def _serve(
    engines: list[FastEngine], traffic: Traffic, which: npt.NDArray[np.int64], count: int, until_s: float
) -> npt.NDArray[np.float64]:
    """Times of first token and end of the requests numbered, on the first ``count`` engines."""
    out, placed = np.full((len(which), 2), -1.0), np.empty(len(which), np.int32)
    closes_s = np.where(np.arange(len(engines)) < count, NEVER_S, -NEVER_S)
    spread(
        engines, np.full(len(engines), -NEVER_S), closes_s, traffic.at_s[which], traffic.prompts[which],
        traffic.outputs[which], np.arange(len(which), dtype=np.int32), until_s, out, placed,
    )  # fmt: skip
    for engine in engines:
        forget_labels(engine)
    return out
