"""Which number of a length distribution should a what-if use? Mean, median, quantiles, or what several joint draws come to.

Run: python experiments/length_functionals.py [--rate 31] [--seeds 5] [--policy block-paper] [--lengths oracle:0.5 history]

Published 12-instance cluster (paper-default.toml), one rate near saturation, common random numbers. Means over the seeds, and
the capacity for TTFT P99 <= 3 s with ``--capacity``. `length_knowledge.py` says what lengths may be known as.

own                  what the policy itself takes (`block`: its belief, P30 of those present and the mean of the new one)
mean ... p70         that functional of every request's distribution, the new one's and those present, given what they generated
sampled              one random draw a request and what-if
scenarios k          the what-if asked with k joint draws of all lengths (a Latin hypercube), its answers averaged
number + 10          the noisy number itself, raised by ten tokens when it is passed
"""

import argparse
import csv
import subprocess
import time
from pathlib import Path

import msgspec
import numpy as np

from block.simulate import load_config
from block.simulate.capacity import find_capacity, parse_criterion
from block.simulate.sweep import varied
from length_knowledge import Knowledge, run

CONFIG = Path(__file__).parent / "paper-default.toml"
FUNCTIONALS = ("own", "mean", "p30", "median", "p70", "sampled")
SCENARIOS = (4, 8)
FIGURES = ("ttft_s_mean", "ttft_s_p99", "e2e_s_mean", "e2e_s_p99", "preemptions")


def cases(lengths: list[str]) -> list[tuple[str, Knowledge]]:
    listed: list[tuple[str, Knowledge]] = []
    for kind in lengths:
        listed += [(f"{kind}, {functional}", Knowledge(kind, functional)) for functional in FUNCTIONALS]
        listed += [(f"{kind}, scenarios {k}", Knowledge(kind, scenarios=k)) for k in SCENARIOS]
        if kind.startswith("oracle:"):
            listed.append((f"{kind}, number + 10", Knowledge(kind.replace("oracle", "number"))))
    return listed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=31.0)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--policy", default="block-paper")
    parser.add_argument("--lengths", nargs="+", default=["oracle:0.5", "history"])
    parser.add_argument("--capacity", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=here
    )
    print(
        f"commit {commit.stdout.strip()}, {options.policy}, {options.rate} requests/s, seeds 1-{options.seeds}",
        flush=True,
    )
    base = varied(load_config(CONFIG), policy=options.policy, rate_rps=options.rate)
    base = msgspec.structs.replace(base, workload=msgspec.structs.replace(base.workload, requests=options.requests))
    name = f"length-functionals-{options.policy.replace(':', '-')}.csv"
    with (options.out / name).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["case", *FIGURES, "cpu_us_a_request", "capacity_rps"])
        for label, known in cases(options.lengths):
            started = time.process_time()
            runs = [run(varied(base, seed=seed), known) for seed in range(1, options.seeds + 1)]
            each_us = (time.process_time() - started) / options.seeds / options.requests * 1e6
            row: list[str] = [f"{np.mean([getattr(one, figure) for one in runs]):.3f}" for figure in FIGURES]
            held = ""
            if options.capacity:
                found = find_capacity(
                    base, parse_criterion("ttft_p99<=3"), range(1, options.seeds + 1),
                    lambda configs, known=known: [run(config, known) for config in configs], start_rps=30.5,
                )  # fmt: skip
                held = f"{found.capacity_rps:.2f}"
            table.writerow([label, *row, f"{each_us:.0f}", held])
            file.flush()
            print(f"{label:32}", *(f"{cell:>9}" for cell in row), f"{each_us:7.0f} us", held, flush=True)


if __name__ == "__main__":
    main()
