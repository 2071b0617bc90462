"""What output lengths are worth in the 12-instance cluster, and which number of a distribution decides best.

Run: python experiments/length_functionals.py [--rate 31] [--requests 4000] [--seeds 1 2] [--only lengths|functionals|noise]

lengths      policy block with oracle, learned-like (a told length with log-normal noise whose spread is the learned
             estimator's on public sets: 0.5), history and constant lengths; llumnix-minus beside them
functionals  the same noisy lengths read as a distribution (conditional mean, P30, median, P70, a random draw per what-if)
             and as a bare number that is raised by ten tokens when it is passed
noise        policy block with noise of 0-100 %
"""

import argparse
import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from block.length.distribution import DistributionBank, Floats, Ints
from block.metrics import summarize
from block.simulate import SimulationConfig, load_config, simulate
from block.simulate import cluster as cluster_module
from block.simulate.config import LengthModel
from block.simulate.sweep import varied

CONFIG = Path(__file__).parent / "paper-default.toml"
LEARNED_SPREAD = 0.5


class ReadBank(DistributionBank):
    """Asked for the mean, answers with another functional: an experiment wraps the seam instead of branching in it."""

    functional = "mean"

    def expected_totals(self, rows: Ints, generated: Ints, caps: Ints) -> Ints:
        if self.functional == "mean":
            return super().expected_totals(rows, generated, caps)
        return self.totals(self.functional, rows, generated, caps, self._rng)  # type: ignore[arg-type]

    def expected_total(self, row: int, generated: int, cap: int) -> float:
        one = (np.array([row], np.int32), np.array([generated], np.int32), np.array([cap], np.int32))
        return (
            float(self.expected_totals(*one)[0])
            if self.functional != "mean"
            else super().expected_total(row, generated, cap)
        )

    def read_as(self, functional: str, seed: int) -> None:
        self.functional, self._rng = functional, np.random.default_rng(seed)


def run(config: SimulationConfig, functional: str = "mean") -> dict[str, Floats | float]:
    made = cluster_module._estimator

    def wrapped(config: SimulationConfig, offered: Sequence[object]) -> object:
        estimator = made(config, offered)  # type: ignore[arg-type]
        estimator.bank.__class__ = ReadBank
        estimator.bank.read_as(functional, config.seed)  # type: ignore[attr-defined]
        return estimator

    cluster_module._estimator = wrapped  # type: ignore[assignment]
    try:
        rows = simulate(config)
    finally:
        cluster_module._estimator = made
    s = summarize(rows)
    return {"ttft_s_mean": s.ttft_s_mean, "ttft_s_p99": s.ttft_s_p99, "e2e_s_mean": s.e2e_s_mean, "e2e_s_p99": s.e2e_s_p99,
            "preemptions": s.preemptions}  # type: ignore[dict-item]  # fmt: skip


def cases(only: str) -> list[tuple[str, str, LengthModel, str]]:
    """(label, policy, lengths, functional)."""

    def noisy(noise: float, *, distribution: bool = True) -> LengthModel:
        return LengthModel(estimator="oracle", options={"noise": noise, "distribution": distribution})

    oracle, spread = LengthModel(), noisy(LEARNED_SPREAD)
    listed = {
        "lengths": [
            ("llumnix-minus", "llumnix-minus", oracle, "mean"), ("oracle", "block", oracle, "mean"),
            (f"noise {LEARNED_SPREAD:g}", "block", spread, "mean"),
            ("history", "block", LengthModel(estimator="history"), "mean"),
            ("constant", "block", LengthModel(estimator="constant", options={"tokens": 326}), "mean"),
        ],
        "functionals": [
            *((f"noise {LEARNED_SPREAD:g}, {f}", "block", spread, f) for f in ("mean", "p30", "median", "p70", "sampled")),
            (f"noise {LEARNED_SPREAD:g}, number + 10", "block", noisy(LEARNED_SPREAD, distribution=False), "mean"),
            *((f"history, {f}", "block", LengthModel(estimator="history"), f) for f in ("mean", "p30", "median", "p70", "sampled")),
        ],
        "noise": [(f"noise {n:g}", "block", noisy(n), "mean") for n in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 2.0)],
    }  # fmt: skip
    return [case for name, some in listed.items() if only in ("all", name) for case in some]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=31.0)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", default="all", choices=["all", "lengths", "functionals", "noise"])
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    print(json.dumps({"commit": commit.strip(), "host": platform.machine(), "seeds": options.seeds, "rate": options.rate,
                      "requests": options.requests}))  # fmt: skip
    base = load_config(CONFIG)
    base = msgspec.structs.replace(base, workload=msgspec.structs.replace(base.workload, requests=options.requests))
    for label, policy, lengths, functional in cases(options.only):
        runs = [
            run(msgspec.structs.replace(varied(base, policy=policy, rate_rps=options.rate, seed=seed), lengths=lengths), functional)
            for seed in options.seeds
        ]  # fmt: skip
        mean = {name: round(float(np.mean([one[name] for one in runs])), 3) for name in runs[0]}
        print(json.dumps({"case": label, **mean}), flush=True)


if __name__ == "__main__":
    main()
