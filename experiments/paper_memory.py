"""Free KV blocks, their variance over the instances, and preemptions, over the course of a run, lengths estimated.

Published: the figure of GPU memory and preemptions at 20, 24, 28, 32 and 36 requests/s (near 32: about 300 preemptions with
Block against 1,800 with Llumnix without migration).
"""

from collections.abc import Sequence

import numpy as np

import paper
from block.core import Decision
from block.simulate import SimulationConfig, simulate
from block.simulate.instance import Instance
from block.simulate.sweep import varied

POLICIES = ["round-robin", "infaas++", "llumnix-minus", "block-k:k=2", "block-paper"]
RATES = [20.0, 24.0, 28.0, 32.0, 36.0]
DRAWN_RPS = 32.0
EVERY = 50
PUBLISHED = {"llumnix-minus": 1800, "block-k:k=2": 300}
HEAD = [
    "requests/s",
    "policy",
    "free blocks, mean",
    "standard deviation over instances, mean",
    "preemptions",
    "published",
]


def course(config: SimulationConfig) -> np.ndarray:
    """(samples, 4) over a run: seconds, mean of the free blocks, their variance over the instances, preemptions so far."""
    samples = []

    def note(number: int, decision: Decision, instances: Sequence[Instance], now_s: float) -> None:
        if number % EVERY == 0:
            free = [one.view.engine.load()[3] for one in instances]
            samples.append((now_s, np.mean(free), np.var(free), sum(one.view.engine.preemptions for one in instances)))

    simulate(config, on_decision=note)
    return np.array(samples)


def main() -> None:
    o = paper.options(__doc__, seeds=2)
    base = paper.setting("default", o, estimated=True)
    kept = paper.kept(o, "paper_memory", 2)
    rows, drawn = [], {}
    for rate in RATES[-2:-1] if o.quick else RATES:
        for policy in POLICIES:
            if (f"{rate:g}", policy) in kept and rate != DRAWN_RPS:
                rows.append(kept[f"{rate:g}", policy])
                continue
            config = varied(base, policy=policy, rate_rps=rate * base.instance_count / 12)
            runs = [course(varied(config, seed=seed)) for seed in o.seeds]
            free, spread = (
                np.mean([f(run) for run in runs])
                for f in (lambda run: run[:, 1].mean(), lambda run: np.sqrt(run[:, 2]).mean())
            )
            preempted = np.mean([run[-1, 3] for run in runs])
            published = PUBLISHED.get(policy, "") if rate == DRAWN_RPS else ""
            rows.append([f"{rate:g}", policy, f"{free:.0f}", f"{spread:.0f}", f"{preempted:.0f}", published])
            if rate == DRAWN_RPS:
                drawn[policy] = runs[0]
    paper.publish(
        o, "paper_memory", HEAD, rows, figure="Free blocks, their variance and preemptions in a run at 32 requests/s"
    )
    panels = {
        label: {policy: [(one[0], one[column]) for one in run[::3]] for policy, run in drawn.items()}
        for column, label in ((1, "free KV blocks, mean"), (2, "variance over instances"), (3, "preemptions so far"))
    }
    paper.lines(o.figures / "paper_memory.svg", panels, f"seconds, at {DRAWN_RPS:g} requests/s")


if __name__ == "__main__":
    main()
