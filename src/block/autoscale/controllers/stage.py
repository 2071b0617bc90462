"""The model cluster that `replay` tries candidates on: engines for every kind, their present state, one run a candidate."""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from block.autoscale.controllers.window import counts, interval_s
from block.autoscale.terms import Kind, Observation, Phase
from block.core import Slo
from block.engine.kernel import FastEngine
from block.engine.spread import forget_labels, spread
from block.steptime.profile import load_profile

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
NEVER_S = float("inf")
AFTER_S = 60.0
"""How long after its last arrival a replay goes on: who has no first token by then has missed."""


class Arrivals(msgspec.Struct, frozen=True):
    """Requests by time: (n,) seconds, prompt and output tokens; over ``span_s`` seconds, of which they may be a sample."""

    at_s: Floats
    prompts: Ints
    outputs: Ints
    span_s: float

    def again(self, from_s: float, rate_rps: float, span_s: float, most: int) -> "Arrivals":
        """The same from ``from_s`` on at a mean of ``rate_rps``, repeated or cut to ``span_s`` (at most ``most`` requests)."""
        count = len(self.at_s)
        stretch = count / max(rate_rps, 1e-6) / self.span_s
        wanted = min(max(round(rate_rps * span_s), 1), most)
        which = np.arange(wanted)
        offsets_s = (self.at_s - self.at_s[0]) * stretch
        first = max(count - wanted, 0)  # where fewer do, the newest
        turn, place = which // count, first + which % count
        at_s = from_s + turn * (self.span_s * stretch) + offsets_s[place] - offsets_s[first]
        return Arrivals(at_s, self.prompts[place], self.outputs[place], span_s)

    def even(self, level_s: float) -> "Arrivals":
        """The same with time stretched so that as many come in every ``level_s``: bunches within stay."""
        count = max(round(self.span_s / level_s), 1)
        from_s = self.at_s[-1] - self.span_s
        place = np.clip((self.at_s - from_s) / self.span_s * count, 0.0, np.nextafter(count, 0))
        slots = place.astype(np.int64)
        come = np.bincount(slots, minlength=count) / len(slots)
        at = np.cumsum(come)[slots] + (place - slots - 1) * come[slots]
        return Arrivals(from_s + at * self.span_s, self.prompts, self.outputs, self.span_s)

    def share(self, fraction: float) -> "Arrivals":
        """Evenly that fraction of them, at the same times: the rate is less, a bunch as long as it was."""
        if fraction == 1:
            return self
        which = (np.arange(round(len(self.at_s) * fraction)) / fraction).astype(np.int64)
        which = which[which < len(self.at_s)] if len(which) else np.zeros(1, np.int64)
        return Arrivals(self.at_s[which], self.prompts[which], self.outputs[which], self.span_s)

    def only(self, which: npt.NDArray[np.int64], from_s: float) -> "Arrivals":
        """Those numbered, none before ``from_s``."""
        return Arrivals(np.maximum(self.at_s[which], from_s), self.prompts[which], self.outputs[which], self.span_s)


class Recent:
    """The newest single requests of a window as arrays; those of an observation are turned into one once."""

    def __init__(self) -> None:
        self._rows: dict[float, Floats] = {}

    def arrivals(self, window: Sequence[Observation], recent_s: float, most: int) -> Arrivals:
        """Those of the last ``recent_s`` seconds, at most about ``most``, as far back as single ones are known."""
        now_s = window[-1].at_s
        kept: dict[float, Floats] = {}
        count, from_s = 0, now_s
        for seen in reversed(window):
            if seen.at_s <= now_s - recent_s or count >= most or (seen.count and not seen.arrivals):
                break
            rows = self._rows.get(seen.at_s)
            if rows is None or len(rows) != len(seen.arrivals):
                found = [(one.at_s, one.prompt_tokens, one.output_tokens) for one in seen.arrivals]
                rows = np.array(sorted(found), dtype=float).reshape(-1, 3)
            kept[seen.at_s] = rows
            count, from_s = count + len(rows), seen.at_s
        self._rows = kept
        rows = np.concatenate(list(reversed(kept.values()))) if kept else np.zeros((0, 3))
        return Arrivals(
            np.ascontiguousarray(rows[:, 0]), rows[:, 1].astype(np.int32), rows[:, 2].astype(np.int32),
            max(now_s - from_s + interval_s(window), 1.0),
        )  # fmt: skip


def _phases(window: Sequence[Observation], kinds: Sequence[Kind]) -> list[tuple[dict[str, int], float]]:
    """Runs of intervals with the same ready counts: the counts, and the end of the run."""
    runs: list[tuple[dict[str, int], float]] = []
    for seen in window:
        ready = counts(seen, kinds, Phase.READY)
        if runs and runs[-1][0] == ready:
            runs[-1] = ready, seen.at_s
        else:
            runs.append((ready, seen.at_s))
    return runs


class Stage:
    """Engines of the model, kept from one decision to the next so that nothing is allocated; only ``set`` changes the state."""

    def __init__(self, kinds: Sequence[Kind], slo: Slo) -> None:
        self._kinds, self._slo = kinds, slo
        self._room = min(min(k.limits.max_model_len, k.limits.blocks_usable * k.limits.block_size) for k in kinds)
        self._curves = {kind.name: load_profile(kind.profile).curve(1.0, kind.limits) for kind in kinds}
        self._state: dict[str, list[FastEngine]] = {kind.name: [] for kind in kinds}
        self._trial: dict[str, list[FastEngine]] = {kind.name: [] for kind in kinds}
        self._ready: dict[str, int] = {}
        self._starting: dict[str, list[float]] = {}

    def set(self, window: Sequence[Observation], arrivals: Arrivals, now_s: float) -> None:
        """Serve the recent arrivals on as many instances as were ready then, so that the state is that of now."""
        self._ready = counts(window[-1], self._kinds, Phase.READY)
        most = {kind.name: max(counts(seen, [kind], Phase.READY)[kind.name] for seen in window) for kind in self._kinds}
        self._state = {kind.name: [self._fresh(kind) for _ in range(most[kind.name])] for kind in self._kinds}
        self._starting = {
            kind.name: sorted(
                max(member.since_s + kind.cold_start_s, now_s)
                for member in window[-1].members
                if member.kind == kind.name and member.phase is Phase.STARTING
            )
            for kind in self._kinds
        }
        engines = [engine for kind in self._kinds for engine in self._state[kind.name]]
        if not engines:
            return
        waiting = np.zeros(0, np.int64)
        first = 0
        for ready, until_s in _phases(window, self._kinds):
            after = int(np.searchsorted(arrivals.at_s, until_s, side="right"))
            stays = [number < ready[kind.name] for kind in self._kinds for number in range(most[kind.name])]
            closes_s = np.where(stays, NEVER_S, -NEVER_S)
            which = np.concatenate((waiting, np.arange(first, after)))
            part = arrivals.only(which, float(arrivals.at_s[first]) if first < after else until_s)
            _, placed = self._serve(engines, np.full(len(engines), -NEVER_S), closes_s, part, until_s)
            waiting, first = which[placed < 0], after
            for engine in engines:
                forget_labels(engine)

    def missed(self, want: dict[str, int], arrivals: Arrivals, now_s: float, judged_s: float) -> float:
        """The fraction, of the ``arrivals`` from ``judged_s`` on, that miss the SLO on ``want`` instances."""
        engines: list[FastEngine] = []
        opens_s: list[float] = []
        closes_s: list[float] = []
        for kind in self._kinds:
            ready, count = self._ready[kind.name], want[kind.name]
            starting = self._starting[kind.name]
            due_s = [*starting, *[now_s + kind.cold_start_s] * max(count - ready - len(starting), 0)]
            kept = min(ready, count)
            engines += self._copies(kind, ready, len(due_s))
            opens_s += [-NEVER_S] * ready + due_s
            stays = [NEVER_S] * kept + [-NEVER_S] * (ready - kept)
            coming = max(count - ready, 0)
            closes_s += stays + [NEVER_S] * coming + [-NEVER_S] * (len(due_s) - coming)
        return self._missed(engines, np.array(opens_s), np.array(closes_s), arrivals, judged_s)

    def one_of_each(self) -> dict[str, int]:
        """One instance of every kind."""
        return {kind.name: 1 for kind in self._kinds}

    def missed_afresh(self, want: dict[str, int], arrivals: Arrivals, judged_s: float) -> float:
        """The same on ``want`` instances that are all there from the start, idle: a third of the work."""
        engines = [self._fresh(kind) for kind in self._kinds for _ in range(want[kind.name])]
        opens_s = np.full(len(engines), -NEVER_S)
        return self._missed(engines, opens_s, -opens_s, arrivals, judged_s)

    def _missed(
        self, engines: list[FastEngine], opens_s: Floats, closes_s: Floats, arrivals: Arrivals, judged_s: float
    ) -> float:
        if not engines:
            return 1.0
        judged = arrivals.at_s >= judged_s
        if not judged.any():
            judged[-max(len(judged) // 2, 1) :] = True
        out, _ = self._serve(engines, opens_s, closes_s, arrivals, arrivals.at_s[-1] + AFTER_S)
        return float(1.0 - self._met(out, arrivals)[judged].mean())

    def _met(self, out: Floats, arrivals: Arrivals) -> Any:
        slo, at_s = self._slo, arrivals.at_s
        first_s, end_s = out[:, 0] - at_s, out[:, 1] - at_s
        met = out[:, 0] >= 0
        if slo.ttft_s is not None:
            met &= first_s <= slo.ttft_s
        if slo.e2e_s is not None:
            met &= (out[:, 1] >= 0) & (end_s <= slo.e2e_s)
        if slo.tpot_s is not None:
            unended = out[:, 1] < 0
            met &= unended | (end_s - first_s <= slo.tpot_s * np.maximum(arrivals.outputs - 1, 1))
        return met

    def _serve(
        self, engines: list[FastEngine], opens_s: Floats, closes_s: Floats, arrivals: Arrivals, until_s: float
    ) -> tuple[Floats, Ints]:
        count = len(arrivals.at_s)
        out, placed = np.full((count, 2), -1.0), np.empty(count, np.int32)
        prompts = np.minimum(arrivals.prompts, self._room - 1).astype(np.int32)
        outputs = np.clip(arrivals.outputs, 1, np.maximum(self._room - prompts, 1)).astype(np.int32)
        labels = np.arange(count, dtype=np.int32)
        spread(engines, opens_s, closes_s, arrivals.at_s, prompts, outputs, labels, until_s, out, placed)
        return out, placed

    def _copies(self, kind: Kind, ready: int, more: int) -> list[FastEngine]:
        """Engines in the present state, and idle ones."""
        trial = self._trial[kind.name]
        trial += [self._fresh(kind) for _ in range(ready + more - len(trial))]
        for engine, state in zip(trial[:ready], self._state[kind.name], strict=False):
            engine.copy_from(state)
        for number in range(ready, ready + more):
            trial[number] = self._fresh(kind)
        return trial[: ready + more]

    def _fresh(self, kind: Kind) -> FastEngine:
        return FastEngine(kind.limits, self._curves[kind.name], 0.0, 64)
