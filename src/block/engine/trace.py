"""Replay a recorded scheduler trace through the model and compare every decision.

Format (gzip JSON lines): a header ``{"engine": {limits...}}``, then one object per ``schedule()`` call with the arrivals
since the last call ``[id, prompt_tokens, max_tokens, priority(, output_tokens(, content))]``, scheduled ``[id, tokens]``, and
running, waiting, blocks_free, preempted after the call. ``output_tokens`` is ``null`` for a request that was aborted;
``content`` numbers the content up to the end of each of its first full blocks, equal where two requests agree.
"""

import gzip
import json
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from block.engine.limits import limits_from
from block.engine.scheduler import Scheduler
from block.engine.sequence import Sequence
from block.errors import BadInputError


class TraceVerdict(msgspec.Struct, frozen=True):
    """``early_stops`` counts requests that ended before max_tokens (EOS or abort): an input, taken from the trace."""

    calls: int
    mismatches: int
    first_mismatch: dict[str, Any] | None
    requests: int
    preemptions: int
    early_stops: int


def validate_trace(path: Path) -> TraceVerdict:
    """Compare the model with a recorded trace, call by call; after a mismatch the model goes on from its own state.

    Raises:
        BadInputError: the file is not such a trace.
    """
    header, calls = _read(path)
    limits = limits_from(header)
    shared_blocks = int(header.get("shared_prefix_tokens", 0)) // limits.block_size
    shared_keys = [("shared", i) for i in range(shared_blocks)]
    scheduler = Scheduler(limits)
    sequences: dict[Any, Any] = {}
    in_flight: deque[Any] = deque()
    batches_max = 2 if limits.async_scheduling else 1
    mismatches, first, preemptions, early_stops = 0, None, 0, 0
    for number, call in enumerate(calls):
        for arrival in call["arrivals"]:
            key, prompt, max_tokens, priority = arrival[:4]
            # The recorder kept ids in arrival order, which is vLLM's tie-break too.
            sequences[key] = Sequence(
                key,
                prompt,
                max_tokens,
                priority=priority,
                order=float(len(sequences)),
                stop_after=arrival[4] if len(arrival) > 4 else None,
                block_keys=arrival[5] if len(arrival) > 5 else shared_keys[: prompt // limits.block_size],
            )
            scheduler.add(sequences[key])
        early_stops += _end_as_recorded(scheduler, call)
        batch = scheduler.schedule()
        preemptions += len(batch.preempted)
        wrong = _difference(scheduler, batch, call)
        if wrong:
            mismatches += 1
            first = first or {"call": number, **wrong}
        if batch.sequences:
            in_flight.append(batch)
        if len(in_flight) >= batches_max or not batch.sequences:
            if in_flight:
                scheduler.update(in_flight.popleft())
    return TraceVerdict(len(calls), mismatches, first, len(sequences), preemptions, early_stops)


def _difference(scheduler: Any, batch: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    model = {
        "scheduled": {s.key: n for s, n in zip(batch.sequences, batch.tokens, strict=True)},
        "running": [s.key for s in scheduler.running],
        "waiting": [s.key for s in scheduler.waiting],
        "blocks_free": scheduler.blocks_free,
        "preempted": [s.key for s in batch.preempted],
    }
    real = {**call, "scheduled": {k: n for k, n in call["scheduled"]}}
    return {
        field: {"model": model[field], "real": real[field]}
        for field in model
        if field in real and model[field] != real[field]
    }


def _end_as_recorded(scheduler: Any, call: Mapping[str, Any]) -> int:
    """End what the real engine had ended before this call though its ``max_tokens`` were not reached."""
    present = {*call["running"], *call["waiting"]}
    gone = [s for s in (*scheduler.running, *scheduler.waiting) if s.key not in present]
    for sequence in gone:
        scheduler.abort(sequence)
    return len(gone)


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        with gzip.open(path, "rt") as lines:
            return _parse(lines)
    except FileNotFoundError as error:
        raise BadInputError(f"There is no trace file {path}.") from error
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise BadInputError(
            f"{path} is not a scheduler trace (gzip JSON lines, first an engine header): {error}."
        ) from error


def _parse(lines: Iterator[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    header = json.loads(next(lines))["engine"]
    calls = [json.loads(line) for line in lines]
    for call in calls:
        for field in ("arrivals", "scheduled", "running", "waiting", "blocks_free", "preempted"):
            if field not in call:
                raise KeyError(f"a call lacks {field!r}")
    return header, calls
