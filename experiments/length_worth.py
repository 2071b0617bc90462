"""What output lengths are worth in the published 12-instance cluster: capacity by what is known of them, and a heat map of noise.

Run: python experiments/length_worth.py told --sets FOLDER [--out FOLDER]      what the learned estimator tells of unseen prompts
     python experiments/length_worth.py capacity [--policies block block-paper] [--seeds 5] [--out FOLDER]
     python experiments/length_worth.py heatmap [--seeds 3] [--out FOLDER]     noise x rate: CSV and picture

`length_knowledge.py` says what each kind of knowledge is. Settings: paper-default.toml (12 x A30, ShareGPT lengths).
"""

import argparse
import csv
import subprocess
import time
from pathlib import Path

import msgspec
import numpy as np

from block.length.data.sets import read_records
from block.simulate import SimulationConfig, load_config
from block.simulate.capacity import find_capacity, parse_criterion
from block.simulate.sweep import varied
from block.workload.offer import offer
from length_knowledge import Knowledge, error_figures, run, told_out_of_fold

CONFIG = Path(__file__).parent / "paper-default.toml"
TOLD = ("8min_up_and_down", "halueval-general", "codegen-instruct")
"""Sets of one served model each, from the weakest cues to the strongest."""

NOISES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
RATES = (28.0, 29.0, 30.0, 31.0, 32.0, 33.0)
FIGURES = ("ttft_s_mean", "ttft_s_p99", "e2e_s_mean", "preemptions")


def tell(sets: Path, out: Path) -> None:
    for name in TOLD:
        records = [r for r in read_records([sets]) if r.dataset == name]
        true, survivals = told_out_of_fold(records)
        np.savez_compressed(out / f"told-{name}.npz", true=true, survivals=survivals.astype(np.float32))
        print(name, len(true), flush=True)


def capacity(base: SimulationConfig, policies: list[str], criteria: list[str], seeds: int, out: Path) -> None:
    offered = offer(base.workload, 1)
    kinds = {"no lengths": "oracle:0", "oracle": "oracle:0"}
    for name in reversed(TOLD):
        if (out / f"told-{name}.npz").exists():
            kinds[f"learned as on {name}"] = f"learned:{out / f'told-{name}.npz'}"
            figures = error_figures(out / f"told-{name}.npz", offered)
            print(name, {k: round(v, 3) for k, v in figures.items()}, flush=True)
    kinds |= {"history": "history", "constant": "constant"}
    kinds |= {f"oracle, noise {noise} %": f"oracle:{noise / 100}" for noise in (50, 25)}
    with (out / f"length-capacity-{policies[-1]}.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["policy", "lengths", "criterion", "capacity_rps", "ci_low", "ci_high", "against_oracle"])
        for policy in policies:
            for text in criteria:
                oracle = None
                for label, lengths in kinds.items():
                    if (label == "no lengths") != (policy == "llumnix-minus"):
                        continue
                    known = Knowledge(lengths)
                    found = find_capacity(
                        varied(base, policy=policy), parse_criterion(text), range(1, seeds + 1),
                        lambda configs, known=known: [run(config, known) for config in configs], start_rps=30.5,
                        tolerance=0.025,
                    )  # fmt: skip
                    oracle = oracle or found.capacity_rps
                    row = [policy, label, text, f"{found.capacity_rps:.2f}", f"{found.ci_low:.2f}", f"{found.ci_high:.2f}",
                           f"{found.capacity_rps / oracle - 1:+.1%}"]  # fmt: skip
                    table.writerow(row)
                    file.flush()
                    print("  ".join(f"{cell:>20}" for cell in row), flush=True)


def heatmap(base: SimulationConfig, policy: str, seeds: int, out: Path) -> None:
    rows = []
    for noise in NOISES:
        for rate in RATES:
            point, known = varied(base, policy=policy, rate_rps=rate), Knowledge(f"oracle:{noise}")
            runs = [run(varied(point, seed=seed), known) for seed in range(1, seeds + 1)]
            mean = {name: float(np.mean([getattr(one, name) for one in runs])) for name in FIGURES}
            rows.append({"policy": policy, "noise": noise, "rate_rps": rate, **mean})
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    name = f"length-noise-{policy.replace(':', '-')}"
    with (out / f"{name}.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    draw(rows, out / f"{name}.svg")


def draw(rows: list[dict[str, object]], path: Path) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, (name, title) in zip(
        figure.subplots(1, 2), (("ttft_s_mean", "mean TTFT, s"), ("ttft_s_p99", "P99 TTFT, s")), strict=True
    ):
        grid = np.array([[float(r[name]) for r in rows if r["noise"] == n] for n in NOISES])  # type: ignore[arg-type]
        axes.imshow(grid, cmap="viridis_r", norm=LogNorm(), origin="lower", aspect="auto")
        for (y, x), value in np.ndenumerate(grid):
            axes.text(x, y, f"{value:.2f}" if value < 10 else f"{value:.0f}", ha="center", va="center", fontsize=8,
                      color="white" if value > np.sqrt(grid.min() * grid.max()) else "black")  # fmt: skip
        axes.set_xticks(range(len(RATES)), [f"{r:g}" for r in RATES])
        axes.set_yticks(range(len(NOISES)), [f"{n:.0%}" for n in NOISES])
        axes.set(xlabel="offered requests/s", ylabel="noise of told lengths", title=title)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["told", "capacity", "heatmap"])
    parser.add_argument("--sets", type=Path)
    parser.add_argument("--policies", nargs="+", default=["llumnix-minus", "block", "block-paper"])
    parser.add_argument("--criteria", nargs="+", default=["ttft_p99<=3"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=here
    )
    print(f"commit {commit.stdout.strip()}, seeds 1-{options.seeds}, {options.requests} requests", flush=True)
    base = load_config(CONFIG)
    base = msgspec.structs.replace(base, workload=msgspec.structs.replace(base.workload, requests=options.requests))
    started = time.process_time()
    if options.what == "told":
        tell(options.sets, options.out)
    elif options.what == "capacity":
        capacity(base, options.policies, options.criteria, options.seeds, options.out)
    else:
        for policy in options.policies:
            heatmap(base, policy, options.seeds, options.out)
    print(f"{time.process_time() - started:.0f} s CPU")


if __name__ == "__main__":
    main()
