"""The engine model's state as a snapshot, as the vLLM plugin would publish it.

Only what a scheduler knows goes in (law L7): ``MAX_TOKENS`` is the client's bound, and when a sequence will really
stop is never read here. Requests still on their way to the scheduler's queue are not in a snapshot, as in vLLM.
"""

import struct
from collections import deque
from collections.abc import Container
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from block.engine.limits import EngineLimits
from block.engine.pipeline import STEPS_KEPT, Engine, Flight
from block.predict.snapshot import (
    BATCH_1,
    BATCH_2,
    COMPUTED,
    EXACT,
    FIELDS,
    FLAGS,
    HEADER,
    PREFIX,
    PREFIX_TOLD,
    SAMPLES_1,
    SAMPLES_2,
    STEP,
    header_of,
)

WAITING_MAX = 256  # waiting requests described one by one; those beyond are a count and a token sum
_STEP = struct.Struct("<ddiqidi")
_PREFIX = struct.Struct("<qqii")
assert (_STEP.size, _PREFIX.size) == (STEP.itemsize, PREFIX.itemsize)


class Recorder:
    """Takes snapshots of one engine; remembers only what makes them cheap (the packed step log, the header).

    ``epoch`` tells this life of the engine from others of the same name.
    """

    def __init__(self, engine: Engine, epoch: int = 0, waiting_max: int = WAITING_MAX) -> None:
        self._engine = engine
        self._waiting_max = waiting_max
        self._header = header_of(engine.limits)
        self._header["epoch"] = epoch
        self._header["flags"] |= PREFIX_TOLD * engine.limits.enable_prefix_caching
        self._sequence = 0
        self._steps: deque[bytes] = deque(maxlen=STEPS_KEPT)
        self._steps_packed = 0

    def capture(
        self,
        now_s: float,
        wall_offset_s: float = 0.0,
        exact: Container[int] = frozenset(),
        cached_blocks: npt.NDArray[np.uint64] | None = None,
    ) -> bytes:
        """One encoded snapshot.

        ``now_s`` is the engine's time, ``wall_offset_s`` what makes it the wall clock's; ``exact`` holds the keys of
        the requests whose output the client fixed. Grows the snapshot's sequence number.
        """
        engine = self._engine
        scheduler = engine.scheduler
        sequences: list[Any] = list(scheduler.running)
        running = len(sequences)
        sequences += islice(scheduler.waiting, self._waiting_max)
        self._pack_steps(wall_offset_s)
        self._fill_header(running, len(sequences) - running, now_s, wall_offset_s)
        self._header["cached"] = 0 if cached_blocks is None else len(cached_blocks)
        keys = [s.key for s in sequences]
        count = len(keys)
        parts = [
            self._header.tobytes(),
            struct.pack(f"<{FIELDS * count}i", *_rows(sequences, keys, list(engine.in_flight), exact)),
            struct.pack(f"<{count}Q{count}d", *keys, *[s.arrived_s + wall_offset_s for s in sequences]),
            *self._steps,
        ]
        if cached_blocks is not None:
            parts.append(cached_blocks.tobytes())
        if (pool := scheduler.pool) is not None:
            parts.append(_PREFIX.pack(pool.queried_tokens, pool.hit_tokens, len(pool.blocks_of), 0))
            parts.append(struct.pack(f"<{count}i", *[s.hit_tokens if s.scheduled_s >= 0 else -1 for s in sequences]))
        return b"".join(parts)

    def _fill_header(self, running: int, waiting: int, now_s: float, wall_offset_s: float) -> None:
        engine, header = self._engine, self._header
        scheduler = engine.scheduler
        self._sequence += 1
        header["running"], header["waiting"], header["waiting_total"] = running, waiting, len(scheduler.waiting)
        header["steps"], header["sequence"] = len(self._steps), self._sequence
        header["taken_s"] = now_s + wall_offset_s
        header["kv_blocks_free"], header["preemptions_total"] = scheduler.blocks_free, scheduler.preemptions
        header["waiting_tokens_beyond"] = sum(s.prompt for s in islice(scheduler.waiting, self._waiting_max, None))
        flights = engine.in_flight
        header["batches_in_flight"] = len(flights)
        header["batch_1_started_s"] = flights[0].started_s + wall_offset_s if flights else 0.0
        header["newest_scheduled_s"] = flights[-1].scheduled_s + wall_offset_s if flights else 0.0

    def _pack_steps(self, wall_offset_s: float) -> None:
        engine = self._engine
        finished = engine.steps - len(engine.in_flight)
        fresh = min(finished - self._steps_packed, len(engine.recent))
        self._steps_packed = finished
        for flight, finished_s in islice(engine.recent, len(engine.recent) - fresh, None):
            batch = flight.batch
            self._steps.append(
                _STEP.pack(
                    flight.scheduled_s + wall_offset_s, finished_s + wall_offset_s, batch.decode_requests,
                    batch.context, batch.prefill_tokens, batch.prefill_work, len(batch.chunks),
                )
            )  # fmt: skip


def _rows(sequences: list[Any], keys: list[int], flights: list[Flight], exact: Container[int]) -> list[int]:
    """The FIELDS x n integers of a snapshot's requests, row after row, in the order of ``predict.snapshot``."""
    count = len(sequences)
    flags = [EXACT if key in exact else 0 for key in keys] if exact else [0] * count
    in_batch = [[0] * count, [0] * count]
    at = dict(zip(keys, range(count), strict=True)) if flights else {}
    for flight, column, samples in zip(flights, in_batch, (SAMPLES_1, SAMPLES_2), strict=False):
        batch = flight.batch
        for sequence, tokens, sampled in zip(batch.sequences, batch.tokens, batch.samples, strict=True):
            i = at.get(sequence.key)  # a request that has finished meanwhile is not there any more
            if i is not None:
                column[i] = tokens
                if sampled:
                    flags[i] += samples
    rows = [s.prompt for s in sequences]
    rows += [s.max_tokens for s in sequences]
    rows += [s.computed for s in sequences]
    rows += [s.output for s in sequences]
    rows += [s.placeholders for s in sequences]
    rows += in_batch[0]
    rows += in_batch[1]
    rows += [s.stale for s in sequences]
    rows += [s.blocks for s in sequences]
    rows += [s.priority for s in sequences]
    rows += flags
    rows += [s.preemptions for s in sequences]
    return rows


assert (COMPUTED, BATCH_1, BATCH_2, FLAGS, FIELDS) == (2, 5, 6, 10, 12), (
    "_rows lists the fields in the snapshot's order"
)


def size_max(limits: EngineLimits, cached_blocks: bool = False, waiting_max: int = WAITING_MAX) -> int:
    """Bytes that a snapshot of an engine with these limits has at most."""
    requests = limits.max_num_seqs + waiting_max
    blocks = limits.num_gpu_blocks if cached_blocks else 0
    hits = PREFIX.itemsize + 4 * requests if limits.enable_prefix_caching else 0
    return HEADER.itemsize + requests * (4 * FIELDS + 16) + STEPS_KEPT * STEP.itemsize + 8 * blocks + hits


def cached_keys(engine: Engine) -> npt.NDArray[np.uint64] | None:
    """Content keys of the findable prefix-cache blocks, ``None`` without prefix caching."""
    pool = engine.scheduler.pool
    if pool is None:
        return None
    return np.array([key for key in pool.blocks_of if isinstance(key, int)], np.uint64)
