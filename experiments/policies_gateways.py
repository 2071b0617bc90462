"""Several gateways with snapshots of some age: how much they herd, and what cures it.

    python experiments/policies_gateways.py [--rate 28] [--seeds 3,4,5] [--gateways 1,2,4,8] [--intervals-ms 10,50,100,500]

The published setting at a rate near its capacity: gateways that share nothing, each with snapshots of some age. Policies: block,
block that draws among costs that are within 2 %, block without what each gateway knows of its own dispatches (blind), among
k = 4 at random, the published rule, the best counter. Herding: the mean over seconds of the largest share of a second's
requests that one instance got, times the number of instances (1: even). Writes results/policies-gateways.csv, replacing the
rows of what it measures and keeping the others, and prints means over the seeds. With --capacity instead: requests/s of block
at TTFT P99 <= 3 s, 10,000 requests a run, into results/policies-gateways-capacity.csv.
"""

import argparse
import csv
from collections import Counter, defaultdict
from pathlib import Path

import msgspec
import numpy as np

from block.metrics.row import Row
from block.metrics.summary import summarize
from block.simulate import SimulationConfig, load_config, simulate
from block.simulate.capacity import find_capacity, parse_criterion
from block.simulate.config import GatewayModel, LengthModel
from block.simulate.sweep import run_one, varied

HERE = Path(__file__).parent
CURES = {
    "block": ("block", True), "block:near=0.02": ("block:near=0.02", True), "block, blind": ("block", False),
    "block-k, k = 4": ("block-k:k=4", True), "block-paper": ("block-paper", True), "llumnix-minus": ("llumnix-minus", True),
}  # fmt: skip


def herding(rows: list[Row], instances: int) -> float:
    """1 where every second's requests are spread evenly; the number of instances where all go to one."""
    seconds: dict[int, Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row.instance is not None:
            seconds[int(row.intended_s)][row.instance] += 1
    shares = [max(count.values()) / sum(count.values()) for count in seconds.values()]
    return float(np.mean(shares)) * instances


def one(config: SimulationConfig, gateways: int, interval_s: float, seed: int, *, accounting: bool) -> dict[str, str]:
    """Figures of one run."""
    model = GatewayModel(
        count=gateways, snapshot_interval_s=interval_s, snapshot_delay_s=0.002, in_flight_accounting=accounting
    )
    config = msgspec.structs.replace(config, gateways=model, seed=seed)
    rows = simulate(config)
    found = summarize(rows, config.slo, warmup_fraction=0.1)
    return {
        "ttft_p50_s": f"{found.ttft_s_p50:.4f}", "ttft_p99_s": f"{found.ttft_s_p99:.3f}",
        "e2e_mean_s": f"{found.e2e_s_mean:.3f}", "preemptions": str(found.preemptions),
        "herding": f"{herding(rows, config.instance_count):.3f}",
    }  # fmt: skip


def as_table() -> str:
    """P99 of TTFT and herding of what was measured, means over the seeds."""
    with (HERE / "results" / "policies-gateways.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    cells: dict[tuple[int, float], dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[int(row["gateways"]), float(row["snapshot_ms"])][row["policy"]].append(row)
    lines = ["| gateways | snapshots every | " + " | ".join(CURES) + " |", "|---|---|" + "---|" * len(CURES)]
    for (gateways, interval_ms), of in sorted(cells.items()):
        line = f"| {gateways} | {interval_ms:g} ms |"
        for name in CURES:
            if not of[name]:
                line += " |"
                continue
            p99_s, uneven = (np.mean([float(row[field]) for row in of[name]]) for field in ("ttft_p99_s", "herding"))
            line += f" {p99_s:.2f} ({uneven:.2f}) |"
        lines.append(line)
    return "\n".join(lines)


def capacities(arguments: argparse.Namespace, base: SimulationConfig) -> None:
    """The capacity of block with so many gateways and snapshots so old."""
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    base = msgspec.structs.replace(base, workload=msgspec.structs.replace(base.workload, requests=10_000))
    path, rows = HERE / "results" / "policies-gateways-capacity.csv", []
    for interval_ms in map(float, arguments.intervals_ms.split(",")):
        for gateways in map(int, arguments.gateways.split(",")):
            model = GatewayModel(count=gateways, snapshot_interval_s=interval_ms / 1e3, snapshot_delay_s=0.002)
            config = msgspec.structs.replace(varied(base, policy="block"), gateways=model)
            found = find_capacity(
                config, parse_criterion("ttft_p99<=3"), seeds, lambda configs: [run_one(one) for one in configs],
                start_rps=30.5, first_step=1.02, tolerance=0.05,
            )  # fmt: skip
            rows.append({
                "gateways": gateways, "snapshot_ms": f"{interval_ms:g}", "capacity_rps": f"{found.capacity_rps:.2f}",
                "ci_low": f"{found.ci_low:.2f}", "ci_high": f"{found.ci_high:.2f}", "seeds": arguments.seeds,
                "per_seed": " ".join(f"{rps:.2f}" for rps in found.per_seed),
            })  # fmt: skip
            print("  ".join(map(str, rows[-1].values())), flush=True)
            with path.open("w", newline="", encoding="utf-8") as out:
                table = csv.DictWriter(out, list(rows[0]))
                table.writeheader()
                table.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=28.0)
    parser.add_argument("--requests", type=int, default=2500)
    parser.add_argument("--seeds", default="3,4,5")
    parser.add_argument("--gateways", default="1,2,4,8")
    parser.add_argument("--intervals-ms", default="10,50,100,500")
    parser.add_argument("--policies", nargs="*", choices=list(CURES), help="only these [all]")
    parser.add_argument("--capacity", action="store_true")
    parser.add_argument("--table", action="store_true", help="print what has been measured as the document's table")
    arguments = parser.parse_args()
    base = load_config(HERE / "paper-default.toml")
    workload = msgspec.structs.replace(base.workload, requests=arguments.requests)
    base = msgspec.structs.replace(base, workload=workload, lengths=LengthModel(options={"noise": 0.4}))
    if arguments.table:
        print(as_table())
        return
    if arguments.capacity:
        capacities(arguments, base)
        return
    path, keys = HERE / "results" / "policies-gateways.csv", ("gateways", "snapshot_ms", "policy", "seed")
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows = {tuple(row[key] for key in keys): row for row in csv.DictReader(file)}
    for gateways in map(int, arguments.gateways.split(",")):
        for interval_ms in map(float, arguments.intervals_ms.split(",")):
            for name in arguments.policies or CURES:
                policy, accounting = CURES[name]
                config = varied(base, policy=policy, rate_rps=arguments.rate)
                found = []
                for seed in map(int, arguments.seeds.split(",")):
                    row = dict(zip(keys, (str(gateways), f"{interval_ms:g}", name, str(seed)), strict=True))
                    row |= one(config, gateways, interval_ms / 1e3, seed, accounting=accounting)
                    rows[tuple(row[key] for key in keys)] = row
                    found.append(row)
                p99_s, uneven = (np.mean([float(row[field]) for row in found]) for field in ("ttft_p99_s", "herding"))
                print(f"{gateways} gateways, {interval_ms:g} ms, {name}: {p99_s:.2f} s ({uneven:.2f})", flush=True)
                with path.open("w", newline="", encoding="utf-8") as out:
                    table = csv.DictWriter(out, list(found[0]))
                    table.writeheader()
                    table.writerows(rows.values())


if __name__ == "__main__":
    main()
