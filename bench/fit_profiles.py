"""Make the shipped profiles.

    python bench/fit_profiles.py RUNS_DIR [--vidur VIDUR_DIR]

RUNS_DIR holds the measured H200 runs named below (see docs/engine-model.md): each profile is fitted to the sweep and the lightest
load of its model only, the heavier loads stay unseen (bench/fidelity.py scores the profiles on them). VIDUR_DIR holds Vidur's
A30 profiles (MIT): the A30 profiles are derived from them.
"""

import argparse
from pathlib import Path

import msgspec
from rich.console import Console

from block.steptime.fit import Subject, fit_profile
from block.steptime.importers.vidur import import_vidur
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


# name: (model, directory under VIDUR_DIR, layers, file of attention points)
DERIVED = {
    "a30-qwen2-7b": ("qwen2-7b", "compute/a30/Qwen/Qwen-2-7B", 28, None),
    "a30-llama2-7b": ("llama2-7b", "compute/a30/meta-llama/Llama-2-7b-hf", 32, "a30_llama2_7b_attention_points.csv"),
}


def derived(vidur: Path, name: str) -> StepTimeProfile:
    """An A30 profile from Vidur's kernel tables."""
    model, directory, layers, points = DERIVED[name]
    attention = vidur / points if points else None
    return import_vidur(vidur / directory, layers=layers, name=name, gpu="NVIDIA A30", model=model, attention=attention)


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
    parser.add_argument("--vidur", type=Path, help="directory of Vidur's profiles")
    parser.add_argument("--to", type=Path, default=SHIPPED, help="where the profiles go")
    args = parser.parse_args()
    console = Console()

    def write(profile: StepTimeProfile) -> None:
        (args.to / f"{profile.name}.json").write_bytes(
            msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n"
        )
        console.print(f"{profile.name}: " + ", ".join(f"{e.regime} {e.bias_fraction:+.1%}" for e in profile.errors))

    for name in DERIVED if args.vidur else ():
        write(derived(args.vidur, name))
    for name, stages in TRAINED_ON.items():
        write(fitted(args.runs, name, stages))


if __name__ == "__main__":
    main()
