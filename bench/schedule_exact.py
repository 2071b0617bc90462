"""Is the scheduler model exact on a real GPU? Every step of the measured runs, decided again.

    python bench/schedule_exact.py RUNS_DIR [--json]

RUNS_DIR: run directories (docs/engine-model.md) whose step logs also have decode_context_tokens_max, running, waiting and
kv_blocks_free. The logs do not say when a request reached the scheduler: as many are added before a step as its running and
waiting requests tell, in the order of their arrival. Everything else is decided by the model, asynchronously as in the runs: which
requests, how many tokens of each, who is preempted, how many blocks are free.
"""

import argparse
import json
from collections import deque
from pathlib import Path
from typing import Any

from block.engine.scheduler import Scheduler
from block.engine.sequence import Sequence
from block.engine.validate import read_stage
from block.steptime.steplog import REQUESTS_SUFFIX, STEPS_SUFFIX, read_rows, read_run

COLUMNS = (
    "schedule_start_s", "update_start_s", "decode_requests", "decode_context_tokens", "decode_context_tokens_max", "prefill_chunks",
    "running", "waiting", "kv_blocks_free", "preempted",
)  # fmt: skip


def decisions(row: dict[str, str]) -> tuple[Any, ...]:
    return (
        *(int(row[c] or 0) for c in COLUMNS if not c.endswith("_s") and c != "prefill_chunks"),
        row["prefill_chunks"],
    )


def made(scheduler: Scheduler, batch: Any) -> tuple[Any, ...]:
    decoding, chunks = [], []
    for sequence, tokens in zip(batch.sequences, batch.tokens, strict=True):
        before = sequence.computed - tokens
        if tokens == 1 and before >= sequence.prompt:
            decoding.append(before)
        else:
            chunks.append(f"{tokens}@{before}")
    counts = len(decoding), sum(decoding), max(decoding, default=0), len(scheduler.running), len(scheduler.waiting)
    return *counts, scheduler.blocks_free, len(batch.preempted), " ".join(chunks)


def replay(directory: Path, stage: str) -> tuple[int, int]:
    """(steps compared, steps in which the model decided otherwise); stops where a step log runs on into the next stage."""
    run = read_run(directory)
    rows = read_rows(directory / f"{stage}{STEPS_SUFFIX}", COLUMNS)
    requests = deque(read_stage(directory, stage, run.limits.block_size))
    scheduler, in_flight = Scheduler(run.limits), deque[Any]()
    compared = wrong = 0
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        while requests and len(scheduler.running) + len(scheduler.waiting) < int(row["running"]) + int(row["waiting"]):
            r = requests.popleft()
            scheduler.add(Sequence(r.key, r.prompt_tokens, r.output_tokens, block_keys=r.block_keys))
        batch = scheduler.schedule()
        while not batch.sequences and in_flight:
            scheduler.update(in_flight.popleft())
            batch = scheduler.schedule()
        if not batch.sequences:
            break
        compared, wrong = compared + 1, wrong + (made(scheduler, batch) != decisions(row))
        in_flight.append(batch)
        idle = following is not None and float(row["update_start_s"]) < float(following["schedule_start_s"])
        while len(in_flight) >= 2 or (idle and in_flight):
            scheduler.update(in_flight.popleft())
    return compared, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = []
    for directory in sorted(p for p in args.runs.iterdir() if (p / "engine.json").exists()):
        for file in sorted(directory.glob(f"*{REQUESTS_SUFFIX}")):
            stage = file.name.removesuffix(REQUESTS_SUFFIX)
            compared, wrong = replay(directory, stage)
            found.append({"run": directory.name, "stage": stage, "steps": compared, "mismatches": wrong})
    if args.json:
        print(json.dumps({"stages": found}))
        return
    for one in found:
        print(f"{one['run']:40} {one['stage']:8} {one['steps']:6} steps, {one['mismatches']} mismatches")
    print(f"{sum(f['steps'] for f in found)} steps, {sum(f['mismatches'] for f in found)} mismatches")


if __name__ == "__main__":
    main()
