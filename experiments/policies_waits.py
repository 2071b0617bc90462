"""Who waits near the knee, and for what: prompts by length, held at the gateway, against the free blocks of the instances.

    python experiments/policies_waits.py [--rate 31] [--seeds 11-15] [--policy block]

Default setting and lengths of policies_capacity.py, on seeds that its table does not report. Prints, and writes
results/policies-waits.csv: per class of prompt tokens the requests, those later than 3 s, mean seconds at the gateway and mean
TTFT; then the free KV blocks an instance at every decision after the first minute (mean, largest of the twelve).
"""

import argparse
import csv
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from block.core import Decision
from block.simulate import simulate
from block.simulate.instance import Instance
from block.simulate.sweep import varied
from policies_capacity import setting

CLASSES = (0, 500, 1000, 2000, 3000, 4096)
FILLED_S, LATE_S = 60.0, 3.0
HEAD = ["prompt_tokens", "requests", "late", "held_mean_s", "ttft_mean_s", "ttft_max_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=31.0)
    parser.add_argument("--seeds", default="11-15")
    parser.add_argument("--policy", default="block")
    arguments = parser.parse_args()
    first, _, last = arguments.seeds.partition("-")
    seen: list[tuple[int, float, float]] = []  # prompt tokens, seconds held, TTFT
    free: list[list[int]] = []
    for seed in range(int(first), int(last or first) + 1):
        config = varied(setting("default"), policy=arguments.policy, rate_rps=arguments.rate, seed=seed)
        sent_s: dict[int, float] = {}

        def watch(
            number: int, decision: Decision, instances: Sequence[Instance], now_s: float, sent_s: dict[int, float] = sent_s
        ) -> None:  # fmt: skip
            sent_s[number] = now_s
            if now_s > FILLED_S:
                free.append([one.view.engine.load()[3] for one in instances])

        for number, row in enumerate(simulate(config, on_decision=watch)):
            assert row.ttft_s is not None
            seen.append((row.prompt_tokens, sent_s[number] - row.intended_s, row.ttft_s))
    prompts, held_s, ttft_s = np.array(seen).T
    rows = []
    for low, high in pairwise(CLASSES):
        these = (prompts >= low) & (prompts < high)
        rows.append([f"{low}-{high}", int(these.sum()), int((ttft_s[these] > LATE_S).sum()), f"{held_s[these].mean():.2f}",
                     f"{ttft_s[these].mean():.2f}", f"{ttft_s[these].max():.1f}"])  # fmt: skip
    blocks = np.array(free)
    rows.append(["free blocks", len(blocks), "", f"{blocks.mean():.0f}", f"{blocks.max(axis=1).mean():.0f}", ""])
    for row in [HEAD, *rows]:
        print("  ".join(map(str, row)))
    with (Path(__file__).parent / "results" / "policies-waits.csv").open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([HEAD, *rows])


if __name__ == "__main__":
    main()
