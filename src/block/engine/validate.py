"""Hold the engine model against a measured run: replay a stage's arrivals and true lengths, compare every request.

The replay sees arrivals and lengths only: no state, time or decision of the measured run is fed back.
"""

from collections.abc import Callable, Sequence
from math import inf, isfinite
from pathlib import Path

import msgspec
import numpy as np

from block.engine.limits import EngineLimits
from block.engine.pipeline import Engine
from block.engine.sequence import Sequence as EngineSequence
from block.errors import BadInputError
from block.steptime.profile import StepTimeProfile
from block.steptime.steplog import REQUESTS_SUFFIX, STEPS_SUFFIX, Floats, read_rows, rows_as_floats

SLICE_S = 5.0  # virtual time between two reports of progress


class MeasuredRequest(msgspec.Struct, frozen=True):
    """One request of a measured stage. ``block_keys``: content identities of its first full blocks, with prefix caching."""

    key: int
    arrived_s: float
    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    e2e_s: float
    block_keys: list[tuple[object, ...]] | None = None
    cached_tokens: int | None = None


class Replayed(msgspec.Struct, frozen=True, eq=False):
    """What the model made of a stage; arrays have shape (requests,), in the order given."""

    ttft_s: Floats
    e2e_s: Floats
    preemptions: int
    steps: int
    cached_tokens: int


class Fidelity(msgspec.Struct, frozen=True, kw_only=True):
    """Modelled against measured. Errors are per request, absolute, relative to measured; ratios are modelled / measured."""

    stage: str
    profile: str
    requests: int
    e2e_error_p50: float
    e2e_error_p90: float
    ttft_error_p50: float
    ttft_error_p90: float
    e2e_mean_ratio: float
    ttft_mean_ratio: float
    e2e_p99_ratio: float
    ttft_p99_ratio: float
    preemptions: int
    preemptions_measured: int | None
    cached_tokens: int | None
    cached_tokens_measured: int | None


def read_stage(run_dir: Path, stage: str, block_size: int) -> list[MeasuredRequest]:
    """The requests of one stage, by arrival.

    Raises:
        BadInputError: there is no such stage, or its file is malformed.
    """
    file = run_dir / f"{stage}{REQUESTS_SUFFIX}"
    if not file.exists():
        known = sorted(p.name.removesuffix(REQUESTS_SUFFIX) for p in run_dir.glob(f"*{REQUESTS_SUFFIX}"))
        raise BadInputError(f"{run_dir} has no stage {stage!r}; its stages: {', '.join(known) or 'none'}.")
    rows = read_rows(file, ("request", "arrived_s", "prompt_tokens", "output_tokens", "ttft_s", "e2e_s"))
    try:
        if len({row["request"] for row in rows}) < len(rows):
            raise ValueError("two of its requests have one number")
        keys = _content_keys(rows, block_size) if "parent_request" in rows[0] else {}
        requests = [_measured(row, keys) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInputError(f"{file} is not a table of requests: {error}.") from error
    return sorted(requests, key=lambda r: r.arrived_s)


def _measured(row: dict[str, str], keys: dict[int, list[tuple[object, ...]]]) -> MeasuredRequest:
    request = MeasuredRequest(
        int(row["request"]), float(row["arrived_s"]), int(row["prompt_tokens"]), int(row["output_tokens"]),
        float(row["ttft_s"]), float(row["e2e_s"]), keys.get(int(row["request"])),
        int(row["cached_tokens"]) if row.get("cached_tokens") else None,
    )  # fmt: skip
    if request.prompt_tokens < 1 or request.output_tokens < 1:
        raise ValueError(f"request {request.key} has no prompt or no output tokens")
    if not (isfinite(request.arrived_s) and 0 < request.ttft_s < inf and 0 < request.e2e_s < inf):
        raise ValueError(f"request {request.key} needs a finite arrived_s, and a ttft_s and an e2e_s above 0")
    return request


def _content_keys(rows: list[dict[str, str]], block_size: int) -> dict[int, list[tuple[object, ...]]]:
    """Block identities of multi-turn requests: a turn repeats its parent's prompt and answer, a first turn its group's prefix
    (where groups are told)."""
    if lacking := [column for column in ("turn", "shared_with_parent_tokens") if column not in rows[0]]:
        raise ValueError(f"with parent_request it needs {' and '.join(lacking)} too")
    keys: dict[int, list[tuple[object, ...]]] = {}
    for row in sorted(rows, key=lambda r: int(r["turn"])):
        shared_blocks = int(row["shared_with_parent_tokens"]) // block_size
        if int(row["turn"]) == 0:
            if "group" in row:
                keys[int(row["request"])] = [("group", row["group"], i) for i in range(shared_blocks)]
        else:
            parent = int(row["parent_request"])
            known = keys.get(parent, [])
            keys[int(row["request"])] = [known[i] if i < len(known) else (parent, i) for i in range(shared_blocks)]
    return keys


def replay(
    requests: Sequence[MeasuredRequest],
    limits: EngineLimits,
    profile: StepTimeProfile,
    progress: Callable[[int], None] = lambda finished: None,
    engine: Engine | None = None,
) -> Replayed:
    """Run a stage through the engine model; ``progress`` is told how many requests have finished.

    ``engine``: a fresh one to play it on, by default one with the profile's times.

    Raises:
        BadInputError: a request can never run, or never end, under these limits.
    """
    engine = engine or Engine(limits, profile.curve(limits=limits))
    sequences = [
        EngineSequence(r.key, r.prompt_tokens, r.output_tokens, arrived_s=r.arrived_s, block_keys=r.block_keys)
        for r in requests
    ]
    for sequence in sequences:
        if not engine.scheduler.can_ever_run(sequence):
            raise BadInputError(f"Request {sequence.key} can never run within the engine's limits.")
        engine.add(sequence, sequence.arrived_s + profile.input_s)
    first_s = np.full(len(requests), np.nan)
    last_s = np.full(len(requests), np.nan)
    row = {s.key: i for i, s in enumerate(sequences)}
    finished = 0
    while (at_s := engine.next_event_s()) is not None:
        for now_s, batch in _by_time(engine.advance(at_s + SLICE_S)):
            seen_s = now_s + profile.output_s + profile.output_request_s * len(batch)
            for sequence in batch:
                i = row[sequence.key]
                if np.isnan(first_s[i]):
                    first_s[i] = seen_s
                if sequence.finished_s == now_s:
                    last_s[i] = seen_s
                    finished += 1
        progress(finished)
    if finished < len(requests):
        first = requests[int(np.flatnonzero(np.isnan(last_s))[0])].key
        raise BadInputError(
            f"{len(requests) - finished} requests never end within the engine's limits, the first of them {first} "
            "(without chunked prefill a prompt must fit into max_num_batched_tokens)."
        )
    arrived = np.array([r.arrived_s for r in requests])
    return Replayed(
        ttft_s=first_s - arrived, e2e_s=last_s - arrived, preemptions=int(engine.scheduler.preemptions), steps=engine.steps,
        cached_tokens=sum(int(s.hit_tokens) for s in sequences),
    )  # fmt: skip


def _by_time(tokens: list[tuple[float, EngineSequence]]) -> list[tuple[float, list[EngineSequence]]]:
    """Output tokens grouped by the update that brought them."""
    groups: list[tuple[float, list[EngineSequence]]] = []
    for at_s, sequence in tokens:
        if not groups or groups[-1][0] != at_s:
            groups.append((at_s, []))
        groups[-1][1].append(sequence)
    return groups


def compare(
    stage: str, profile: str, requests: Sequence[MeasuredRequest], made: Replayed, preemptions: int | None
) -> Fidelity:
    """Score a replay; ``preemptions``: the measured count, if known."""
    ttft = np.array([r.ttft_s for r in requests])
    e2e = np.array([r.e2e_s for r in requests])
    ttft_error, e2e_error = np.abs(made.ttft_s / ttft - 1), np.abs(made.e2e_s / e2e - 1)
    cached = [r.cached_tokens for r in requests if r.cached_tokens is not None]
    return Fidelity(
        stage=stage,
        profile=profile,
        requests=len(requests),
        e2e_error_p50=float(np.percentile(e2e_error, 50)),
        e2e_error_p90=float(np.percentile(e2e_error, 90)),
        ttft_error_p50=float(np.percentile(ttft_error, 50)),
        ttft_error_p90=float(np.percentile(ttft_error, 90)),
        e2e_mean_ratio=float(made.e2e_s.mean() / e2e.mean()),
        ttft_mean_ratio=float(made.ttft_s.mean() / ttft.mean()),
        e2e_p99_ratio=float(np.percentile(made.e2e_s, 99) / np.percentile(e2e, 99)),
        ttft_p99_ratio=float(np.percentile(made.ttft_s, 99) / np.percentile(ttft, 99)),
        preemptions=made.preemptions,
        preemptions_measured=preemptions,
        cached_tokens=made.cached_tokens if cached else None,
        cached_tokens_measured=sum(cached) if cached else None,
    )


def measured_preemptions(run_dir: Path, stage: str) -> int | None:
    """How often the measured engine preempted during a stage; ``None``: no step log, or one that does not say.

    Raises:
        BadInputError: the log is malformed.
    """
    file = run_dir / f"{stage}{STEPS_SUFFIX}"
    if not file.exists():
        return None
    rows = read_rows(file, ())
    try:
        return int(rows_as_floats(rows, "preempted").sum()) if rows and "preempted" in rows[0] else None
    except (ValueError, TypeError) as error:
        raise BadInputError(f"{file} is not a step log: {error}.") from error
