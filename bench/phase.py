"""What is left of the TTFT error once the phase is known, that is, when the measured engine took up the arrival.

    python bench/phase.py RUNS_DIR [--json]

A replay without feedback meets another moment of the running step than the real arrival did. Here every request starts anew from
the measured scheduling of the first step after its arrival; the logged batches are played with the profile's times up to its first
token. Stages below saturation.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from block.engine.validate import read_stage
from block.steptime.profile import load_profile
from block.steptime.steplog import read_run, read_stage_steps
from fidelity import STAGES, scored
from step_replay import StepReplay

SATURATED = ("q16", "q22", "q50")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    for name, run_name, stages in STAGES:
        run, profile = read_run(args.runs / run_name), load_profile(name)
        for stage in stages:
            if stage in SATURATED:
                continue
            log = read_stage_steps(run, stage)
            played, off = StepReplay(log, run, profile), []
            for request in read_stage(run.path, stage, run.limits.block_size):
                first = int(np.searchsorted(log.scheduled_s, request.arrived_s + profile.input_s / 2))
                last = int(np.searchsorted(log.finished_s, request.arrived_s + request.ttft_s)) - 1
                if not first <= last:
                    continue  # the log lacks its steps
                batch = float(log.decode_requests[last] + log.chunks[last])
                seen_s = played.results_s(first, last) + profile.output_s + profile.output_request_s * batch
                off.append(abs((seen_s - request.arrived_s) / request.ttft_s - 1))
            rows.append({
                "run": run_name, "stage": stage, "requests": len(off),
                "ttft_error_p50": scored(args.runs, run_name, stage, profile).ttft_error_p50,
                "phase_known_p50": float(np.median(off)),
            })  # fmt: skip
    if args.json:
        print(json.dumps({"stages": rows}))
        return
    for r in rows:
        print(
            f"{r['run'].split('.seqs')[0]:30} {r['stage']:8} {r['requests']:4} requests, TTFT error P50 "
            f"{r['ttft_error_p50']:5.1%}, with the phase known {r['phase_known_p50']:.1%}"
        )


if __name__ == "__main__":
    main()
