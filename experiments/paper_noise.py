"""Noise on lengths and on predicted latencies, 0 to 100 % each, at 30 requests/s, asking 2 instances, lengths estimated.

Published: the heat map of error sensitivity; noise costs at most 6.3 % of the mean and 3.7 % of the P99 of the end-to-end
latency there. As published, a predicted latency is multiplied by 1 + N(0, x), kept within 0.1 and 5, for each candidate by
itself. Length noise is log-normal here and stays with the request while it runs (published: drawn anew for each candidate
and forgotten once it is sent), which is harsher.
"""

import math
from random import Random

import msgspec
import numpy as np

import paper
from block.core import Candidate, Request
from block.metrics.summary import Summary
from block.policy import POLICIES, Policy
from block.policy.rank import PredictedE2e
from block.policy.shortlist import RandomSubset
from block.policy.table import PolicySpec
from block.simulate import SimulationConfig
from block.simulate.config import LengthModel
from block.simulate.sweep import run_one, varied

LEVELS = [0.0, 0.25, 0.5, 1.0]
RATE_RPS = 30.0
PUBLISHED_MOST = (0.063, 0.037)  # mean and P99 of E2E


class NoisyE2e(PredictedE2e):
    """The published rule with noise on every predicted latency."""

    def __init__(self, error: float, seed: int) -> None:
        self._error, self._rng = error, Random(seed)

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        exact = super().cost(request, candidate)
        factor = min(max(1.0 + self._rng.gauss(0.0, self._error), 0.1), 5.0)
        return None if exact is None else exact * factor


def make(error: float = 0.0, k: int = 2, seed: int = 1) -> Policy:
    return Policy("", RandomSubset(k), NoisyE2e(error, seed))


def run(config: SimulationConfig) -> Summary:
    POLICIES["paper-noisy"] = PolicySpec("for this experiment only", make)
    try:
        return run_one(config)
    finally:
        del POLICIES["paper-noisy"]


def main() -> None:
    o = paper.options(__doc__, seeds=3)
    base = paper.setting("default", o)
    levels = LEVELS[:: len(LEVELS) - 1] if o.quick else LEVELS
    found = {}
    for length in levels:
        for latency in levels:
            sigma = math.hypot(paper.ESTIMATED["noise"], length)
            config = msgspec.structs.replace(base, lengths=LengthModel(options={**paper.ESTIMATED, "noise": sigma}))
            found[length, latency] = paper.means(
                o, varied(config, policy=f"paper-noisy:error={latency},k=2"), RATE_RPS, run
            )
    rows, clean = [], found[0.0, 0.0]
    for (length, latency), one in found.items():
        costs = [one[name] / clean[name] - 1 for name in ("e2e_s_mean", "e2e_s_p99")]
        figures = [f"{one['e2e_s_mean']:.2f}", f"{one['e2e_s_p99']:.1f}", f"{one['ttft_s_p99']:.2f}"]
        rows.append([f"{length:.0%}", f"{latency:.0%}", *figures, *(f"{cost:+.1%}" for cost in costs)])
    head = [
        "length noise",
        "latency noise",
        "mean E2E, s",
        "P99 E2E, s",
        "TTFT P99, s",
        "mean E2E against none",
        "P99 E2E against none",
    ]
    paper.publish(o, "paper_noise", head, rows, figure="Heat maps of what noise costs")
    most = [max(one[name] / clean[name] - 1 for one in found.values()) for name in ("e2e_s_mean", "e2e_s_p99")]
    print(
        f"most: mean {most[0]:+.1%} (published {PUBLISHED_MOST[0]:+.1%}), P99 {most[1]:+.1%} (published {PUBLISHED_MOST[1]:+.1%})"
    )
    draw(o, levels, found)


def draw(o: paper.Options, levels: list[float], found: dict[tuple[float, float], dict[str, float]]) -> None:
    figure, axes = paper.drawing().subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    for ax, (name, title) in zip(axes, (("e2e_s_mean", "mean E2E"), ("e2e_s_p99", "P99 E2E")), strict=True):
        change = np.array([[found[a, b][name] / found[0.0, 0.0][name] - 1 for b in levels] for a in levels]) * 100
        ax.imshow(change, cmap="OrRd", origin="lower", aspect="auto")
        for i, j in np.ndindex(change.shape):
            dark = change[i, j] > (change.min() + change.max()) / 2
            ax.text(
                j, i, f"{change[i, j]:+.1f} %", ha="center", va="center", fontsize="small", color="white" if dark else "black"
            )  # fmt: skip
        names = [f"{level:.0%}" for level in levels]
        ax.set(
            title=title,
            xlabel="latency noise",
            ylabel="length noise",
            xticks=range(len(levels)),
            yticks=range(len(levels)),
            xticklabels=names,
            yticklabels=names,
        )
    paper.save(figure, o.figures / "paper_noise.svg")


if __name__ == "__main__":
    main()
