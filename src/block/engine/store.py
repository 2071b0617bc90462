"""The state of the fast engine in flat arrays: a row per request, rings, a heap, aggregates. Decides nothing.

Rows are int32, one cache line each, times are doubles beside them. Everything grows by doubling and is copied by value, so that a
what-if can start from any engine. The C types are in ``store.pxd``; the file also runs uncompiled.
"""

import cython
import numpy as np

# Columns of a request's row (64 bytes: one cache line).
PROMPT = 0
STOP = 1  # output tokens at which it ends
MAX_TOKENS = 2  # output tokens at which the scheduler knows that it ends
DONE = 3  # output tokens scheduled so far, at G0
G0 = 4
KEY = 5  # heap key: the schedule at which it leaves the decoding set
STATE = 6
COMPUTED = 7  # while prefilling
BLOCKS = 8  # while prefilling
HIT = 9  # prompt tokens found in the prefix cache
PREEMPTIONS = 10
BELIEVED = 11  # expected output tokens: what a what-if takes for STOP
LABEL = 12  # the caller's number for the request
PRIORITY = 13
HELD = 14  # blocks of its prefix hit that are charged to another request
TOKENS = 15  # what it was given in the step being scheduled, where that is looked at one by one

# Columns of a request's times, seconds; negative: not yet.
ARRIVED = 0
SCHEDULED = 1
FIRST = 2
FINISHED = 3

# States of a row.
UNUSED = 0
EXPECTED = 1  # arrives later
WAITING = 2
PREFILL = 3
DECODE = 4
LAST = 5  # its last token is being computed
DONE_STATE = 6


class EngineStore:
    """Queues, running order, decoding aggregates and clocks of one engine; ``kernel.FastEngine`` makes time pass."""

    def __init__(self, limits, curve, now_s=0.0, capacity=64):
        self.limits = limits
        self.curve = curve
        self.block_size = limits.block_size
        self.budget_max = limits.max_num_batched_tokens
        self.running_max = limits.max_num_seqs
        self.model_len = limits.max_model_len
        self.watermark = limits.watermark_blocks
        self.reserve = limits.scheduler_reserve_full_isl
        self.chunked = limits.enable_chunked_prefill
        self.by_priority = limits.policy == "priority"
        self.prefill_cap = limits.long_prefill_token_threshold or limits.max_num_batched_tokens
        self.cap = self.budget_max
        self.lag = 2 if limits.async_scheduling else 1
        self.jumping = True
        self.cache = None  # a PrefixCache; copies have none
        self.looked_row = self.looked_version = -1
        self.hist = np.zeros(limits.block_size, np.int32)
        self.capacity = 0
        self.used = 0
        self._allocate_arrays(capacity)
        self._clear(now_s, limits.blocks_usable)

    # ---- limits, arrays, copies

    def _clear(self, now_s, free):
        """An empty engine at ``now_s``."""
        i: cython.int
        self.used = self.order_n = self.wait_n = self.arrival_n = self.heap_n = self.prefill_n = self.retired_n = 0
        self.first_n = self.free_n = self.ended_n = self.wait_head = self.arrival_head = self.first_head = 0
        self.g = self.nd = self.running_n = 0
        self.context = self.waiting_tokens = self.preemption_count = self.step_count = 0
        self.free = free
        self.now = self.gpu_end = self.heated_s = now_s
        self.heat = 0.0
        self.held = 0
        self.in_flight = False
        self.target = -1
        for i in range(self.block_size):
            self.hist[i] = 0

    def _allocate_arrays(self, capacity):
        """Arrays for ``capacity`` requests, with the present content moved over."""
        old = self.capacity
        rings = (
            ((self.wait_head, self.wait_n), (self.arrival_head, self.arrival_n), (self.first_head, self.first_n))
            if old
            else ()
        )
        self.rows = _grown(self.rows if old else None, (capacity, 16), np.int32)
        self.times = _grown(self.times if old else None, (capacity, 4), np.float64)
        self.order = _grown(self.order if old else None, (2 * capacity,), np.int32)
        self.heap_key = _grown(self.heap_key if old else None, (2 * capacity,), np.int32)
        self.heap_row = _grown(self.heap_row if old else None, (2 * capacity,), np.int32)
        self.prefilling = _grown(self.prefilling if old else None, (capacity,), np.int32)
        self.completed = _grown(self.completed if old else None, (capacity,), np.int32)
        self.retired = _grown(self.retired if old else None, (capacity,), np.int32)
        self.free_rows = _grown(self.free_rows if old else None, (capacity,), np.int32)
        self.ended = _grown(self.ended if old else None, (capacity,), np.int32)
        self.waiting = _unrolled(self.waiting if old else None, rings[0] if old else None, capacity)
        self.arrivals = _unrolled(self.arrivals if old else None, rings[1] if old else None, capacity)
        self.firsts = _unrolled(self.firsts if old else None, rings[2] if old else None, capacity)
        self.firsts_due = _unrolled(self.firsts_due if old else None, rings[2] if old else None, capacity)
        self.wait_head = self.arrival_head = self.first_head = 0
        self.capacity = capacity

    def _take_limits(self, other):
        if self.limits is not other.limits:
            self.limits = other.limits
            if self.block_size != other.block_size:
                self.hist = np.zeros(other.block_size, np.int32)
            self.block_size, self.budget_max, self.running_max = other.block_size, other.budget_max, other.running_max
            self.model_len, self.watermark, self.lag = other.model_len, other.watermark, other.lag
            self.reserve, self.chunked, self.by_priority = other.reserve, other.chunked, other.by_priority
            self.prefill_cap = self.cap = other.prefill_cap
        self.curve = other.curve
        self.jumping = other.jumping

    def _copy(self, other):
        i: cython.int
        j: cython.int
        if self.capacity < other.used + 1:
            self._allocate_arrays(max(2 * self.capacity, 2 * other.capacity))
        self._take_limits(other)
        for i in range(other.used):
            for j in range(16):
                self.rows[i, j] = other.rows[i, j]
            for j in range(4):
                self.times[i, j] = other.times[i, j]
        for i in range(other.order_n):
            self.order[i] = other.order[i]
        for i in range(other.heap_n):
            self.heap_key[i] = other.heap_key[i]
            self.heap_row[i] = other.heap_row[i]
        for i in range(other.wait_n):
            self.waiting[i] = other.waiting[(other.wait_head + i) % other.capacity]
        for i in range(other.arrival_n):
            self.arrivals[i] = other.arrivals[(other.arrival_head + i) % other.capacity]
        for i in range(other.first_n):
            self.firsts[i] = other.firsts[(other.first_head + i) % other.capacity]
            self.firsts_due[i] = other.firsts_due[(other.first_head + i) % other.capacity]
        for i in range(other.prefill_n):
            self.prefilling[i] = other.prefilling[i]
        for i in range(other.retired_n):
            self.retired[i] = other.retired[i]
        for i in range(other.free_n):
            self.free_rows[i] = other.free_rows[i]
        for i in range(self.block_size):
            self.hist[i] = other.hist[i]
        self.wait_head = self.arrival_head = self.first_head = 0
        self.used, self.order_n, self.heap_n = other.used, other.order_n, other.heap_n
        self.wait_n, self.arrival_n, self.first_n = other.wait_n, other.arrival_n, other.first_n
        self.prefill_n, self.retired_n, self.free_n, self.ended_n = other.prefill_n, other.retired_n, other.free_n, 0
        self.g, self.nd, self.running_n, self.free = other.g, other.nd, other.running_n, other.free
        self.context, self.waiting_tokens = other.context, other.waiting_tokens
        self.now, self.gpu_end, self.in_flight = other.now, other.gpu_end, other.in_flight
        self.heat, self.heated_s, self.held = other.heat, other.heated_s, other.held
        self.target, self.preemption_count, self.step_count = -1, 0, 0

    # ---- queues

    def _new_row(self):
        if self.free_n > 0:
            self.free_n -= 1
            return self.free_rows[self.free_n]
        if self.used == self.capacity:
            self._allocate_arrays(2 * self.capacity)
        self.used += 1
        return self.used - 1

    def _add(self, prompt, max_tokens, stop, at_s, believed, hit, label, priority):
        r: cython.int = self._new_row()
        i: cython.int
        j: cython.int
        prompt = max(1, min(prompt, self.model_len - 1))
        max_tokens = max(1, min(max_tokens, self.model_len - prompt))
        self.rows[r, PROMPT] = prompt
        self.rows[r, MAX_TOKENS] = max_tokens
        self.rows[r, STOP] = max(1, min(stop, max_tokens))
        self.rows[r, BELIEVED] = max(1, min(believed, max_tokens)) if believed > 0 else self.rows[r, STOP]
        self.rows[r, DONE] = 0
        self.rows[r, G0] = 0
        self.rows[r, KEY] = 0
        self.rows[r, COMPUTED] = 0
        self.rows[r, BLOCKS] = 0
        self.rows[r, HIT] = max(0, min(hit, prompt - 1))
        self.rows[r, PREEMPTIONS] = 0
        self.rows[r, LABEL] = label
        self.rows[r, PRIORITY] = priority
        self.rows[r, HELD] = 0
        self.rows[r, STATE] = EXPECTED
        self.times[r, ARRIVED] = at_s
        self.times[r, SCHEDULED] = -1.0
        self.times[r, FIRST] = -1.0
        self.times[r, FINISHED] = -1.0
        # Almost always the newest: insert from the back.
        i = self.arrival_n
        while i > 0:
            j = self.arrivals[(self.arrival_head + i - 1) % self.capacity]
            if self.times[j, ARRIVED] <= at_s:
                break
            self.arrivals[(self.arrival_head + i) % self.capacity] = j
            i -= 1
        self.arrivals[(self.arrival_head + i) % self.capacity] = r
        self.arrival_n += 1
        self.waiting_tokens += prompt
        return r

    def _arrive(self):
        r: cython.int = self.arrivals[self.arrival_head]
        self.arrival_head = (self.arrival_head + 1) % self.capacity
        self.arrival_n -= 1
        self._queue(r)

    def _before(self, a, b):
        """Whether ``a`` comes before ``b`` under the priority policy."""
        if self.rows[a, PRIORITY] != self.rows[b, PRIORITY]:
            return self.rows[a, PRIORITY] < self.rows[b, PRIORITY]
        return self.times[a, ARRIVED] < self.times[b, ARRIVED]

    def _queue(self, r):
        """Into the waiting queue, where its turn is."""
        i: cython.int = self.wait_n
        j: cython.int
        while self.by_priority and i > 0:
            j = self.waiting[(self.wait_head + i - 1) % self.capacity]
            if not self._before(r, j):
                break
            self.waiting[(self.wait_head + i) % self.capacity] = j
            i -= 1
        self.rows[r, STATE] = WAITING
        self.waiting[(self.wait_head + i) % self.capacity] = r
        self.wait_n += 1

    def _requeue(self, r):
        """A preempted request goes to the head of the queue; under the priority policy where its turn is."""
        if self.by_priority:
            self._queue(r)
            return
        self.rows[r, STATE] = WAITING
        self.wait_head = (self.wait_head + self.capacity - 1) % self.capacity
        self.waiting[self.wait_head] = r
        self.wait_n += 1

    def _push_order(self, r):
        if self.order_n >= 2 * self.capacity:
            self._compact_order()
        self.order[self.order_n] = r
        self.order_n += 1

    def _runs(self, r):
        """Whether a row of ``order`` still stands for a running request."""
        return PREFILL <= self.rows[r, STATE] <= LAST and self.rows[r, KEY] != -1

    def _pop_last(self):
        """The last admitted request that runs, taken out of ``order``."""
        self.order_n -= 1
        while not self._runs(self.order[self.order_n]):
            self.order_n -= 1
        return self.order[self.order_n]

    def _remove_from_order(self, i):
        self.order_n -= 1
        while i < self.order_n:
            self.order[i] = self.order[i + 1]
            i += 1

    def _compact_order(self):
        i: cython.int
        kept: cython.int = 0
        for i in range(self.order_n):
            if self._runs(self.order[i]):
                self.order[kept] = self.order[i]
                kept += 1
        self.order_n = kept

    # ---- heap of (schedule, row); entries of preempted requests stay until they surface

    def _heap_push(self, key, r):
        if self.heap_n >= 2 * self.capacity:
            self._heap_rebuild()
        i: cython.int = self.heap_n
        parent: cython.int
        self.heap_n += 1
        while i > 0:
            parent = (i - 1) >> 1
            if self.heap_key[parent] <= key:
                break
            self.heap_key[i] = self.heap_key[parent]
            self.heap_row[i] = self.heap_row[parent]
            i = parent
        self.heap_key[i] = key
        self.heap_row[i] = r

    def _heap_pop(self):
        self.heap_n -= 1
        n: cython.int = self.heap_n
        key: cython.int = self.heap_key[n]
        r: cython.int = self.heap_row[n]
        i: cython.int = 0
        child: cython.int
        while True:
            child = 2 * i + 1
            if child >= n:
                break
            if child + 1 < n and self.heap_key[child + 1] < self.heap_key[child]:
                child += 1
            if self.heap_key[child] >= key:
                break
            self.heap_key[i] = self.heap_key[child]
            self.heap_row[i] = self.heap_row[child]
            i = child
        self.heap_key[i] = key
        self.heap_row[i] = r

    def _heap_rebuild(self):
        """Drop the entries that no longer hold."""
        i: cython.int
        r: cython.int
        n: cython.int = self.heap_n
        self.heap_n = 0
        for i in range(n):
            r = self.heap_row[i]
            if self.rows[r, STATE] == DECODE and self.rows[r, KEY] == self.heap_key[i]:
                self._heap_push(self.heap_key[i], r)

    def _borrowed(self, blocks):
        """How many of the ``blocks`` that a request finds in the prefix cache are held by running ones: as many as of theirs."""
        i: cython.int
        r: cython.int
        found: cython.longlong = 0
        if self.held == 0:
            return 0
        for i in range(self.order_n):
            r = self.order[i]
            if self._runs(r):
                found += self.rows[r, HIT] // self.block_size
        return blocks if found <= self.held else blocks * self.held // found

    # ---- reading a row

    def _done(self, r):
        """Output tokens scheduled so far of a decoding request."""
        return self.rows[r, DONE] + self.g - self.rows[r, G0]

    def _computed(self, r):
        return self.rows[r, PROMPT] + self.rows[r, DONE] + self.g - self.rows[r, G0] - 1

    def _computed_at(self, r):
        """Computed tokens of a request whose DONE is up to date."""
        return self.rows[r, PROMPT] + self.rows[r, DONE] - 1

    def _class(self, computed):
        x: cython.int = (computed - self.g) % self.block_size
        return x + self.block_size if x < 0 else x

    def _residue(self, g):
        """Which class of ``hist`` needs a block at schedule ``g``: those with (computed - g_then + g) = 0 modulo the block size."""
        x: cython.int = (-g) % self.block_size
        return x + self.block_size if x < 0 else x

    def _blocks_for(self, tokens):
        return (min(tokens, self.model_len) + self.block_size - 1) // self.block_size


def _grown(old, shape, dtype):
    array = np.zeros(shape, dtype)
    if old is not None:
        array[: old.shape[0]] = old
    return array


def _unrolled(old, ring, capacity):
    array = np.zeros(capacity, np.int32)
    if old is not None:
        head, count = ring
        source = np.asarray(old)
        array[:count] = np.take(source, np.arange(head, head + count) % len(source))
    return array
