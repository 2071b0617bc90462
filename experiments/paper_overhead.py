"""What deciding costs: the what-if, a gateway's decision over 12 instances, processor share and memory, beside the published
prototype's.

Published: the figure of processor and memory use of the predictors. Times are processor time, so a busy machine moves them
little. The share at 20 requests/s is decisions only, as the published one counts predictor processes only.
"""

import resource
import sys

import paper
from block.predict.bench import measure_whatif

sys.path.insert(0, str(paper.ROOT / "bench" / "gateway"))
from decision import measure

RATE_RPS = 20.0
INSTANCES = 12
HEAD = ["what", "ours", "published"]


def main() -> None:
    o = paper.options(__doc__, seeds=1)
    timings = {one.scenario: one for one in measure_whatif(0.05 if o.quick else 1.0, "a30-llama2-7b")}
    decisions = 50 if o.quick else 2000
    spent_us = {
        policy: measure(policy, INSTANCES, 1, decisions, None)
        for policy in ("llumnix-minus", "block-k:k=2", "block-paper")
    }
    memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    everyone, two = spent_us["block-paper"], spent_us["block-k:k=2"]
    rows = [
        ["one prediction, 48 running", f"{timings['light'].median_us:.0f} us", "62-80 ms"],
        ["one prediction, KV cache full, 50 waiting", f"{timings['full cache'].median_us:.0f} us", "-"],
        ["one decision, asking 2 of 12", f"{two:.0f} us", "-"],
        ["one decision, asking all 12", f"{everyone:.0f} us", "23-29 ms of scheduling overhead at low load"],
        ["one decision of llumnix-minus", f"{spent_us['llumnix-minus']:.0f} us", "-"],
        [
            "processor for predictions at 20 requests/s, asking 2, all instances",
            _share(two),
            "20 % of a core, each of 192 predictors",
        ],
        ["the same, asking all 12", _share(everyone), "56 % of a core, each of 192 predictors"],
        [
            "memory of the process that decides, mirrors of 12 instances included",
            f"{memory_mb:.0f} MB",
            "1.8 GB, each of 192 predictors",
        ],
    ]
    paper.publish(
        o, "paper_overhead", HEAD, rows, figure="Microseconds of a prediction and of a decision", simulated=False
    )
    pyplot = paper.drawing()
    figure, ax = pyplot.subplots(figsize=(6, 2.6), layout="constrained")
    shown = {
        "one prediction, published": 71_000.0,
        "one prediction": timings["light"].median_us,
        "decision, k = 2": two,
        "decision, all 12": everyone,
    }
    ax.barh(list(shown), list(shown.values()), color=["C1", "C0", "C0", "C0"])
    ax.set(xscale="log", xlabel="microseconds")
    paper.save(figure, o.figures / "paper_overhead.svg")


def _share(decision_us: float) -> str:
    return f"{decision_us * 1e-6 * RATE_RPS:.2%} of a core in all"


if __name__ == "__main__":
    main()
