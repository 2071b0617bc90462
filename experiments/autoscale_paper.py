"""The published provisioning experiment: 24 requests/s on 12 x A30 Llama-2-7B, from 6 instances, against a static 10.

usage: autoscale_paper.py [--out FOLDER] [--requests N] [--policy NAME]

The threshold on the best predicted E2E is 70 s, spares start at once (as published) or take 30 and 120 s. Lengths are
ShareGPT's, the gateway's policy is `block`; rows go to FOLDER/autoscale-paper.csv.
"""

import argparse
import csv
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
    arguments = parser.parse_args()
    workload = WorkloadConfig(rate_rps=24.0, requests=arguments.requests, total_tokens_max=4096)
    offered = offer(workload, 1)
    config = SimulationConfig(policy=arguments.policy)
    table = []
    for cold_s in (0.0, 30.0, 120.0):
        kind = Kind(profile="a30-llama2-7b", limits=LIMITS, most=12, cold_start_s=cold_s)
        for text, start in RUNS:
            if text.startswith("static") and cold_s > 0:
                continue
            controller = controller_from(text, [kind], SLO)
            guard = msgspec.structs.replace(AT_ONCE, settle_s=240.0) if text.startswith("replay") else AT_ONCE
            interval_s = 10.0 if text.startswith("replay") else 1.0
            setting = Setting(kinds=(kind,), start={kind.name: start}, guard=guard, interval_s=interval_s)
            done = provision_cluster(config, offered, controller, setting)
            e2e_s = [row.e2e_s for row in done.rows if row.e2e_s is not None]
            ttft_s = [row.ttft_s for row in done.rows if row.ttft_s is not None]
            table.append({
                "controller": text, "cold_start_s": cold_s, "requests": len(done.rows), "lost": len(done.rows) - len(e2e_s),
                "slo_met_percent": 100 * sum(meets(row, SLO) for row in done.rows) / len(done.rows),
                "ttft_s_p99": percentile(ttft_s, 99), "e2e_s_mean": float(np.mean(e2e_s)), "e2e_s_p99": percentile(e2e_s, 99),
                "instances_mean": sum(done.instance_s.values()) / done.steps[-1].at_s,
                "instances_end": done.steps[-1].ready, "actions": done.actions,
            })  # fmt: skip
            print(line(table[-1]), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "autoscale-paper.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows({key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items()} for row in table)


if __name__ == "__main__":
    main()
