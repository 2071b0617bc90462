"""Days of conversation, code and mixed traffic under every controller at several settings: misses against GPU hours.

usage: autoscale_days.py TRACES [--workloads conv,code,both] [--cold 120,30,0,300] [--seed N] [--days N] [--only PATTERN]
                         [--out FOLDER]

TRACES is a folder with azure-2023-conv.csv.gz and azure-2023-code.csv.gz. An instance is a Qwen2-7B on an A30. The first
day is history (the season's) and is not judged. A row a run is added to FOLDER/autoscale-days.csv as it ends; runs that are
there already are skipped. The static pools and the reactive rules run at the first of the cold starts only.
"""

import argparse
import csv
import re
import time
from pathlib import Path

import numpy as np

from autoscale_report import HERE, append, line
from autoscale_traffic import DAY_S, days, mixed
from block.autoscale.controllers import controller_from, guard_for
from block.autoscale.terms import Kind
from block.core import Slo
from block.engine.limits import EngineLimits
from block.simulate.optimum import optimum
from block.simulate.provision import Outcome, Setting, Traffic, provision, within

LIMITS = EngineLimits(max_num_seqs=64, max_num_batched_tokens=2048, num_gpu_blocks=7290, max_model_len=16384)
SLOS = {"conv": Slo(ttft_s=3.0, tpot_s=0.15), "code": Slo(ttft_s=5.0), "both": Slo(ttft_s=5.0)}
PEAKS_RPS = {"conv": 16.0, "code": 5.0, "both": 12.0}
INTERVAL_S = 30.0
STATIC = {"conv": (4, 5, 6, 7, 8, 9, 10, 11), "code": (4, 6, 8, 10, 12, 14, 16), "both": (5, 6, 7, 8, 9, 10, 12)}
REPLAYS = ["replay", "replay:target=0.998", "replay:target=0.97"]
HPA_RPS = {"conv": (1.4, 1.7, 2.0, 2.3, 2.6), "code": (0.2, 0.3, 0.45, 0.7), "both": (0.8, 1.1, 1.4, 1.7, 2.0)}
OTHERS = [
    *(f"hpa-kv:target={target}" for target in (0.1, 0.15, 0.25)),
    *(f"hpa-queue:target={target}" for target in (0.25, 1.0)),
    "relief:ttft_s=3,quantile=0.99,waits=1,remove_below=0.4", "relief:ttft_s=1.5,quantile=0.99,waits=1,remove_below=0.5",
    "preempt", "preempt:threshold_s=40,per_request=0,waits=1,remove_below_s=20",
]  # fmt: skip
ALLOWED = (0.0, 0.003, 0.01, 0.03)
FIELDS = [
    "workload", "seed", "cold_start_s", "controller", "requests", "missed_percent", "ttft_s_p99", "gpu_hours_day", "actions_day",
    "over_percent", "under_percent", "lost", "cpu_s",
]  # fmt: skip


def traffic_of(workload: str, folder: Path, seed: int, count: int) -> Traffic:
    """The days of a workload."""
    if workload == "both":
        return mixed(folder, peak_rps=PEAKS_RPS["both"], seed=seed, count=count)
    return days(folder, workload, peak_rps=PEAKS_RPS[workload], seed=seed, count=count)


def judged(
    done: Outcome, traffic: Traffic, slo: Slo, needed: np.ndarray, first_s: float, last_s: float
) -> dict[str, object]:
    """The figures of the days from ``first_s`` on. Over- and under-provisioned: against the clairvoyant need of the minute."""
    which = traffic.at_s >= first_s
    met = within(done.ttft_s, done.e2e_s, done.outputs, slo)[which]
    steps = [step for step in done.steps if first_s < step.at_s <= last_s]
    ready = np.array([step.ready for step in steps])
    need = needed[np.minimum((np.array([step.at_s for step in steps]) / 60.0).astype(int), len(needed) - 1)]
    paid = np.array([step.ready + step.starting + step.draining for step in steps])
    length_days = (last_s - first_s) / DAY_S
    return {
        "requests": int(which.sum()), "missed_percent": 100 * (1 - met.mean()),
        "ttft_s_p99": float(np.nanpercentile(done.ttft_s[which], 99)),
        "gpu_hours_day": float(paid.sum() * INTERVAL_S / 3600 / length_days),
        "actions_day": float(np.count_nonzero(np.diff([sum(step.want.values()) for step in steps])) / length_days),
        "over_percent": 100 * float((ready > need).mean()), "under_percent": 100 * float((ready < need).mean()),
        "lost": int(np.isnan(done.e2e_s).sum()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path)
    parser.add_argument("--workloads", default="conv,code,both")
    parser.add_argument("--cold", default="120,30,0,300")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--days", type=int, default=2)
    parser.add_argument("--only", default=".*", help="a regular expression of controllers")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "autoscale-days.csv"
    known = set()
    if results.exists():
        with results.open() as file:
            known = {
                (r["workload"], r["seed"], float(r["cold_start_s"]), r["controller"]) for r in csv.DictReader(file)
            }
    for workload in arguments.workloads.split(","):
        traffic = traffic_of(workload, arguments.traces, arguments.seed, arguments.days)
        for number, cold in enumerate(arguments.cold.split(",")):
            kind = Kind(profile="a30-qwen2-7b", limits=LIMITS, most=20, cold_start_s=float(cold))
            names = [
                *(f"optimum:allowed={allowed}" for allowed in ALLOWED),
                *REPLAYS,
                *(f"hpa-rps:target={target}" for target in HPA_RPS[workload]),
                *((*OTHERS, *(f"static:count={count}" for count in STATIC[workload])) if number == 0 else ()),
            ]
            needed = None
            for name in names:
                if (workload, str(arguments.seed), kind.cold_start_s, name) in known or not re.fullmatch(
                    arguments.only, name
                ):
                    continue
                if needed is None:
                    needed = optimum(traffic, kind, SLOS[workload], 0.01).needed
                row = {
                    "workload": workload,
                    "seed": arguments.seed,
                    "cold_start_s": kind.cold_start_s,
                    "controller": name,
                }
                row |= run(name, traffic, kind, SLOS[workload], needed, arguments.days)
                append(results, row, FIELDS)
                print(line(row), flush=True)


def run(name: str, traffic: Traffic, kind: Kind, slo: Slo, needed: np.ndarray, count: int) -> dict[str, object]:
    """One controller, or the clairvoyant optimum, on the days after the first."""
    start_s, end_s, began = DAY_S, count * DAY_S, time.process_time()
    if name.startswith("optimum"):
        later = traffic.at_s >= start_s
        part = Traffic(traffic.at_s[later] - start_s, traffic.prompts[later], traffic.outputs[later])
        best = optimum(part, kind, slo, float(name.partition("=")[2]))
        return {
            "requests": int(later.sum()), "missed_percent": 100 * best.missed,
            "gpu_hours_day": best.instance_s / 3600 / (count - 1), "cpu_s": time.process_time() - began,
        }  # fmt: skip
    start = int(name.rpartition("=")[2]) if name.startswith("static") else 3
    setting = Setting(
        kinds=(kind,), start={kind.name: start}, guard=guard_for(name), interval_s=INTERVAL_S,
        predicts=name.startswith("preempt"),
    )  # fmt: skip
    done = provision(traffic, controller_from(name, [kind], slo), setting)
    return judged(done, traffic, slo, needed, start_s, end_s) | {"cpu_s": time.process_time() - began}


if __name__ == "__main__":
    main()
