"""The scheduler's queues as the rows of a snapshot, refreshed in one pass per field and never more than needed.

Theory of operation. What never changes about a request is packed once, when it arrives, and joined again only when the
queues' order has changed. What changes every step is read from the requests that run. A waiting request has computed,
generated and in flight nothing unless it was preempted, so the waiting ones are looked at only while such a one
is among them. Waiting requests beyond a cap are a count and a sum of tokens; a long tail's sum is counted now and then
and scaled by its length in between. So the cost grows with what runs, hardly with what waits.
"""

import struct
from array import array
from collections.abc import Sequence
from itertools import islice
from operator import attrgetter
from typing import Any, Final

import numpy as np

from block.engine.limits import EngineLimits
from block.integrations.vllm.scheduler_view import external_id, waiting_apart
from block.predict import snapshot as wire
from block.predict.snapshot import request_key

BEYOND_COUNTED: Final = 64  # a longer tail of the queue is counted anew only now and then
BEYOND_EVERY: Final = 50
# What is packed once per request; see _fixed.
FIXED: Final = np.dtype(
    [
        ("key", "<u8"), ("arrived", "<f8"), ("prompt", "<i4"), ("max_tokens", "<i4"), ("priority", "<i4"),
        ("exact", "<i4"), ("preemptions", "<i4"), ("hit", "<i4"),
    ]
)  # fmt: skip
_FIXED = struct.Struct("<Qdiiiiii")
_HIT = struct.Struct("<i")
_INT32_MAX = 2**31 - 1
_place = attrgetter("priority", "arrival_time", "request_id")
assert _FIXED.size == FIXED.itemsize


class QueueRows:
    """Running requests in order, then waiting ones; ``read`` brings it up to date.

    ``rows``: (FIELDS, capacity) int32, of which ``shown`` columns hold; ``ids``: of the first ``reach``, which are those that
    may have tokens in flight; ``order`` grows when the queues' members or order change.
    """

    def __init__(self, scheduler: Any, limits: EngineLimits, waiting_max: int) -> None:
        self.running = self.waiting = self.waiting_total = self.tokens_beyond = self.preemptions = 0
        self.rows = np.zeros((wire.FIELDS, scheduler.max_num_running_reqs + waiting_max), "<i4")
        self.ids: list[str] = []
        self.order = self.shown = 0
        self.names = b""
        """Keys and arrival times of the requests shown, as a snapshot has them."""
        self.hits = b""
        """Prompt tokens that each request shown found in the prefix cache, int32; -1: not admitted yet."""
        self.fixed = np.zeros(0, FIXED)
        self._limits, self._waiting_max = limits, waiting_max
        self._placeholders = limits.async_scheduling
        self._members: list[Any] = []
        self._ran = 0
        self._hears_preemptions = hasattr(scheduler, "_preempt_request")
        # With a KV connector a waiting request may hold computed tokens without ever having run.
        self._connected = getattr(scheduler, "connector", None) is not None
        self._returned = self._connected  # whether a request that has run before may be waiting
        self._stale = False  # whether one of those may have tokens in flight
        self._tells_stale = True  # whether this version of vLLM says so
        self._heap: list[Any] = []
        self._heap_sorted: list[Any] = []
        self._tail = (0, 0.0, 0)  # requests, mean prompt and age of the tail as last counted

    @property
    def reach(self) -> int:
        """How many requests, from the first, may have tokens in flight."""
        return len(self.ids)

    def preempted(self, request: Any) -> None:
        """A running request goes back to the queue."""
        self.preemptions += 1
        self._tells_stale = hasattr(request, "num_stale_output_tokens")
        request._block_preemptions = getattr(request, "_block_preemptions", 0) + 1
        request.__dict__.pop("_block_fixed", None)  # packed again when it is next shown

    def arrived(self, request: Any) -> None:
        """Pack what never changes about a request before a step has to wait for it."""
        request._block_fixed = _fixed(request, self._limits.max_model_len)

    def found(self, request: Any, hit: int) -> None:
        """A waiting request was admitted and found ``hit`` prompt tokens in the prefix cache."""
        request._block_hit = hit
        if (packed := getattr(request, "_block_fixed", None)) is not None:
            request._block_fixed = packed[: -_HIT.size] + _HIT.pack(hit)

    def read(self, scheduler: Any, *, results_came: bool) -> None:
        """Refresh the rows; output tokens change only when results came."""
        running = scheduler.running
        waiting = self._look_at_waiting(scheduler)
        shown = running + waiting if waiting else list(running)
        rows, held, n = self.rows, len(running), len(shown)
        moved = shown != self._members or held != self.running
        self.running, self.waiting = held, len(waiting)
        if moved:
            self._reorder(shown, held)
        read, of = (shown, n) if self._returned and (moved or self._stale) else (running, held)
        rows[wire.COMPUTED, :of] = array("i", [r.num_computed_tokens for r in read])
        if results_came or moved:
            rows[wire.OUTPUT, :of] = array("i", [len(r._output_token_ids) for r in read])
        if self._placeholders:
            rows[wire.PLACEHOLDERS, :of] = array("i", [r.num_output_placeholders for r in read])
        size = self._limits.block_size
        rows[wire.BLOCKS, :held] = (rows[wire.COMPUTED, :held] + (size - 1)) // size
        if moved:
            rows[wire.BLOCKS, held:n] = 0
            rows[wire.STALE, :n] = 0
            rows[wire.COMPUTED : wire.PLACEHOLDERS + 1, of:n] = 0
        if of > held:
            stale = array("i", [getattr(r, "num_stale_output_tokens", 0) for r in waiting])
            rows[wire.STALE, held:n] = stale
            self._stale = not self._tells_stale or any(stale)
        elif moved:
            self._stale = False

    def _reorder(self, shown: list[Any], running: int) -> None:
        """The queues hold others, or in another order: rebuild what is fixed per request."""
        if not self._hears_preemptions:
            ran = set(map(id, self._members[: self._ran]))
            for request in shown[running:]:
                if id(request) in ran:
                    self.preempted(request)
        try:
            packed = b"".join([r._block_fixed for r in shown])
        except AttributeError:
            for request in shown:
                if not hasattr(request, "_block_fixed"):
                    self.arrived(request)
            packed = b"".join([r._block_fixed for r in shown])
        n, rows = len(shown), self.rows
        self.fixed = fixed = np.frombuffer(packed, FIXED)
        rows[wire.PROMPT, :n], rows[wire.MAX_TOKENS, :n] = fixed["prompt"], fixed["max_tokens"]
        rows[wire.PRIORITY, :n], rows[wire.PREEMPTIONS, :n] = fixed["priority"], fixed["preemptions"]
        self.names, self.hits = fixed["key"].tobytes() + fixed["arrived"].tobytes(), fixed["hit"].tobytes()
        self._returned = self._connected or bool(fixed["preemptions"][running:].any())
        self.ids = [r.request_id for r in (shown if self._returned else shown[:running])]
        self._members, self._ran, self.shown = shown, running, n
        self.order += 1

    # ---- who waits

    def _look_at_waiting(self, scheduler: Any) -> Sequence[Any]:
        """The waiting requests to show; also how many wait in all, and the prompt tokens of those not shown."""
        queue, most = scheduler.waiting, self._waiting_max
        apart = waiting_apart(scheduler)
        self.waiting_total = total = len(queue) + len(apart)
        if not total:
            self.tokens_beyond = 0
            return ()
        heap = getattr(queue, "_heap", None)
        ordered = queue if heap is None else self._sorted(heap)
        if apart:
            ordered = [*apart, *ordered]
        self.tokens_beyond = self._count_beyond(ordered, total - most) if total > most else 0
        return list(islice(ordered, most))

    def _sorted(self, heap: list[Any]) -> list[Any]:
        """A priority queue in order; sorted anew only when it has changed, which is rarer than steps are."""
        if heap != self._heap:
            self._heap = list(heap)
            requests = [entry[-1] if isinstance(entry, tuple) else entry for entry in heap]  # tuples: vLLM 0.10
            self._heap_sorted = sorted(requests, key=_place)
        return self._heap_sorted

    def _count_beyond(self, ordered: Any, count: int) -> int:
        """Prompt tokens of the last ``count`` waiting requests; of many, as far as their number tells."""
        counted, mean, age = self._tail
        if count <= BEYOND_COUNTED or age >= BEYOND_EVERY or 16 * abs(count - counted) > counted:
            mean, age = sum([r.num_prompt_tokens for r in islice(ordered, self._waiting_max, None)]) / count, 0
            counted = count
        self._tail = (counted, mean, age + 1)
        return round(mean * count)


def _fixed(request: Any, model_len: int) -> bytes:
    """Pack what never changes about a request."""
    options = request.sampling_params
    max_tokens = min(request.max_tokens or 1, max(model_len - request.num_prompt_tokens, 1))
    exact = options is not None and (
        (options.ignore_eos and not options.stop and not options.stop_token_ids)
        or (getattr(options, "min_tokens", 0) or 0) >= max_tokens
    )
    priority = max(-_INT32_MAX, min(int(request.priority), _INT32_MAX))
    return _FIXED.pack(
        request_key(external_id(request.request_id)), request.arrival_time, request.num_prompt_tokens, max_tokens, priority,
        wire.EXACT if exact else 0, _preemptions(request), getattr(request, "_block_hit", -1),
    )  # fmt: skip


def _preemptions(request: Any) -> int:
    """How often it went back to the queue; some versions of vLLM do not count that."""
    own = int(getattr(request, "_block_preemptions", 0))
    return int(getattr(request, "num_preemptions", own))
