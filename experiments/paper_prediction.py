"""How far predictions are off, and how often the instance chosen is the one that would have been best.

Published: the figure of prediction error and selected-instance rank (E2E off by 10-15 %, the best instance picked 40-80 % of
the time; there a sampled request was really sent to all instances). Here each sampled decision is answered by
counterfactuals: the request on each instance in turn, everything else as it was, later arrivals included. The chosen
instance's counterfactual must be what happened; that is checked. The engine's step times are exactly known to the
predictions here, so that errors come from lengths and from later arrivals alone.
"""

from collections.abc import Sequence

import numpy as np

import paper
from block.core import Decision
from block.simulate import SimulationConfig, simulate
from block.simulate.instance import Instance, View
from block.simulate.sweep import varied
from block.workload.offer import offer
from block.workload.offered import Offered

RATES = [20.0, 24.0, 28.0, 30.0, 32.0]
SAMPLES = 60
"""Decisions looked at in a run."""
STRIDE_S = 10.0
HEAD = [
    "requests/s",
    "lengths",
    "mean error of E2E",
    "median error",
    "bias",
    "best picked",
    "mean rank of 12",
    "E2E lost against the best",
]
PUBLISHED = "published: mean error 10-15 %, best picked 40-80 %"


class Seen:
    """One sampled decision: the time, what was predicted for each instance, and copies of all of them just before it."""

    def __init__(self, number: int, decision: Decision, instances: Sequence[Instance], now_s: float) -> None:
        self.number, self.now_s = number, now_s
        self.chosen = next(i for i, one in enumerate(instances) if one.id == decision.instance)
        self.predicted_s = [candidate.prediction.e2e_s for candidate in decision.candidates]
        self.copies = []
        for one in instances:
            copy = View(one.limits, one.curve)
            copy.copy_from(one.view, now_s)
            self.copies.append(copy)


def watch(
    config: SimulationConfig, offered: list[Offered], every: int
) -> tuple[list[Seen], list[list[int]], list[float], Sequence[Instance]]:
    """Run; the sampled decisions, who went to each instance in order, each request's E2E, and the instances."""
    seen: list[Seen] = []
    sent: list[list[int]] = [[] for _ in range(config.instance_count)]
    known: list[Sequence[Instance]] = []

    def note(number: int, decision: Decision, instances: Sequence[Instance], now_s: float) -> None:
        if number % every == every // 2:
            seen.append(Seen(number, decision, instances, now_s))
        sent[next(i for i, one in enumerate(instances) if one.id == decision.instance)].append(number)
        if not known:
            known.append(instances)

    rows = simulate(config, offered, on_decision=note)
    return seen, sent, [row.e2e_s for row in rows], known[0]


def counterfactual_s(one: Seen, i: int, instance: Instance, offered: list[Offered], sent: list[int]) -> float:
    """E2E of the sampled request, had it gone to instance ``i``; changes the copy."""
    engine, later = one.copies[i].engine, [n for n in sent if n > one.number]

    def add(number: int) -> None:
        this = offered[number]
        most = instance.most_tokens(this.request.prompt_tokens, this.request.max_tokens)
        engine.add(
            this.request.prompt_tokens,
            most,
            this.output_tokens,
            this.request.arrived_s + instance.input_s,
            0,
            0,
            number,
        )

    add(one.number)
    until_s = one.now_s
    while True:
        until_s += STRIDE_S
        while later and offered[later[0]].request.arrived_s <= until_s:
            add(later.pop(0))
        engine.advance(until_s)
        for label, _, _, finished_s, _ in engine.collect():
            if label == one.number:
                return finished_s + instance.output_s - offered[one.number].request.arrived_s


def examine(config: SimulationConfig, samples: int) -> np.ndarray:
    """(samples, 5): signed and absolute relative error, rank of the chosen, its E2E over the best one - 1, is it the best?"""
    offered = offer(config.workload, config.seed)
    seen, sent, happened_s, instances = watch(config, offered, max(1, len(offered) // samples))
    found = []
    for one in seen:
        true_s = np.array(
            [counterfactual_s(one, i, instance, offered, sent[i]) for i, instance in enumerate(instances)]
        )
        chosen_s = true_s[one.chosen]
        assert abs(chosen_s - happened_s[one.number]) < 1e-6, "a counterfactual of what happened is what happened"
        error = one.predicted_s[one.chosen] / chosen_s - 1
        rank = 1 + int(np.sum(true_s < chosen_s - 1e-9))
        found.append((error, abs(error), rank, chosen_s / true_s.min() - 1, rank == 1))
    return np.array(found, dtype=float)


def main() -> None:
    o = paper.options(__doc__, seeds=3)
    rows, errors, best = [], {}, {}
    for lengths in ("estimated", "true"):
        base = paper.setting("default", o, estimated=lengths == "estimated")
        for rate in RATES[:1] if o.quick else RATES:
            configs = [varied(base, rate_rps=rate * base.instance_count / 12, seed=seed) for seed in o.seeds]
            found = np.concatenate([examine(config, 5 if o.quick else SAMPLES) for config in configs])
            bias, error, rank, lost, picked = found.mean(axis=0)
            cells = [
                f"{error:.1%}",
                f"{np.median(found[:, 1]):.1%}",
                f"{bias:+.1%}",
                f"{picked:.0%}",
                f"{rank:.1f}",
                f"{lost:.1%}",
            ]
            rows.append([f"{rate:g}", lengths, *cells])
            errors.setdefault(lengths, []).append((rate, error * 100))
            best.setdefault(lengths, []).append((rate, picked * 100))
    paper.publish(
        o, "paper_prediction", HEAD, rows, figure="Prediction error and how often the best instance is picked"
    )
    print(PUBLISHED)
    panels = {"mean error of predicted E2E, %": errors, "best instance picked, %": best}
    paper.lines(o.figures / "paper_prediction.svg", panels, "requests/s offered")


if __name__ == "__main__":
    main()
