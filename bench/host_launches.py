"""How the host's launch times spread, stage by stage, and what a replay would score had their mean been known.

    python bench/host_launches.py RUNS_DIR [--json]

A launch shows where a step with prefill beyond the CUDA graphs follows a decode-only step (steptime/pace.py): from the results of
the step before last to those of the last. "In hindsight": the shipped profile with the stage's own mean launch.
"""

import argparse
import json
from pathlib import Path

import msgspec
import numpy as np

from block.steptime.pace import EAGER, LaunchFit, observe, shown_launches
from block.steptime.profile import load_profile
from block.steptime.steplog import read_run, read_stage_steps
from fidelity import STAGES, scored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    for name, run_name, stages in STAGES:
        run, profile = read_run(args.runs / run_name), load_profile(name)
        launch = LaunchFit(
            np.array([profile.launch_decode_s, profile.launch_graph_s, profile.launch_eager_s]),
            profile.launch_request_s,
        )
        curve = profile.curve(limits=run.limits)
        for stage in stages:
            log = read_stage_steps(run, stage)
            decode_s = np.array([
                curve.gpu_s(int(n), c, 0, 0.0, 0) for n, c in zip(log.decode_requests, log.context, strict=True)
            ])  # fmt: skip
            shown = shown_launches(observe(log, run.limits, decode_s), launch)
            eager = shown[shown[:, 0] == EAGER]
            own_s = float((eager[:, 2] - launch.request_s * eager[:, 1]).mean())
            known = scored(args.runs, run_name, stage, msgspec.structs.replace(profile, launch_eager_s=own_s))
            quartile, median = np.percentile(eager[:, 2], [25, 50])
            rows.append({
                "run": run_name, "stage": stage, "launches": len(eager), "quartile_s": float(quartile), "median_s": float(median),
                "mean_s": float(eager[:, 2].mean()), "profile_s": float(launch.seconds(log, np.full(len(log), EAGER)).mean()),
                "hindsight_e2e_p50": known.e2e_error_p50, "hindsight_e2e_mean": known.e2e_mean_ratio - 1,
            })  # fmt: skip
    if args.json:
        print(json.dumps({"stages": rows}))
        return
    for r in rows:
        times = ", ".join(f"{name} {1e3 * r[f'{name}_s']:.1f}" for name in ("quartile", "median", "mean", "profile"))
        hindsight = f"E2E P50 {r['hindsight_e2e_p50']:.2%}, mean {r['hindsight_e2e_mean']:+.1%}"
        print(
            f"{r['run'].split('.seqs')[0]:24} {r['stage']:8} {r['launches']:4} launches, ms: {times}; in hindsight {hindsight}"
        )


if __name__ == "__main__":
    main()
