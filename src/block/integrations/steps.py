"""Collect an engine's step log from the snapshots that it publishes, and keep it as a run directory that ``block fit``
reads."""

import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from block.engine.limits import EngineLimits
from block.integrations.sweep import Answered
from block.predict.snapshot import STEP, EngineSnapshot, decode
from block.predictor.source import StateSource

STEPS_MAX: Final = 500_000
STAGE: Final = "sweep"


class StepCollector:
    """Watches a source and keeps each finished step once. ``lost`` counts the times that steps went by unseen."""

    def __init__(self, source: StateSource) -> None:
        self._source = source
        self._rows: list[npt.NDArray[np.void]] = []
        self._count = 0
        self._last_s = 0.0
        self._first = True
        self.lost = 0
        self.snapshot: EngineSnapshot | None = None

    async def watch(self) -> None:
        """Collect until cancelled."""
        async for frame in self._source.frames():
            self.take(decode(frame))

    def take(self, snapshot: EngineSnapshot) -> None:
        self.snapshot = snapshot
        steps = snapshot.steps
        fresh = steps[steps["scheduled_s"] > self._last_s]
        if self._first:  # what was before the sweep does not belong to it
            self._first, fresh = False, fresh[:0]
        elif len(fresh) == len(steps) and len(steps) > 0 and self._count:
            self.lost += 1
        if len(steps):
            self._last_s = float(steps[-1]["scheduled_s"])
        if len(fresh) and self._count < STEPS_MAX:
            self._rows.append(fresh.copy())
            self._count += len(fresh)

    @property
    def steps(self) -> npt.NDArray[np.void]:
        """All steps so far, oldest first, shape (n,), dtype ``predict.snapshot.STEP``."""
        return np.concatenate(self._rows) if self._rows else np.zeros(0, STEP)


def write_run(
    directory: Path,
    steps: npt.NDArray[np.void],
    answered: Sequence[Answered],
    limits: EngineLimits,
    *,
    gpu: str,
    model: str,
    engine: dict[str, Any] | None = None,
) -> None:
    """Write ``engine.json``, ``sweep.steps.csv.gz`` and ``sweep.requests.csv.gz``; times count from the first of
    them."""
    directory.mkdir(parents=True, exist_ok=True)
    start_s = min([float(steps["scheduled_s"][0])] + [a.sent_s for a in answered]) if len(steps) else 0.0
    fields = {
        "gpu": gpu,
        "model": model,
        **{name: getattr(limits, name) for name in limits.__struct_fields__},
        **(engine or {}),
    }
    (directory / "engine.json").write_text(json.dumps(fields, indent=1) + "\n")
    with gzip.open(directory / f"{STAGE}.steps.csv.gz", "wt", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            ["schedule_start_s", "update_start_s", "decode_requests", "decode_context_tokens", "prefill_chunks"]
        )
        for scheduled_s, finished_s, decodes, context, tokens, work, chunks in steps.tolist():
            text = " ".join(_chunks(tokens, work, chunks))
            rows.writerow([f"{scheduled_s - start_s:.7f}", f"{finished_s - start_s:.7f}", decodes, context, text])
    with gzip.open(directory / f"{STAGE}.requests.csv.gz", "wt", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["request", "arrived_s", "prompt_tokens", "output_tokens", "ttft_s", "e2e_s"])
        for number, a in enumerate(sorted(answered)):
            rows.writerow(
                [
                    number,
                    f"{a.sent_s - start_s:.6f}",
                    a.prompt_tokens,
                    a.output_tokens,
                    f"{a.ttft_s:.6f}",
                    f"{a.e2e_s:.6f}",
                ]
            )


def _chunks(tokens: int, work: float, chunks: int) -> list[str]:
    """Chunks with the same number, tokens and work; a snapshot tells only these sums, and a fit uses only these."""
    if not chunks:
        return []
    before = max(round(work / tokens - 0.5 * tokens / chunks), 0)
    sizes = [tokens // chunks + (i < tokens % chunks) for i in range(chunks)]
    return [f"{size}@{before}" for size in sizes]
