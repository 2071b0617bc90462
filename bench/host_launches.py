"""How the host's launches spread, stage by stage, whether the workload explains them, and what a replay scores that knows them.

    python bench/host_launches.py RUNS_DIR [--json]

A launch of a step beyond the CUDA graphs shows where the CPU decides when the results of the step before it are looked at
(step_replay.py). "In hindsight": the shipped profile, told the mean launch of every second of the stage; nothing else is fed back.

Explained: the share of the variance that gradient-boosted trees (the extra block-llm[length]) find in a stage after training on
all other stages; 0 is as good as the mean, negative worse. From the workload alone (batch, chunks, contexts, the step
before, arrivals and ends of late, outstanding requests, tokens streamed), and from that and the host's own pace, which no
replay knows: from a step's results to the next scheduling.
"""

import argparse
import json
from functools import lru_cache
from pathlib import Path

import msgspec
import numpy as np

from block.engine.limits import EngineLimits
from block.engine.pipeline import Engine
from block.engine.validate import MeasuredRequest, compare, read_stage, replay
from block.steptime.profile import StepTimeProfile, graph_tokens, load_profile
from block.steptime.steplog import Floats, StepLog, read_run, read_stage_steps
from fidelity import STAGES
from step_replay import StepReplay

ENDED_WITHIN_S = 0.02
TREES = {
    "objective": "l2",
    "learning_rate": 0.05,
    "num_leaves": 15,
    "min_data_in_leaf": 20,
    "verbose": -1,
    "seed": 0,
    "num_threads": 1,
}
ROUNDS = 150


def circumstances(log: StepLog, requests: list[MeasuredRequest], k: np.ndarray) -> Floats:
    """What was known of the workload when the steps ``k`` were launched, shape (steps, features); the host's pace is last."""
    at_s, before_s = log.scheduled_s[k], log.finished_s[k - 2]
    arrived = np.sort([r.arrived_s for r in requests])
    ended = np.sort([r.arrived_s + r.e2e_s for r in requests])
    streamed = np.concatenate([[0.0], np.cumsum(log.decode_requests + log.chunks)])

    def count(times: Floats, within_s: float) -> Floats:
        return np.searchsorted(times, at_s) - np.searchsorted(times, at_s - within_s)

    return np.column_stack([
        log.decode_requests[k], log.chunks[k], log.prefill_tokens[k], log.prefill_work[k], log.context[k],
        log.context[k] / np.maximum(log.decode_requests[k], 1), log.chunks[k - 1], log.prefill_tokens[k - 1],
        count(arrived, 0.01), count(arrived, 0.1), count(arrived, 1.0), count(ended, ENDED_WITHIN_S),
        np.searchsorted(arrived, at_s) - np.searchsorted(ended, at_s),
        streamed[k] - streamed[np.searchsorted(log.finished_s, at_s - 0.1)],
        at_s - before_s,
    ])  # fmt: skip


class Slower:
    """By how many seconds the launches of each second exceed the profile's; in a second without any, the stage's mean."""

    def __init__(self, at_s: Floats, slower_s: Floats) -> None:
        self._at, self._slower_s, self._mean_s = at_s.astype(int), slower_s, float(slower_s.mean())

    def at(self, second: int) -> float:
        within = self._at == second
        return float(self._slower_s[within].mean()) if within.any() else self._mean_s


class EngineOfSeconds(Engine):
    """An engine whose launches beyond the CUDA graphs change from second to second."""

    def __init__(self, limits: EngineLimits, profile: StepTimeProfile, slower: Slower) -> None:
        self._curve_of = lru_cache(lambda second: msgspec.structs.replace(
            profile, launch_eager_s=profile.launch_eager_s + slower.at(second)
        ).curve(limits=limits))  # fmt: skip
        super().__init__(limits, self._curve_of(0))

    def _schedule(self, now_s: float) -> None:
        self.curve = self._curve_of(int(now_s))
        super()._schedule(now_s)


def explained(held_out: Floats, features: list[Floats], targets: list[Floats], stage: int) -> float:
    """Share of the variance of a stage's launches that trees trained on the other stages predict; the mean is given."""
    import lightgbm

    others = [i for i in range(len(features)) if i != stage]
    data = lightgbm.Dataset(np.concatenate([features[i] for i in others]), np.concatenate([targets[i] for i in others]))
    error = targets[stage] - lightgbm.train(TREES, data, ROUNDS).predict(held_out)
    return float(1 - error.var() / targets[stage].var())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows, features, targets = [], [], []
    for name, run_name, stages in STAGES:
        run, profile = read_run(args.runs / run_name), load_profile(name)
        for stage in stages:
            log = read_stage_steps(run, stage)
            played = StepReplay(log, run, profile)
            k, measured, modelled, by_launch = played.intervals()
            eager = by_launch & ~log.pure_decode[k] & (log.tokens[k] > graph_tokens(run.limits))
            slower = Slower(log.scheduled_s[k[eager]], (measured - modelled)[eager])
            requests = read_stage(run.path, stage, run.limits.block_size)
            made = replay(requests, run.limits, profile, engine=EngineOfSeconds(run.limits, profile, slower))
            known = compare(stage, profile.name, requests, made, None)
            features.append(circumstances(log, requests, k[eager]))
            targets.append(measured[eager] / played.launch_s[k[eager]])
            quartile, median = np.percentile(measured[eager], [25, 50])
            rows.append({
                "run": run_name, "stage": stage, "launches": int(eager.sum()), "quartile_s": float(quartile),
                "median_s": float(median), "mean_s": float(measured[eager].mean()), "profile_s": float(modelled[eager].mean()),
                "hindsight_e2e_p50": known.e2e_error_p50, "hindsight_e2e_mean": known.e2e_mean_ratio - 1,
                "hindsight_ttft_mean": known.ttft_mean_ratio - 1,
            })  # fmt: skip
    for i, row in enumerate(rows):
        workload = [x[:, :-1] for x in features]
        row["explained_by_workload"] = explained(workload[i], workload, targets, i)
        row["explained_with_pace"] = explained(features[i], features, targets, i)
    if args.json:
        print(json.dumps({"stages": rows}))
        return
    for r in rows:
        times = ", ".join(f"{name} {1e3 * r[f'{name}_s']:.1f}" for name in ("quartile", "median", "mean", "profile"))
        print(
            f"{r['run'].split('.seqs')[0]:14.14} {r['stage']:8} {r['launches']:4} launches, ms: {times}; explained "
            f"{r['explained_by_workload']:+.2f}, with the pace {r['explained_with_pace']:+.2f}; in hindsight E2E P50 "
            f"{r['hindsight_e2e_p50']:.1%}, mean {r['hindsight_e2e_mean']:+.1%}, mean TTFT {r['hindsight_ttft_mean']:+.1%}"
        )


if __name__ == "__main__":
    main()
