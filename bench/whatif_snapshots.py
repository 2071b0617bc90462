"""What does a what-if lose by starting from a snapshot? Held against what the step-by-step model then does.

    python bench/whatif_snapshots.py RUNS_DIR [--requests 40] [--json]

For sampled requests of every measured stage: a snapshot of the modelled engine is taken as the request arrives, a what-if
is asked from its bytes (true lengths, cached prefixes known), and the model goes on with that request and no later one. TTFT
and E2E: median error with its sign, and 90th percentile of its size. "calibrated" is where the online calibration stands
after the five seconds before; the profile was right, so it should stand at 1. A snapshot lists 256 waiting requests, a
prompt's cached prefix is that of its arrival: where more wait, or a prefix is just being computed, single what-ifs are off.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from block.engine.limits import EngineLimits
from block.engine.pipeline import Engine
from block.engine.sequence import FINISHED, Sequence
from block.engine.validate import MeasuredRequest, read_stage
from block.predict.capture import Recorder
from block.predict.snapshot import decode
from block.predict.whatif import Mirror, Oracle
from block.steptime.calibrate import Calibration
from block.steptime.profile import StepTimeProfile, load_profile
from block.steptime.steplog import read_run
from fidelity import STAGES
from fit_profiles import LLAMA3_PREFIX

LOOK_S, LOOK_EVERY_S = 5.0, 0.05
SKIPPED = 50  # the first requests meet an empty engine
TIGHT_BLOCKS = 2400  # memory that turns12 fills: of the measured 6000 it uses half


def sequence_of(request: MeasuredRequest) -> Sequence:
    return Sequence(
        request.key, request.prompt_tokens, request.output_tokens, arrived_s=request.arrived_s,
        order=request.arrived_s, block_keys=request.block_keys,
    )  # fmt: skip


def hit_tokens(engine: Engine, sequence: Sequence) -> int:
    pool, size = engine.scheduler.pool, engine.limits.block_size
    return 0 if pool is None else size * len(pool.find(sequence, (sequence.prompt - 1) // size))


def asked(
    requests: list[MeasuredRequest], last: int, limits: EngineLimits, profile: StepTimeProfile
) -> tuple[float, float, float]:
    """Errors of the TTFT and E2E foretold for request ``last``, and where the calibration stood."""
    curve, at_s = profile.curve(limits=limits), requests[last].arrived_s
    engine, calibration = Engine(limits, curve), Calibration(profile)
    present = {r.key: sequence_of(r) for r in requests[:last]}
    for sequence in present.values():
        engine.add(sequence, sequence.arrived_s + profile.input_s)
    recorder = Recorder(engine)
    for now_s in np.arange(at_s - LOOK_S, at_s, LOOK_EVERY_S):
        engine.advance(float(now_s))
        calibration.observe(decode(recorder.capture(float(now_s))))
    engine.advance(at_s)
    snapshot = decode(recorder.capture(at_s))
    listed = [present[int(key)] for key in snapshot.keys]
    hits = np.array([hit_tokens(engine, s) for s in listed], np.int32)
    mirror = Mirror(curve, profile.input_s)
    mirror.load(snapshot, np.array([s.stop_after for s in listed], np.int32), hits)
    for key, sequence in present.items():
        if sequence.status != FINISHED and key not in {s.key for s in listed}:  # on its way to the queue
            mirror.add(key, sequence.prompt, sequence.max_tokens, sequence.stop_after, sequence.arrived_s)
    new = sequence_of(requests[last])
    told = Oracle().predict_all(
        [mirror], prompt_tokens=new.prompt, max_tokens=new.max_tokens, output_tokens=new.stop_after, now_s=at_s,
        hits=np.array([hit_tokens(engine, new)], np.int32),
    )[0]  # fmt: skip
    engine.add(new, at_s + profile.input_s)
    while new.status != FINISHED:
        at = engine.next_event_s()
        assert at is not None
        engine.advance(at)
    return told.ttft_s / (new.first_token_s - at_s) - 1, told.e2e_s / (new.finished_s - at_s) - 1, calibration.scale


def stage_row(
    directory: Path, stage: str, profile: StepTimeProfile, count: int, kv_blocks: int | None = None
) -> dict[str, Any]:
    limits = read_run(directory).limits
    if kv_blocks is not None:
        limits = msgspec.structs.replace(limits, num_gpu_blocks=kv_blocks)
    requests = read_stage(directory, stage, limits.block_size)
    picked = np.random.default_rng(0).choice(np.arange(SKIPPED, len(requests)), count, replace=False)
    ttft, e2e, scale = np.array([asked(requests, int(i), limits, profile) for i in picked]).T
    name = stage if kv_blocks is None else f"{stage}, {kv_blocks} KV blocks"
    return {
        "run": directory.name, "stage": name, "ttft_median": np.median(ttft), "ttft_p90": np.percentile(np.abs(ttft), 90),
        "e2e_median": np.median(e2e), "e2e_p90": np.percentile(np.abs(e2e), 90), "calibrated": np.median(scale),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = [
        stage_row(args.runs / run_name, stage, load_profile(name), args.requests)
        for name, run_name, stages in STAGES
        for stage in stages
    ]
    profile = load_profile("h200-llama3.1-8b")
    rows.append(stage_row(args.runs / LLAMA3_PREFIX, "turns12", profile, args.requests, TIGHT_BLOCKS))
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(
        "run", "stage", "TTFT median", "P90", "E2E median", "P90", "calibrated", title="what-ifs from snapshots"
    )
    for row in rows:
        figures = [f"{row[key]:+.2%}" for key in ("ttft_median", "ttft_p90", "e2e_median", "e2e_p90")]
        table.add_row(row["run"], row["stage"], *figures, f"{row['calibrated']:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
