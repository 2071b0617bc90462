"""Make the shipped H200 profiles from the measured runs: each fitted to the sweep and the lightest load of its model only.

    python bench/fit_profiles.py RUNS_DIR

RUNS_DIR holds the run directories named below (see docs/engine-model.md). The heavier loads stay unseen: bench/fidelity.py scores
the profiles on them.
"""

import argparse
from pathlib import Path

import msgspec
from rich.console import Console

from block.steptime.fit import Subject, fit_profile
from block.steptime.profile import SHIPPED, StepTimeProfile
from block.steptime.roofline import arithmetic
from block.steptime.sources import read_measured
from block.steptime.steplog import STEPS_SUFFIX

LLAMA2, QWEN2 = "llama2-7b.seqs48.tokens512.blocks1056", "qwen2-7b.seqs256.tokens2048"
LLAMA3, LLAMA3_PREFIX = "llama3.1-8b.seqs128.tokens2048", "llama3.1-8b.prefix.blocks6000"
QWEN25 = "qwen2.5-32b.seqs128.tokens4096"

TRAINED_ON = {
    "h200-llama2-7b": [(LLAMA2, "sweep"), (LLAMA2, "q8")],
    "h200-qwen2-7b": [(QWEN2, "sweep"), (QWEN2, "q20")],
    "h200-llama3.1-8b": [(LLAMA3, "sweep"), (LLAMA3, "q25"), (LLAMA3_PREFIX, "sweep"), (LLAMA3_PREFIX, "turns12")],
    "h200-qwen2.5-32b": [(QWEN25, "sweep"), (QWEN25, "q6")],
}


def fitted(runs: Path, name: str, stages: list[tuple[str, str]]) -> StepTimeProfile:
    """One profile from stages (run directory, stage) under ``runs``."""
    measured = read_measured([runs / run / f"{stage}{STEPS_SUFFIX}" for run, stage in stages])
    prior = arithmetic(measured.model_config, measured.gpu, measured.tensor_parallel)
    trained = "; ".join(f"{run} {stage}" for run, stage in stages)
    subject = Subject(
        name=name, gpu=measured.gpu, model=measured.model, tensor_parallel=measured.tensor_parallel,
        source=f"measured with vLLM 0.24 ({trained})", prior=prior,
    )  # fmt: skip
    profile = fit_profile(measured.logs, subject, calls=measured.calls)
    return msgspec.structs.replace(profile, licence="Apache-2.0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="directory of the run directories")
    parser.add_argument("--to", type=Path, default=SHIPPED, help="where the profiles go")
    args = parser.parse_args()
    console = Console()
    for name, stages in TRAINED_ON.items():
        profile = fitted(args.runs, name, stages)
        (args.to / f"{name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")
        console.print(f"{name}: " + ", ".join(f"{e.regime} {e.bias_fraction:+.1%}" for e in profile.errors))


if __name__ == "__main__":
    main()
