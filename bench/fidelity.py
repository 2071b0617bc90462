"""How faithful the engine model is: every measured stage replayed from arrivals and true lengths, whole trace, no feedback.

    python bench/fidelity.py RUNS_DIR [--ground-truth DIR --tables DIR] [--markdown | --json]

Train and test: a profile is fitted to the sweep and the lightest load of its model. Stages not fitted to are marked "held out"; the
lightest loads are shown twice, under the shipped profile ("fitted to") and under one fitted without them ("held out").
--ground-truth: LLMServingSim's real vLLM runs (MIT), replayed with profiles imported from its kernel tables (--tables).
"""

import argparse
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec

from block.engine.limits import EngineLimits
from block.engine.validate import Fidelity, MeasuredRequest, compare, measured_preemptions, read_stage, replay
from block.steptime.importers.llmservingsim import import_llmservingsim
from block.steptime.profile import StepTimeProfile, load_profile
from block.steptime.steplog import read_run
from fit_profiles import LLAMA2, LLAMA3, LLAMA3_PREFIX, QWEN2, QWEN25, TRAINED_ON, fitted

STAGES = [
    ("h200-llama2-7b", LLAMA2, ["q8", "q16", "q22"]),
    ("h200-qwen2-7b", QWEN2, ["q20", "q40"]),
    ("h200-llama3.1-8b", LLAMA3, ["q25", "q50"]),
    ("h200-llama3.1-8b", LLAMA3_PREFIX, ["turns12"]),
    ("h200-qwen2.5-32b", QWEN25, ["q6"]),
]
LAYERS = 32  # of Llama-3.1-8B
# The RTX PRO 6000's run does not state its cache; it never filled.
GROUND_TRUTH = {"RTX4090": (256, 2588), "RTXPRO6000": (128, 30_000)}


def scored(runs: Path, run_name: str, stage: str, profile: StepTimeProfile) -> Fidelity:
    run = read_run(runs / run_name)
    requests = read_stage(run.path, stage, run.limits.block_size)
    made = replay(requests, run.limits, profile)
    return compare(stage, profile.name, requests, made, measured_preemptions(run.path, stage))


def measured_rows(runs: Path) -> Iterator[tuple[str, str, Fidelity]]:
    for name, run_name, stages in STAGES:
        for stage in stages:
            training = TRAINED_ON[name]
            seen = (run_name, stage) in training
            yield run_name, "fitted to" if seen else "held out", scored(runs, run_name, stage, load_profile(name))
            if seen:
                without = fitted(runs, name, [s for s in training if s != (run_name, stage)])
                yield run_name, "held out", scored(runs, run_name, stage, without)


def ground_truth_rows(directory: Path, tables: Path) -> Iterator[tuple[str, str, Fidelity]]:
    for gpu, (seqs, blocks) in GROUND_TRUTH.items():
        lines = (directory / gpu / "Llama-3.1-8B" / "vllm" / "requests.jsonl").read_text().splitlines()
        rows = sorted((json.loads(line) for line in lines), key=lambda r: float(r["queued_ts"]))
        start = rows[0]["queued_ts"]
        requests = [
            MeasuredRequest(
                i, r["queued_ts"] - start, r["input_toks"], r["output_toks"], r["first_token_ts"] - r["queued_ts"],
                r["last_token_ts"] - r["queued_ts"],
            )
            for i, r in enumerate(rows)
        ]  # fmt: skip
        table = tables / gpu / "meta-llama" / "Llama-3.1-8B" / "bf16" / "tp1"
        profile = import_llmservingsim(table, layers=LAYERS, name="imported", gpu=gpu, model="Llama-3.1-8B")
        limits = EngineLimits(
            max_num_seqs=seqs,
            max_num_batched_tokens=2048,
            num_gpu_blocks=blocks,
            max_model_len=32_768,
            enable_prefix_caching=True,
        )
        yield (
            gpu,
            "imported tables",
            compare("ShareGPT, 10/s", "imported", requests, replay(requests, limits, profile), None),
        )


def cells(run_name: str, how: str, f: Fidelity) -> list[str]:
    preemptions = f"{f.preemptions} / {'?' if f.preemptions_measured is None else f.preemptions_measured}"
    return [
        re.split(r"\.seqs|\.blocks", run_name, maxsplit=1)[0], f.stage, how, f"{f.e2e_error_p50:.2%}", f"{f.e2e_error_p90:.1%}",
        f"{f.ttft_error_p50:.1%}", f"{f.e2e_mean_ratio - 1:+.1%}", f"{f.ttft_mean_ratio - 1:+.1%}", f"{f.e2e_p99_ratio - 1:+.1%}",
        f"{f.ttft_p99_ratio - 1:+.1%}", preemptions,
    ]  # fmt: skip


HEAD = [
    "run",
    "stage",
    "profile",
    "E2E P50",
    "E2E P90",
    "TTFT P50",
    "mean E2E",
    "mean TTFT",
    "P99 E2E",
    "P99 TTFT",
    "preemptions",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--ground-truth", type=Path)
    parser.add_argument("--tables", type=Path)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    scores = list(measured_rows(args.runs))
    if args.ground_truth and args.tables:
        scores += ground_truth_rows(args.ground_truth, args.tables)
    if args.json:
        print(json.dumps({"stages": [{"run": run, "how": how, **msgspec.to_builtins(f)} for run, how, f in scores]}))
        return
    rows = [cells(*score) for score in scores]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    if args.markdown:
        print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
        print("\n".join("| " + " | ".join(row) + " |" for row in rows))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"modelled against measured, commit {commit}; nothing random")
    for title in HEAD:
        table.add_column(title, justify="left" if title in HEAD[:3] else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
