"""Turns a live vLLM scheduler into snapshots, once a step, in tens of microseconds.

Theory of operation. A snapshot is published after ``schedule()``, so that a long step is visible as in flight while it
runs; it tells what ``update_from_output()`` changed just before, too. The queues are read by ``rows``. Batches in flight
are kept here, not asked from vLLM, whose versions count them differently: each knows the tokens of its requests and which
of them will not yield an output token.
"""

import logging
import struct
import time
from array import array
from collections import deque
from typing import Any, Final

import numpy as np

from block.integrations.vllm.prefix import PrefixCounts
from block.integrations.vllm.rows import QueueRows
from block.integrations.vllm.scheduler_view import limits_of_scheduler
from block.predict import snapshot as wire
from block.predict.snapshot import PREFIX, STEP, header_of
from block.predictor.shared_memory import SnapshotWriter

log = logging.getLogger("vllm.block")

STEPS_KEPT: Final = 16
COST_TOLD_AFTER: Final = 5_000  # snapshots
_STEP = struct.Struct("<ddiqidi")
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

    def __init__(self, scheduler: Any, name: str, *, waiting_max: int = 128) -> None:
        self.limits = limits_of_scheduler(scheduler)
        self.published = 0
        self.spent_s = 0.0
        capacity = scheduler.max_num_running_reqs + waiting_max
        self._writer = SnapshotWriter(
            name,
            capacity=wire.HEADER.itemsize
            + capacity * (4 * wire.FIELDS + 20)
            + STEPS_KEPT * STEP.itemsize
            + PREFIX.itemsize,
        )
        self._header = header_of(self.limits)
        self._header["epoch"] = time.time_ns()
        self._queues = QueueRows(scheduler, self.limits, waiting_max)
        self._prefix = PrefixCounts() if self.limits.enable_prefix_caching else None
        if self._prefix is not None:
            self._header["flags"] |= wire.PREFIX_TOLD
        self._flights: deque[_Flight] = deque()
        self._steps: deque[bytes] = deque(maxlen=STEPS_KEPT)
        self._finished_s, self._results_came = 0.0, False
        self._placeholders = self.limits.async_scheduling
        _warn_of_approximations(scheduler)
        self._queues.read(scheduler, results_came=True)
        self._write(scheduler)

    def close(self) -> None:
        self._writer.close()

    def arrived(self, request: Any) -> None:
        self._queues.arrived(request)

    def preempted(self, request: Any) -> None:
        self._queues.preempted(request)

    def scheduled(self, scheduler: Any, output: Any, started_s: float) -> None:
        """Publish the state after a ``schedule()`` that began at ``started_s``."""
        began = time.thread_time()
        if self._prefix is not None:
            self._prefix.scheduled(scheduler, output, self._queues)
        self._queues.read(scheduler, results_came=self._results_came)
        self._results_came = False
        if output.total_num_scheduled_tokens:
            self._flights.append(self._flight(output, started_s))
        self._write(scheduler)
        self.spent_s += time.thread_time() - began

    def updated(self, scheduler: Any, output: Any, finished_s: float) -> None:
        """The results of ``output``, in since ``finished_s``, were taken in. Published now only if nothing is left to
        schedule: else ``schedule()`` follows at once, and what is published then tells this too."""
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
        self._finished_s, self._results_came = finished_s, True
        if not scheduler.running and not scheduler.waiting:
            self._queues.read(scheduler, results_came=True)
            self._write(scheduler)
        self.spent_s += time.thread_time() - began

    # ---- batches in flight

    def _flight(self, output: Any, scheduled_s: float) -> _Flight:
        """Describe the batch that was just scheduled; its tokens are already counted in the rows."""
        queues = self._queues
        n, rows = queues.reach, queues.rows
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
            flight.not_sampling = frozenset([queues.ids[i] for i in np.flatnonzero(present & ~samples)])
        flight.rows, flight.rows_order = (tokens, samples), queues.order
        return flight

    def _tokens_row(self, tokens: dict[str, int]) -> Any:
        get = tokens.get
        return np.frombuffer(array("i", [get(key, 0) for key in self._queues.ids]), np.int32)

    def _rows_of(self, flight: _Flight) -> tuple[Any, Any]:
        """A batch's tokens and sample flags, aligned with the queues as they are now."""
        queues = self._queues
        if flight.rows is None or flight.rows_order != queues.order:
            tokens = self._tokens_row(flight.tokens)
            samples = tokens > 0
            if flight.not_sampling:
                samples &= ~np.array([key in flight.not_sampling for key in queues.ids], bool)
            flight.rows, flight.rows_order = (tokens, samples), queues.order
        return flight.rows

    # ---- writing

    def _write(self, scheduler: Any) -> None:
        queues, header = self._queues, self._header
        n, reach, rows = queues.shown, queues.reach, queues.rows
        rows[wire.FLAGS, :n] = queues.fixed["exact"]
        rows[wire.BATCH_1 : wire.BATCH_2 + 1, :n] = 0
        if not self._placeholders:
            rows[wire.PLACEHOLDERS, :n] = 0
        for i, flight in enumerate(self._flights):
            newer = min(i, 1)  # more than two exist under pipeline parallelism only; they count as the newer
            tokens, samples = self._rows_of(flight)
            rows[wire.BATCH_1 + newer, :reach] += tokens
            rows[wire.FLAGS, :reach] |= samples * np.int32(wire.SAMPLES_2 if newer else wire.SAMPLES_1)
            if not self._placeholders:
                # A synchronous vLLM does not count the token that its one batch in flight will bring; the model does.
                rows[wire.PLACEHOLDERS, :reach] = samples
        self._fill_header(scheduler)
        if self.published == COST_TOLD_AFTER:
            log.info("Block: a snapshot costs this engine %.0f us on average.", 1e6 * self.spent_s / self.published)
        prefix = () if self._prefix is None else (self._prefix.record(scheduler), queues.hits)
        self._writer.write(b"".join((header.tobytes(), rows[:, :n].tobytes(), queues.names, *self._steps, *prefix)))

    def _fill_header(self, scheduler: Any) -> None:
        queues, header = self._queues, self._header
        header["running"], header["waiting"] = queues.running, queues.waiting
        header["waiting_total"], header["waiting_tokens_beyond"] = queues.waiting_total, queues.tokens_beyond
        header["batches_in_flight"] = min(len(self._flights), 2)
        if self._flights:
            header["batch_1_started_s"] = max(self._flights[0].scheduled_s, self._finished_s)
            header["newest_scheduled_s"] = self._flights[-1].scheduled_s
        header["preemptions_total"] = queues.preemptions
        header["kv_blocks_free"] = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        header["steps"] = len(self._steps)
        self.published += 1
        header["sequence"] = self.published
        header["taken_s"] = time.time()


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
