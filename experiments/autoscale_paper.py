"""The published provisioning experiment: 24 requests/s on 12 x A30 Llama-2-7B, from 6 instances, against a static 10.

usage: autoscale_paper.py [--out FOLDER] [--requests N] [--policy NAME] [--only PATTERN]

The threshold on the best predicted E2E is 70 s, spares start at once (as published) or take 30 and 120 s. Lengths are
ShareGPT's, the gateway's policy is `block`; rows go to FOLDER/autoscale-paper.csv, where those of before are replaced.
"""

import argparse
import csv
import re
from pathlib import Path

import msgspec
import numpy as np

from autoscale_report import HERE, line
from block.autoscale.controllers import Guard, controller_from
from block.autoscale.terms import Kind
from block.core import Slo
from block.engine.limits import EngineLimits
from block.metrics.summary import meets, percentile
from block.simulate.config import SimulationConfig
from block.simulate.membership import provision_cluster
from block.simulate.provision import Setting
from block.workload.offer import WorkloadConfig, offer

SLO = Slo(ttft_s=3.0)
LIMITS = EngineLimits(
    max_num_seqs=48, max_num_batched_tokens=512, num_gpu_blocks=1053, max_model_len=4096, async_scheduling=False
)
AT_ONCE = Guard(settle_s=0.0)
RUNS = [
    ("static:count=10", 10), ("static:count=6", 6), ("preempt:threshold_s=70", 6), ("relief:threshold_s=70", 6),
    ("preempt:threshold_s=70,per_request=0,waits=1", 6), ("replay", 6),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--policy", default="block")
    parser.add_argument("--only", default=".*", help="a regular expression of controllers")
    arguments = parser.parse_args()
    results = arguments.out / "autoscale-paper.csv"
    results.parent.mkdir(parents=True, exist_ok=True)
    workload = WorkloadConfig(rate_rps=24.0, requests=arguments.requests, total_tokens_max=4096)
    offered = offer(workload, 1)
    config = SimulationConfig(policy=arguments.policy)
    for cold_s in (0.0, 30.0, 120.0):
        kind = Kind(profile="a30-llama2-7b", limits=LIMITS, most=12, cold_start_s=cold_s)
        for text, start in RUNS:
            if (text.startswith("static") and cold_s > 0) or not re.fullmatch(arguments.only, text):
                continue
            controller = controller_from(text, [kind], SLO)
            guard = msgspec.structs.replace(AT_ONCE, settle_s=240.0) if text.startswith("replay") else AT_ONCE
            interval_s = 10.0 if text.startswith("replay") else 1.0
            setting = Setting(kinds=(kind,), start={kind.name: start}, guard=guard, interval_s=interval_s)
            done = provision_cluster(config, offered, controller, setting)
            e2e_s = [row.e2e_s for row in done.rows if row.e2e_s is not None]
            ttft_s = [row.ttft_s for row in done.rows if row.ttft_s is not None]
            row = {
                "controller": text, "cold_start_s": cold_s, "requests": len(done.rows), "lost": len(done.rows) - len(e2e_s),
                "slo_met_percent": 100 * sum(meets(row, SLO) for row in done.rows) / len(done.rows),
                "ttft_s_p99": percentile(ttft_s, 99), "e2e_s_mean": float(np.mean(e2e_s)), "e2e_s_p99": percentile(e2e_s, 99),
                "instances_mean": sum(done.instance_s.values()) / done.steps[-1].at_s,
                "instances_end": done.steps[-1].ready, "actions": done.actions,
            }  # fmt: skip
            print(line(row), flush=True)
            write(
                results, {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items()}
            )


def write(path: Path, row: dict[str, str]) -> None:
    """Put a row in the place of the same run's of before, or at the end."""
    table: list[dict[str, str]] = []
    if path.exists():
        with path.open() as file:
            table = list(csv.DictReader(file))
    same = [(one["controller"], float(one["cold_start_s"])) for one in table]
    run = row["controller"], float(row["cold_start_s"])
    if run in same:
        table[same.index(run)] = row
    else:
        table.append(row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    main()
