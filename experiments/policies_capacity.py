"""Capacity of `block` against every baseline, in the settings in which the founding targets are set, with the bounds.

    python experiments/policies_capacity.py SETTING ... [--seeds 3-7] [--policies a,b] [--jobs N]

SETTING: default (published setting), batch-24, heterogeneous (half of the instances at half the speed), mooncake (conversation
trace with prefix caches; put mooncake-conversation.jsonl.gz into the folder that BLOCK_TRACES names). Lengths: estimates with
40 % log-normal noise, in mooncake the history estimator. Policies were tuned on seeds 1, 2 and 11-18: the others are
reported. Criterion: TTFT P99 <= 3 s; in mooncake 8 s, for its longest prompts alone take 5 s. Writes
results/policies-SETTING.csv.
"""

import argparse
import csv
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from block.errors import UserError
from block.simulate import SimulationConfig, load_config
from block.simulate.bound import packed, pooled, work_bound_rps
from block.simulate.capacity import Capacity, find_capacity, parse_criterion
from block.simulate.config import LengthModel
from block.simulate.sweep import RunAll, runner, varied
from block.workload.offer import offer

HERE = Path(__file__).parent
POLICIES = [
    "round-robin", "least-outstanding", "power-of-two", "infaas++", "llumnix-minus", "nosim", "lmetric", "token-load",
    "learned", "block-paper", "block",
]  # fmt: skip
AFFINE = ["prefix-affinity", "consistent-hash"]
POOLED, PACKED, KNOWING = "(pooled)", "(packed)", "(true lengths)"
"""The hardware as one engine: first come; and with true lengths, the smallest first (`block.simulate.bound`). The hardware as
it is, and all that can be known of lengths."""
START = {"default": 30.5, "batch-24": 26.5, "heterogeneous": 22.5, "mooncake": 10.0}
"""Where the search begins, requests/s."""
NEAR = {
    ("default", "block"): 31.0, ("default", "llumnix-minus"): 30.0, ("default", "least-outstanding"): 28.0,
    ("default", POOLED): 31.1, ("default", PACKED): 32.3, ("batch-24", "llumnix-minus"): 23.2, ("batch-24", "infaas++"): 23.2,
    ("batch-24", "least-outstanding"): 26.1, ("batch-24", "block"): 27.0, ("batch-24", "block-paper"): 27.0,
    ("heterogeneous", "llumnix-minus"): 22.3, ("heterogeneous", "infaas++"): 20.6, ("heterogeneous", "block-paper"): 18.0,
    ("heterogeneous", "least-outstanding"): 18.5, ("heterogeneous", "token-load"): 20.1, ("heterogeneous", "block"): 23.5,
    ("default", KNOWING): 31.4, ("batch-24", KNOWING): 27.2, ("heterogeneous", KNOWING): 23.5, ("mooncake", KNOWING): 13.0,
    ("mooncake", "block"): 13.0, ("mooncake", "block-paper"): 13.0,
}  # fmt: skip
"""Better guesses, which save runs."""


def setting(name: str) -> SimulationConfig:
    """A setting by name."""
    if name == "mooncake":
        config = load_config(HERE / "mooncake.toml")
        trace = str(Path(os.environ.get("BLOCK_TRACES", HERE)) / "mooncake-conversation.jsonl.gz")
        return msgspec.structs.replace(config, workload=msgspec.structs.replace(config.workload, trace=trace))
    config = load_config(HERE / ("paper-heterogeneous.toml" if name == "heterogeneous" else "paper-default.toml"))
    if name == "batch-24":
        group = config.instances[0]
        group = msgspec.structs.replace(group, limits=msgspec.structs.replace(group.limits, max_num_seqs=24))
        config = msgspec.structs.replace(config, instances=[group])
    return msgspec.structs.replace(config, name=name, lengths=LengthModel(options={"noise": 0.4}))


def of_policy(config: SimulationConfig, policy: str) -> SimulationConfig:
    """The configuration with a policy, or with a reference in place of one."""
    if policy == POOLED:
        return pooled(config)
    if policy == KNOWING:
        return msgspec.structs.replace(varied(config, policy="block"), lengths=LengthModel())
    return packed(config) if policy == PACKED else varied(config, policy=policy)


def measure(name: str, policies: list[str], seeds: list[int], run_all: RunAll) -> Iterator[dict[str, str]]:
    """One row a policy."""
    config = setting(name)
    criterion = parse_criterion("ttft_p99<=8" if name == "mooncake" else "ttft_p99<=3")
    bound = work_bound_rps(config, offer(config.workload, seeds[0])) if name != "mooncake" else None
    for policy in policies:
        found: Capacity = find_capacity(
            of_policy(config, policy),
            criterion,
            seeds,
            run_all,
            start_rps=NEAR.get((name, policy), START[name]),
            first_step=1.02,
            tolerance=0.05,
        )
        row = {
            "setting": name, "criterion": criterion.text, "policy": policy, "capacity_rps": f"{found.capacity_rps:.3f}",
            "ci_low": f"{found.ci_low:.3f}", "ci_high": f"{found.ci_high:.3f}",
            "seeds": " ".join(map(str, seeds)), "per_seed": " ".join(f"{rps:.3f}" for rps in found.per_seed),
            "of_work_bound": "" if bound is None else f"{found.capacity_rps / bound:.3f}",
        }  # fmt: skip
        print("  ".join(row.values()), flush=True)
        yield row


def kept(path: Path, policies: list[str] | None) -> list[dict[str, str]]:
    """Rows of an existing table that are not measured again."""
    if policies is None or not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["policy"] not in policies]


def table() -> str:
    """The results of all settings as the document's table, best first."""
    lines = [
        "| setting | policy | requests/s | interval | of the best reference | block against it |",
        "|---|---|---|---|---|---|",
    ]
    for name in START:
        with (HERE / "results" / f"policies-{name}.csv").open(newline="", encoding="utf-8") as file:
            rows = sorted(csv.DictReader(file), key=lambda row: -float(row["capacity_rps"]))
        found = {row["policy"]: float(row["capacity_rps"]) for row in rows}
        best = max((rps for policy, rps in found.items() if policy in (POOLED, PACKED)), default=None)
        for row in rows:
            rps = found[row["policy"]]
            against = "" if row["policy"] == "block" else f"{found['block'] / rps - 1:+.1%}"
            share = "" if best is None else f"{rps / best:.1%}"
            interval = f"{float(row['ci_low']):.2f} - {float(row['ci_high']):.2f}"
            lines.append(f"| {name} | {row['policy']} | {rps:.2f} | {interval} | {share} | {against} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=", ".join(START))
    parser.add_argument("--table", action="store_true", help="print what has been measured as the document's table")
    parser.add_argument("--seeds", default="3-7")
    parser.add_argument("--policies", help="measure these again and keep the other rows of the table")
    parser.add_argument("--jobs", type=int)
    arguments = parser.parse_args()
    if unknown := set(arguments.settings) - set(START):
        parser.error(f"there is no setting {', '.join(unknown)}: there are {', '.join(START)}")
    if arguments.table:
        print(table())
        return
    first, _, last = arguments.seeds.partition("-")
    seeds = list(range(int(first), int(last or first) + 1))
    again = arguments.policies.split(",") if arguments.policies else None
    (HERE / "results").mkdir(exist_ok=True)
    with runner(arguments.jobs) as run_all:
        for name in arguments.settings:
            references = [KNOWING] if name in ("heterogeneous", "mooncake") else [KNOWING, POOLED, PACKED]
            policies = again or [*POLICIES, *(AFFINE if name == "mooncake" else []), *references]
            path = HERE / "results" / f"policies-{name}.csv"
            rows = kept(path, again)
            for row in measure(name, policies, seeds, run_all):
                rows.append(row)
                with path.open("w", newline="", encoding="utf-8") as out:
                    file = csv.DictWriter(out, list(row))
                    file.writeheader()
                    file.writerows(rows)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"{error} BLOCK_TRACES names the folder of the traces." if "trace" in str(error) else str(error))
