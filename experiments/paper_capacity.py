"""Capacity of every policy in the published settings, beside the published figures and the pooled reference.

usage: paper_capacity.py [--seeds N] [--jobs N] [--noise X] [--settings default,batch-24] [--out FOLDER]

Lengths: the oracle with log-normal noise (0: true lengths, as block-oracle). Published figures: arXiv 2508.03611; where a
policy's estimated-length figure exists it is given for noise above 0, else the oracle's.
"""

import argparse
import csv
import subprocess
from pathlib import Path

import msgspec

from block.simulate import SimulationConfig, load_config
from block.simulate.bound import pooled
from block.simulate.capacity import Capacity, find_capacity, parse_criterion
from block.simulate.config import LengthModel
from block.simulate.sweep import RunAll, runner, varied

HERE = Path(__file__).parent
POLICIES = [
    "random", "round-robin", "min-qpm", "least-outstanding", "power-of-two", "infaas++", "llumnix-minus", "nosim",
    "lmetric", "token-load", "block-paper", "block-k:k=2", "block-k:k=4", "block-k:k=8", "block-late",
]  # fmt: skip
# (setting, criterion, policy) -> published requests/s with (true, estimated) lengths.
PUBLISHED: dict[tuple[str, str, str], tuple[float | None, float | None]] = {
    ("default", "ttft_p99<=10", "random"): (26.5, 26.5),
    ("default", "ttft_p99<=10", "round-robin"): (26.5, 26.5),
    ("default", "ttft_p99<=10", "infaas++"): (30.5, 30.5),
    ("default", "ttft_p99<=10", "llumnix-minus"): (31.5, 31.5),
    ("default", "ttft_p99<=10", "block-k:k=2"): (32.4, 31.6),
    ("default", "ttft_p99<=10", "block-k:k=4"): (None, 31.9),
    ("default", "ttft_p99<=10", "block-k:k=8"): (None, 31.7),
    ("default", "ttft_p99<=10", "block-paper"): (32.6, 31.7),
    ("default", "ttft_p99<=3", "llumnix-minus"): (30.7, 30.7),
    ("default", "ttft_p99<=3", "block-paper"): (32.0, 31.1),
    ("batch-24", "ttft_p99<=3", "llumnix-minus"): (23.9, 23.9),
    ("batch-24", "ttft_p99<=3", "block-paper"): (27.9, 27.2),
    ("chunk-2048", "ttft_p99<=3", "llumnix-minus"): (29.8, 29.8),
    ("chunk-2048", "ttft_p99<=3", "block-paper"): (31.5, 30.8),
}
CRITERIA = {"default": ("ttft_p99<=3", "ttft_p99<=10"), "batch-24": ("ttft_p99<=3",), "chunk-2048": ("ttft_p99<=3",)}


def setting(name: str, noise: float) -> SimulationConfig:
    """One published setting: the default with one limit changed."""
    base = load_config(HERE / "paper-default.toml")
    group = base.instances[0]
    changes = {"default": {}, "batch-24": {"max_num_seqs": 24}, "chunk-2048": {"max_num_batched_tokens": 2048}}[name]
    group = msgspec.structs.replace(group, limits=msgspec.structs.replace(group.limits, **changes))
    lengths = LengthModel(options={"noise": noise} if noise else {})
    return msgspec.structs.replace(base, name=name, instances=[group], lengths=lengths)


def measure(name: str, criterion: str, arguments: argparse.Namespace, run_all: RunAll) -> list[list[str]]:
    """Rows of the table: every policy, and the pooled cluster last."""
    config, wanted = setting(name, arguments.noise), parse_criterion(criterion)
    seeds = range(1, arguments.seeds + 1)
    rows = []
    for policy in [*POLICIES, "(pooled)"]:
        one = pooled(config) if policy == "(pooled)" else varied(config, policy=policy)
        found = find_capacity(one, wanted, seeds, run_all, start_rps=30.0)
        true, estimated = PUBLISHED.get((name, criterion, policy), (None, None))
        rows.append(_row(name, policy, found, estimated if arguments.noise else true))
        print("  ".join(f"{cell:>14}" for cell in rows[-1]), flush=True)
    return rows


def _row(name: str, policy: str, found: Capacity, published: float | None) -> list[str]:
    against = "" if published is None else f"{found.capacity_rps / published - 1:+.1%}"
    interval = (f"{found.capacity_rps:.2f}", f"{found.ci_low:.2f}", f"{found.ci_high:.2f}")
    return [name, found.criterion, policy, *interval, "" if published is None else f"{published:g}", against]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--noise", type=float, default=0.4)
    parser.add_argument("--settings", default="default,batch-24,chunk-2048")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    arguments.out.mkdir(exist_ok=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    )
    print(f"commit {commit.stdout.strip()}, seeds 1-{arguments.seeds}, length noise {arguments.noise}")
    head = ["setting", "criterion", "policy", "capacity_rps", "ci_low", "ci_high", "published_rps", "against"]
    path = arguments.out / f"paper-capacity-noise-{arguments.noise:g}.csv"
    with path.open("w", newline="") as file, runner(arguments.jobs) as run_all:
        table = csv.writer(file)
        table.writerow(head)
        for name in arguments.settings.split(","):
            for criterion in CRITERIA[name]:
                for row in measure(name, criterion, arguments, run_all):
                    table.writerow(row)
                    file.flush()


if __name__ == "__main__":
    main()
