"""Turns a live vLLM scheduler into snapshots, twice a step, in tens of microseconds.

Theory of operation. A snapshot is published after ``schedule()``, so that a long step is visible as in flight while it
runs, and after ``update_from_output()``. What never changes about a request (key, lengths, priority) is packed once,
when it is first seen, and joined again only when the queues' order has changed; what changes every step is read from
the requests in one pass per field. Batches in flight are kept here, not asked from vLLM, whose versions count them
differently: each knows the tokens of its requests and which of them will not yield an output token.
"""

import logging
import struct
import time
from array import array
from collections import deque
from itertools import islice
from typing import Any, Final

import numpy as np

from block.integrations.vllm.scheduler_view import external_id, limits_of_scheduler, waiting_in_order
from block.predict import snapshot as wire
from block.predict.snapshot import STEP, header_of, request_key
from block.predictor.shared_memory import SnapshotWriter

log = logging.getLogger("vllm.block")

STEPS_KEPT: Final = 16
COST_TOLD_AFTER: Final = 5_000  # snapshots
# What is packed once per request; see _fixed.
FIXED: Final = np.dtype(
    [
        ("key", "<u8"),
        ("arrived", "<f8"),
        ("prompt", "<i4"),
        ("max_tokens", "<i4"),
        ("priority", "<i4"),
        ("exact", "<i4"),
    ]
)
_FIXED = struct.Struct("<Qdiiii")
_STEP = struct.Struct("<ddiqidi")
_INT32_MAX = 2**31 - 1
assert _FIXED.size == FIXED.itemsize
assert _STEP.size == STEP.itemsize


class _Flight:
    """A batch in flight: tokens by request id, the ids among them that will not sample, and its shape for the step log.

    ``rows``: its tokens and sample flags aligned with the queues as they were at ``rows_order``.
    """

    __slots__ = ("not_sampling", "output", "rows", "rows_order", "scheduled_s", "shape", "tokens")

    def __init__(self, output: Any, scheduled_s: float) -> None:
        self.output = output
        self.tokens: dict[str, int] = output.num_scheduled_tokens
        self.scheduled_s = scheduled_s
        self.not_sampling: frozenset[str] = frozenset()
        self.shape: tuple[int, int, int, float, int] = (0, 0, 0, 0.0, 0)
        self.rows: tuple[Any, Any] | None = None
        self.rows_order = -1


class StatePublisher:
    """Publishes one scheduler's state as ``name``. Methods are called by the engine's one scheduling thread.

    Raises:
        BadInputError: another live engine publishes under this name.
        AttributeError: this version of vLLM keeps its state elsewhere.
    """

    def __init__(self, scheduler: Any, name: str, *, waiting_max: int = 256) -> None:
        self.limits = limits_of_scheduler(scheduler)
        self.published = 0
        self.spent_s = 0.0
        capacity = scheduler.max_num_running_reqs + waiting_max
        self._writer = SnapshotWriter(
            name, capacity=wire.HEADER.itemsize + capacity * (4 * wire.FIELDS + 16) + STEPS_KEPT * STEP.itemsize
        )
        self._header = header_of(self.limits)
        self._header["epoch"] = time.time_ns()
        self._capacity, self._waiting_max = capacity, waiting_max
        self._rows = np.zeros((wire.FIELDS, capacity), "<i4")
        self._shown: list[Any] = []
        self._ids: list[str] = []
        self._fixed = np.zeros(0, FIXED)
        self._order = 0  # grows when the queues' members or order change
        self._preempted_waits = False
        self._hears_preemptions = hasattr(scheduler, "_preempt_request")
        self._preemptions = 0
        self._flights: deque[_Flight] = deque()
        self._steps: deque[bytes] = deque(maxlen=STEPS_KEPT)
        self._finished_s = 0.0
        self._heap: list[Any] = []
        self._heap_sorted: list[Any] = []
        self._placeholders = self.limits.async_scheduling
        _warn_of_approximations(scheduler)
        self._read(scheduler)
        self._write(scheduler)

    def close(self) -> None:
        self._writer.close()

    def arrived(self, request: Any) -> None:
        """Nothing to do: a request is described when it is first seen in a queue."""

    def preempted(self, _request: Any) -> None:
        self._preemptions += 1

    def scheduled(self, scheduler: Any, output: Any, started_s: float) -> None:
        """Publish the state after a ``schedule()`` that began at ``started_s``."""
        began = time.thread_time()
        self._read(scheduler, results_came=False)
        if output.total_num_scheduled_tokens:
            self._flights.append(self._flight(output, started_s))
        self._write(scheduler)
        self.spent_s += time.thread_time() - began

    def updated(self, scheduler: Any, output: Any, finished_s: float) -> None:
        """Publish the state after the results of ``output``, in since ``finished_s``, were taken in."""
        began = time.thread_time()
        if not output.total_num_scheduled_tokens:
            return
        while self._flights:
            flight = self._flights.popleft()
            if flight.output is output:
                break
        else:
            return
        decodes, context, prefill_tokens, work, chunks = flight.shape
        self._steps.append(_STEP.pack(flight.scheduled_s, finished_s, decodes, context, prefill_tokens, work, chunks))
        self._finished_s = finished_s
        self._read(scheduler)
        self._write(scheduler)
        self.spent_s += time.thread_time() - began

    # ---- reading the scheduler

    def _read(self, scheduler: Any, *, results_came: bool = True) -> None:
        """Refresh the rows that come straight from the requests; output tokens change only when results came."""
        running = scheduler.running
        waiting, total, beyond = self._waiting(scheduler)
        shown = running + waiting if waiting else list(running)
        header, rows, held, n = self._header, self._rows, len(running), len(shown)
        moved = shown != self._shown or held != header["running"]
        if moved:
            self._reorder(shown, held)
        header["running"], header["waiting"] = held, len(waiting)
        header["waiting_total"], header["waiting_tokens_beyond"] = total, beyond
        # A waiting request changes only while tokens from before its preemption are in flight.
        read, of = (shown, n) if moved or self._preempted_waits else (running, held)
        computed = array("i", [r.num_computed_tokens for r in read])
        rows[wire.COMPUTED, :of] = computed
        if results_came or moved:
            rows[wire.OUTPUT, :of] = array("i", [len(r._output_token_ids) for r in read])
        if self._placeholders:
            rows[wire.PLACEHOLDERS, :of] = array("i", [r.num_output_placeholders for r in read])
        size = self.limits.block_size
        rows[wire.BLOCKS, :held] = (rows[wire.COMPUTED, :held] + (size - 1)) // size
        rows[wire.BLOCKS, held:n] = 0
        if self._preempted_waits or moved:
            rows[wire.STALE, :held] = 0
            stale = array("i", [getattr(r, "num_stale_output_tokens", 0) for r in waiting])
            rows[wire.STALE, held:n] = stale
            self._preempted_waits = any(stale)

    def _reorder(self, shown: list[Any], running: int) -> None:
        """The queues hold others, or in another order: rebuild what is fixed per request."""
        if not self._hears_preemptions:
            before = set(map(id, self._shown[: int(self._header["running"])]))
            self._preemptions += sum(id(r) in before for r in shown[running:])
        try:
            packed = b"".join([r._block_fixed for r in shown])
        except AttributeError:
            for request in shown:
                if not hasattr(request, "_block_fixed"):
                    request._block_fixed = _fixed(request, self.limits.max_model_len)
            packed = b"".join([r._block_fixed for r in shown])
        n, rows = len(shown), self._rows
        self._fixed = fixed = np.frombuffer(packed, FIXED)
        rows[wire.PROMPT, :n], rows[wire.MAX_TOKENS, :n] = fixed["prompt"], fixed["max_tokens"]
        rows[wire.PRIORITY, :n] = fixed["priority"]
        if self._preemptions:
            rows[wire.PREEMPTIONS, :n] = array("i", [getattr(r, "num_preemptions", 0) for r in shown])
        self._shown = shown
        self._ids = [r.request_id for r in shown]
        self._order += 1

    def _waiting(self, scheduler: Any) -> tuple[list[Any], int, int]:
        """The waiting requests to show, how many wait in all, and the prompt tokens of those not shown."""
        queue = scheduler.waiting
        total = len(queue)
        for name in ("kv_holding_waiting", "skipped_waiting"):
            total += len(getattr(scheduler, name, ()))
        if not total:
            return [], 0, 0
        heap = getattr(queue, "_heap", None)
        if heap is not None:
            waiting = self._sorted(scheduler, heap)
        elif total == len(queue) and total <= self._waiting_max:
            return list(queue), total, 0
        else:
            waiting = waiting_in_order(scheduler)
        beyond = sum([r.num_prompt_tokens for r in islice(waiting, self._waiting_max, None)])
        return waiting[: self._waiting_max], total, beyond

    def _sorted(self, scheduler: Any, heap: list[Any]) -> list[Any]:
        """A priority queue in order; sorted anew only when it has changed, which is rarer than steps are."""
        if heap != self._heap or not self._heap_sorted:
            self._heap = list(heap)
            self._heap_sorted = waiting_in_order(scheduler)
        return self._heap_sorted

    def _flight(self, output: Any, scheduled_s: float) -> _Flight:
        """Describe the batch that was just scheduled; its tokens are already counted in the rows."""
        n, rows = len(self._ids), self._rows
        flight = _Flight(output, scheduled_s)
        tokens = self._tokens_row(flight.tokens)
        computed, prompt = rows[wire.COMPUTED, :n], rows[wire.PROMPT, :n]
        present = tokens > 0
        if self._placeholders:
            samples = present & (rows[wire.PLACEHOLDERS, :n] > 0)
        else:
            samples = present & (computed >= prompt + rows[wire.OUTPUT, :n])
        before = computed - tokens
        decoding = (tokens == 1) & (before >= prompt)
        decodes = int(np.count_nonzero(decoding))
        context = int(np.dot(decoding, before.astype(np.int64)))
        if decodes == len(flight.tokens):
            flight.shape = (decodes, context, 0, 0.0, 0)
        else:
            chunks = np.flatnonzero(present & ~decoding)
            sizes = tokens[chunks].astype(np.int64)
            work = float(np.dot(sizes, before[chunks] + 0.5 * sizes))
            flight.shape = (decodes, context, int(sizes.sum()), work, len(chunks))
            flight.not_sampling = frozenset([self._ids[i] for i in np.flatnonzero(present & ~samples)])
        flight.rows, flight.rows_order = (tokens, samples), self._order
        return flight

    def _tokens_row(self, tokens: dict[str, int]) -> Any:
        get = tokens.get
        return np.frombuffer(array("i", [get(key, 0) for key in self._ids]), np.int32)

    def _rows_of(self, flight: _Flight) -> tuple[Any, Any]:
        """A batch's tokens and sample flags, aligned with the queues as they are now."""
        if flight.rows is None or flight.rows_order != self._order:
            tokens = self._tokens_row(flight.tokens)
            samples = tokens > 0
            if flight.not_sampling:
                samples &= ~np.array([key in flight.not_sampling for key in self._ids], bool)
            flight.rows, flight.rows_order = (tokens, samples), self._order
        return flight.rows

    # ---- writing

    def _write(self, scheduler: Any) -> None:
        n, rows, header = len(self._ids), self._rows, self._header
        flags = self._fixed["exact"].copy()
        rows[wire.BATCH_1, :n] = rows[wire.BATCH_2, :n] = 0
        if not self._placeholders:
            rows[wire.PLACEHOLDERS, :n] = 0
        for i, flight in enumerate(self._flights):
            newer = min(i, 1)  # more than two exist under pipeline parallelism only; they count as the newer
            tokens, samples = self._rows_of(flight)
            rows[wire.BATCH_1 + newer, :n] += tokens
            flags |= samples * np.int32(wire.SAMPLES_2 if newer else wire.SAMPLES_1)
            if not self._placeholders:
                # A synchronous vLLM does not count the token that its one batch in flight will bring; the model does.
                rows[wire.PLACEHOLDERS, :n] = samples
        rows[wire.FLAGS, :n] = flags
        header["batches_in_flight"] = min(len(self._flights), 2)
        if self._flights:
            header["batch_1_started_s"] = max(self._flights[0].scheduled_s, self._finished_s)
            header["newest_scheduled_s"] = self._flights[-1].scheduled_s
        header["preemptions_total"] = self._preemptions
        header["kv_blocks_free"] = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        header["steps"] = len(self._steps)
        self.published += 1
        header["sequence"] = self.published
        header["taken_s"] = time.time()
        keys, arrived = self._fixed["key"].tobytes(), self._fixed["arrived"].tobytes()
        if self.published == COST_TOLD_AFTER:
            log.info("Block: a snapshot costs this engine %.0f us on average.", 1e6 * self.spent_s / self.published)
        self._writer.write(b"".join((header.tobytes(), rows[:, :n].tobytes(), keys, arrived, *self._steps)))


def _fixed(request: Any, model_len: int) -> bytes:
    """Pack what never changes about a request."""
    options = request.sampling_params
    max_tokens = min(request.max_tokens or 1, max(model_len - request.num_prompt_tokens, 1))
    exact = options is not None and (
        (options.ignore_eos and not options.stop and not options.stop_token_ids)
        or (getattr(options, "min_tokens", 0) or 0) >= max_tokens
    )
    priority = max(-_INT32_MAX, min(int(request.priority), _INT32_MAX))
    key = request_key(external_id(request.request_id))
    return _FIXED.pack(
        key, request.arrival_time, request.num_prompt_tokens, max_tokens, priority, wire.EXACT if exact else 0
    )


def _warn_of_approximations(scheduler: Any) -> None:
    """Say once what this engine does that the engine model leaves out."""
    options = scheduler.vllm_config.scheduler_config
    groups = len(getattr(scheduler.kv_cache_config, "kv_cache_groups", ()) or ())
    reasons = {
        "several kinds of KV cache": groups > 1,
        "speculative decoding": bool(getattr(scheduler, "num_spec_tokens", 0)),
        "a KV connector": getattr(scheduler, "connector", None) is not None,
        "pipeline parallelism": getattr(scheduler.vllm_config.parallel_config, "pipeline_parallel_size", 1) > 1,
        "--long-prefill-token-threshold-adaptive": bool(
            getattr(options, "long_prefill_token_threshold_adaptive", False)
        ),
        "--prefill-schedule-interval": (getattr(options, "prefill_schedule_interval", 1) or 1) > 1,
    }
    found = [name for name, present in reasons.items() if present]
    if found:
        log.warning(
            "Block publishes this engine's state, but its predictions will be approximate: %s not modelled.",
            ", ".join(found),
        )
