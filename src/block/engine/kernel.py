"""The fast form of the engine model: the same decisions and times as ``pipeline.Engine``, in jumps.

Theory of operation
-------------------
Between one arrival, completion, prefill or exhausted pool and the next, a first-come engine decodes the same batch again and
again, so nothing needs to be done per request and step:

- *Schedules are numbered* by ``g``. A decoding request is scheduled in every one, so what it has done is what it had done at
  ``G0`` plus ``g - G0``; rows are brought up to date only when they change state.
- *Aggregates* describe the decoding set: how many (``nd``), the sum of their contexts (``context``), and how many need
  a new block at each residue of ``g`` (``hist``: a request needs one when its computed tokens fill their blocks).
- A *heap* holds the schedule number at which each one leaves the set.

A step with prefills or under memory pressure is taken one by one (``_step``: O(prefills), or O(running) while preempting); a run
of m plain decode steps has a closed form (``_jump``), since a decode step's time is linear in the context.

Asynchronous scheduling keeps two batches in flight: the results of batch k are known just before schedule k+2, so a
request whose last token is in batch k holds its slot and blocks until then (``LAST``), and one whose end the scheduler cannot
foresee (EOS) is computed once more in vain. With synchronous scheduling both delays are one less (``lag``).

Times: ``now`` is when schedule g happens, ``gpu_end`` when batch g-1 ends; see ``pipeline`` for the recursion.
Equality with stepping and with ``pipeline.Engine`` is a property test (tests/engine/test_kernel.py). What it
approximates: with prefix caching a request's known hit saves its computation, not its memory; the priority policy orders the
queue but preempts the last admitted; ``long_prefill_token_threshold`` is left out (``limits.jumpable`` says what is exact).
The file also runs uncompiled, for reading and coverage.
"""

import cython
import numpy as np

if cython.compiled:
    from cython.cimports.block.steptime.curve import StepCurve
    from cython.cimports.libc.math import sqrt
else:
    from math import sqrt

    from block.steptime.curve import StepCurve

# Columns of a request's row (64 bytes: one cache line).
PROMPT = cython.declare(cython.int, 0)
STOP = cython.declare(cython.int, 1)  # output tokens at which it ends
MAX_TOKENS = cython.declare(cython.int, 2)  # output tokens at which the scheduler knows that it ends
DONE = cython.declare(cython.int, 3)  # output tokens scheduled so far, at G0
G0 = cython.declare(cython.int, 4)
KEY = cython.declare(cython.int, 5)  # heap key: the schedule at which it leaves the decoding set
STATE = cython.declare(cython.int, 6)
COMPUTED = cython.declare(cython.int, 7)  # while prefilling
BLOCKS = cython.declare(cython.int, 8)  # while prefilling
HIT = cython.declare(cython.int, 9)  # prompt tokens found in the prefix cache
PREEMPTIONS = cython.declare(cython.int, 10)
BELIEVED = cython.declare(cython.int, 11)  # expected output tokens: what a what-if takes for STOP
LABEL = cython.declare(cython.int, 12)  # the caller's number for the request
PRIORITY = cython.declare(cython.int, 13)

# Columns of a request's times, seconds; negative: not yet.
ARRIVED = cython.declare(cython.int, 0)
SCHEDULED = cython.declare(cython.int, 1)
FIRST = cython.declare(cython.int, 2)
FINISHED = cython.declare(cython.int, 3)

# States of a row.
UNUSED = cython.declare(cython.int, 0)
EXPECTED = cython.declare(cython.int, 1)  # arrives later
WAITING = cython.declare(cython.int, 2)
PREFILL = cython.declare(cython.int, 3)
DECODE = cython.declare(cython.int, 4)
LAST = cython.declare(cython.int, 5)  # its last token is being computed
DONE_STATE = cython.declare(cython.int, 6)

OUTLIVED_TOKENS = cython.declare(cython.int, 10)

# Rows of a snapshot's requests (predict.snapshot).
IN_PROMPT = cython.declare(cython.int, 0)
IN_MAX_TOKENS = cython.declare(cython.int, 1)
IN_COMPUTED = cython.declare(cython.int, 2)
IN_OUTPUT = cython.declare(cython.int, 3)
IN_BATCH_1 = cython.declare(cython.int, 5)
IN_BATCH_2 = cython.declare(cython.int, 6)
IN_BLOCKS = cython.declare(cython.int, 8)
IN_PRIORITY = cython.declare(cython.int, 9)
IN_FLAGS = cython.declare(cython.int, 10)
IN_SAMPLES_1 = cython.declare(cython.int, 2)
IN_SAMPLES_2 = cython.declare(cython.int, 4)


@cython.final
@cython.cclass
class FastEngine:
    """One first-come engine instance in virtual time. ``advance`` is the only thing that makes time pass."""

    rows = cython.declare(cython.int[:, ::1])
    times = cython.declare(cython.double[:, ::1])
    order = cython.declare(cython.int[::1])  # running, in admission order; entries of finished requests stay until compaction
    waiting = cython.declare(cython.int[::1])  # ring
    arrivals = cython.declare(cython.int[::1])  # ring, by time
    heap_key = cython.declare(cython.int[::1])
    heap_row = cython.declare(cython.int[::1])
    hist = cython.declare(cython.int[::1])
    prefilling = cython.declare(cython.int[::1])
    completed = cython.declare(cython.int[::1])  # scratch of one step
    retired = cython.declare(cython.int[::1])  # LAST since the schedule before this one
    firsts = cython.declare(cython.int[::1])  # ring: rows whose first token is in flight
    firsts_due = cython.declare(cython.int[::1])
    free_rows = cython.declare(cython.int[::1])
    ended = cython.declare(cython.int[::1])  # finished rows that nobody has collected
    curve = cython.declare(StepCurve)
    limits = cython.declare(object, visibility="public")
    # limits, unpacked
    block_size = cython.declare(cython.int)
    budget_max = cython.declare(cython.int)
    running_max = cython.declare(cython.int)
    model_len = cython.declare(cython.int)
    watermark = cython.declare(cython.int)
    reserve = cython.declare(cython.bint)
    chunked = cython.declare(cython.bint)
    by_priority = cython.declare(cython.bint)
    lag = cython.declare(cython.int)
    jumping = cython.declare(cython.bint, visibility="public")
    # counts
    capacity = cython.declare(cython.int)
    used = cython.declare(cython.int)
    order_n = cython.declare(cython.int)
    wait_head = cython.declare(cython.int)
    wait_n = cython.declare(cython.int)
    arrival_head = cython.declare(cython.int)
    arrival_n = cython.declare(cython.int)
    heap_n = cython.declare(cython.int)
    prefill_n = cython.declare(cython.int)
    retired_n = cython.declare(cython.int)
    first_head = cython.declare(cython.int)
    first_n = cython.declare(cython.int)
    free_n = cython.declare(cython.int)
    ended_n = cython.declare(cython.int)
    # state
    g = cython.declare(cython.int)
    nd = cython.declare(cython.int)
    running_n = cython.declare(cython.int)
    free = cython.declare(cython.int)
    context = cython.declare(cython.longlong)
    waiting_tokens = cython.declare(cython.longlong)
    now = cython.declare(cython.double)
    gpu_end = cython.declare(cython.double)
    in_flight = cython.declare(cython.bint)  # whether batch g-1 computes anything
    target = cython.declare(cython.int)
    preemption_count = cython.declare(cython.longlong)
    step_count = cython.declare(cython.longlong)

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
        self.lag = 2 if limits.async_scheduling else 1
        self.jumping = True
        self.hist = np.zeros(limits.block_size, np.int32)
        self.capacity = 0
        self.used = 0
        self._allocate_arrays(capacity)
        self._clear(now_s, limits.blocks_usable)

    # ---- for callers

    def add(self, prompt_tokens, max_tokens, stop_after, at_s, believed=0, hit_tokens=0, label=0, priority=0) -> int:
        """A request that reaches the queue at ``at_s``; returns its row. It ends after ``min(stop_after, max_tokens)``
        output tokens; what-ifs made from this engine see ``believed`` instead (0: the truth)."""
        return self._add(prompt_tokens, max_tokens, stop_after, at_s, believed, hit_tokens, label, priority)

    def advance(self, until_s: float) -> None:
        """Let everything up to ``until_s`` happen."""
        self.target = -1
        self._run(until_s)

    def next_event_s(self) -> float:
        """The earliest time at which something may happen; infinite: never, unless a request is added."""
        if self._idle():
            if self.arrival_n == 0:
                return float("inf")
            return max(self.now, self.times[self.arrivals[self.arrival_head], ARRIVED])
        return self.now

    def collect(self) -> list:
        """Requests finished since the last call: (label, scheduled_s, first_token_s, finished_s, preemptions)."""
        i: cython.int
        r: cython.int
        out: list = []
        for i in range(self.ended_n):
            r = self.ended[i]
            out.append((self.rows[r, LABEL], self.times[r, SCHEDULED], self.times[r, FIRST], self.times[r, FINISHED],
                        self.rows[r, PREEMPTIONS]))
        if self.ended_n:
            self._compact_order()
            for i in range(self.ended_n):
                r = self.ended[i]
                self.rows[r, STATE] = UNUSED
                self.free_rows[self.free_n] = r
                self.free_n += 1
            self.ended_n = 0
        return out

    def load(self) -> tuple:
        """(running, waiting, waiting prompt tokens, free blocks): the counters a policy may see."""
        return self.running_n, self.wait_n + self.arrival_n, self.waiting_tokens, self.free

    def unprocessed_tokens(self) -> float:
        """Sum over present requests of prompt + believed output - computed tokens."""
        i: cython.int
        r: cython.int
        total: cython.double = 0.0
        computed: cython.int
        for r in range(self.used):
            if WAITING <= self.rows[r, STATE] <= DECODE or self.rows[r, STATE] == EXPECTED:
                computed = self.rows[r, COMPUTED]
                if self.rows[r, STATE] == DECODE:
                    computed = self._computed(r)
                total += max(self.rows[r, PROMPT] + self.rows[r, BELIEVED] - computed, 1)
        return total

    @property
    def now_s(self) -> float:
        return self.now

    @property
    def preemptions(self) -> int:
        return self.preemption_count

    @property
    def steps(self) -> int:
        return self.step_count

    def live(self) -> tuple:
        """The requests present: (rows, tokens generated so far), int32 arrays of the same length."""
        r: cython.int
        n: cython.int = 0
        rows: cython.int[::1] = np.empty(self.used, np.int32)
        generated: cython.int[::1] = np.empty(self.used, np.int32)
        for r in range(self.used):
            if EXPECTED <= self.rows[r, STATE] <= LAST:
                rows[n] = r
                generated[n] = self._done(r) if self.rows[r, STATE] == DECODE else self.rows[r, DONE]
                n += 1
        return np.asarray(rows)[:n], np.asarray(generated)[:n]

    def believe(self, rows, totals) -> None:
        """Replace the expected output tokens of ``rows`` (int32 arrays of one length)."""
        i: cython.int
        which: cython.int[::1] = rows
        expected: cython.int[::1] = totals
        for i in range(len(rows)):
            self.rows[which[i], BELIEVED] = max(1, min(expected[i], self.rows[which[i], MAX_TOKENS]))

    def copy_from(self, other: FastEngine, believing: bool = False) -> None:
        """Become a copy of another engine (arrays are reused); ``believing``: requests end when they are
        believed to, not when they will."""
        self._adopt(other, believing)

    def restore(self, requests, totals, hits, running, free, taken_s, batches, batch_1_started_s, newest_scheduled_s) -> None:
        """Become the engine of a snapshot (see ``predict.snapshot``).

        ``requests``: (FIELDS, n) int32; ``totals``: (n,) int32 expected total output tokens; ``hits``: (n,) int32 prompt
        tokens of waiting requests that are in the prefix cache; ``batches`` in flight 0-2; times in seconds.
        """
        n = requests.shape[1]
        if self.capacity < n + 1:
            self._allocate_arrays(2 * (n + 1))
        self._clear(taken_s, free)
        self._restore(requests, totals, hits, running, batches, batch_1_started_s, newest_scheduled_s)

    # ---- what if

    @cython.cfunc
    @cython.exceptval(check=False)
    def _ask(self, prompt: cython.int, max_tokens: cython.int, total: cython.int, at_s: cython.double, hit: cython.int,
             priority: cython.int, horizon_s: cython.double) -> cython.int:
        """Add one more request and run until it ends or the horizon; returns its row. Changes this engine: ask a copy."""
        r: cython.int = self._add(prompt, max_tokens, total, at_s, total, hit, -1, priority)
        self.target = r
        self._run(at_s + horizon_s)
        return r

    @cython.cfunc
    @cython.exceptval(check=False)
    def _adopt(self, other: FastEngine, believing: cython.bint) -> cython.void:
        self._copy(other)
        if believing:
            self._believe()

    @cython.cfunc
    @cython.exceptval(check=False)
    def _finish_sum(self, before: cython.int, until_s: cython.double) -> cython.double:
        """Run until all end or ``until_s``; the sum of the end times of the first ``before`` rows present at the start."""
        r: cython.int
        total: cython.double = 0.0
        self.target = -1
        self._run(until_s)
        for r in range(before):
            if self.rows[r, STATE] != UNUSED:
                total += self.times[r, FINISHED] if self.times[r, FINISHED] >= 0 else until_s
        return total

    @cython.cfunc
    @cython.exceptval(check=False)
    def _believe(self) -> cython.void:
        """Let requests end when they are believed to; one that has outlived that goes on for a tenth more."""
        i: cython.int
        r: cython.int
        done: cython.int
        total: cython.int
        self.heap_n = 0
        for r in range(self.used):
            if EXPECTED <= self.rows[r, STATE] <= DECODE:
                done = self._done(r) if self.rows[r, STATE] == DECODE else self.rows[r, DONE]
                total = self.rows[r, BELIEVED]
                if total <= done:
                    total = done + max(OUTLIVED_TOKENS, done // 10)
                self.rows[r, STOP] = min(total, self.rows[r, MAX_TOKENS])
        for i in range(self.order_n):
            r = self.order[i]
            if self.rows[r, STATE] == DECODE:
                done = self._done(r)
                self.rows[r, KEY] = self._leaves_at(r, self.g + max(self.rows[r, STOP] - done, 0) - 1)
                self._heap_push(self.rows[r, KEY], r)

    @cython.cfunc
    @cython.exceptval(check=False)
    def _restore(self, requests: cython.int[:, ::1], totals: cython.int[::1], hits: cython.int[::1], running: cython.int,
                 batches: cython.int, batch_1_started_s: cython.double, newest_scheduled_s: cython.double) -> cython.void:
        i: cython.int
        n: cython.int = requests.shape[1]
        self._resume_time(requests, batches, batch_1_started_s, newest_scheduled_s)
        self.used = n
        for i in range(n):
            self._restore_row(i, requests, totals[i], i < running, batches)
            if i >= running and self.rows[i, STATE] != DONE_STATE:
                self.rows[i, HIT] = max(0, min(hits[i], self.rows[i, PROMPT] - 1))
                self.waiting_tokens += self.rows[i, PROMPT]
                self._queue(i)

    @cython.cfunc
    @cython.exceptval(check=False)
    def _restore_row(self, i: cython.int, requests: cython.int[:, ::1], total: cython.int, running: cython.bint,
                     batches: cython.int) -> cython.void:
        sampled_1: cython.int = (requests[IN_FLAGS, i] & IN_SAMPLES_1) != 0
        sampled_2: cython.int = (requests[IN_FLAGS, i] & IN_SAMPLES_2) != 0
        output: cython.int = requests[IN_OUTPUT, i]
        done: cython.int = output + sampled_1 + sampled_2
        prompt: cython.int = max(1, min(requests[IN_PROMPT, i], self.model_len - 1))
        limit: cython.int = max(1, min(requests[IN_MAX_TOKENS, i], self.model_len - prompt))
        last: cython.int
        total = max(output + 1, min(total, limit))
        self.rows[i, PROMPT] = prompt
        self.rows[i, MAX_TOKENS] = limit
        self.rows[i, STOP] = total
        self.rows[i, BELIEVED] = total
        self.rows[i, DONE] = done
        self.rows[i, G0] = self.rows[i, KEY] = self.rows[i, HIT] = self.rows[i, PREEMPTIONS] = 0
        self.rows[i, COMPUTED] = self.rows[i, BLOCKS] = 0
        self.rows[i, LABEL] = i
        self.rows[i, PRIORITY] = requests[IN_PRIORITY, i]
        self.rows[i, STATE] = DONE_STATE
        self.times[i, ARRIVED] = self.times[i, SCHEDULED] = self.times[i, FIRST] = self.times[i, FINISHED] = -1.0
        # Schedules are numbered from 0 here: the newest batch in flight is -1.
        if sampled_1 and total <= output + 1:
            last = -batches
        elif total <= done:
            last = -1
        else:
            last = total - done - 1
        if not running:
            if last >= 0:
                self.rows[i, STATE] = WAITING
            return
        self.running_n += 1
        self._push_order(i)
        if requests[IN_COMPUTED, i] < prompt + done - 1 or done == 0:
            self.rows[i, STATE] = PREFILL
            self.rows[i, COMPUTED] = requests[IN_COMPUTED, i]
            self.rows[i, BLOCKS] = requests[IN_BLOCKS, i]
            self.prefilling[self.prefill_n] = i
            self.prefill_n += 1
        elif last == -2 and total >= limit:
            self.rows[i, STATE] = LAST  # its last token is in the older of two batches in flight
            self.rows[i, DONE] = total
            self.retired[self.retired_n] = i
            self.retired_n += 1
        else:
            self._join(i, last)

    @cython.cfunc
    @cython.exceptval(check=False)
    def _resume_time(self, requests: cython.int[:, ::1], batches: cython.int, batch_1_started_s: cython.double,
                     newest_scheduled_s: cython.double) -> cython.void:
        """When the next schedule happens and when the newest batch in flight ends."""
        taken: cython.double = self.now
        older_end: cython.double
        launched: cython.double
        if batches == 0:
            return
        older_end = batch_1_started_s + self._batch_s(requests, IN_BATCH_1, batches == 2)
        launched = newest_scheduled_s + self._batch_launch_s(requests, IN_BATCH_2 if batches == 2 else IN_BATCH_1)
        if batches == 2:
            if max(older_end, launched) < taken:
                older_end = taken  # it takes longer than the model thinks: it may end any moment
            self.now = max(older_end, launched)
            self.gpu_end = max(older_end + self._batch_s(requests, IN_BATCH_2, False), launched)
        else:
            self.gpu_end = max(max(older_end, launched), taken)
            self.now = self.gpu_end if self.lag == 1 else max(launched, taken)
        self.in_flight = self.lag == 2

    @cython.cfunc
    @cython.exceptval(check=False)
    def _batch_s(self, requests: cython.int[:, ::1], batch: cython.int, followed: cython.bint) -> cython.double:
        """Step time of a batch in flight; ``followed``: a newer one is in flight, whose tokens count as computed too."""
        i: cython.int
        tokens: cython.int
        computed: cython.int
        decodes: cython.int = 0
        chunks: cython.int = 0
        prefill: cython.int = 0
        context: cython.longlong = 0
        work: cython.double = 0.0
        for i in range(requests.shape[1]):
            tokens = requests[batch, i]
            if tokens == 0:
                continue
            computed = requests[IN_COMPUTED, i] - tokens
            if followed:
                computed -= requests[IN_BATCH_2, i]
            if computed < 0:  # preempted meanwhile
                computed = requests[IN_PROMPT, i] + requests[IN_OUTPUT, i] - tokens
            if tokens == 1 and computed >= requests[IN_PROMPT, i]:
                decodes += 1
                context += computed
            else:
                chunks += 1
                prefill += tokens
                work += tokens * (computed + 0.5 * tokens)
        if decodes + chunks == 0:
            return 0.0
        return self.curve.gpu_s(decodes, context, prefill, work, chunks)

    @cython.cfunc
    @cython.exceptval(check=False)
    def _batch_launch_s(self, requests: cython.int[:, ::1], batch: cython.int) -> cython.double:
        i: cython.int
        decodes: cython.int = 0
        chunks: cython.int = 0
        prefill: cython.int = 0
        for i in range(requests.shape[1]):
            if requests[batch, i] == 1 and requests[IN_COMPUTED, i] > requests[IN_PROMPT, i]:
                decodes += 1
            elif requests[batch, i] > 0:
                chunks += 1
                prefill += requests[batch, i]
        return self.curve.launch_s(decodes, prefill, chunks)

    # ---- time

    @cython.cfunc
    @cython.exceptval(check=False)
    def _idle(self) -> cython.bint:
        """Nothing runs, waits or is in flight."""
        return self.running_n == 0 and self.wait_n == 0 and self.first_n == 0 and not self.in_flight

    @cython.cfunc
    @cython.exceptval(check=False)
    def _run(self, until_s: cython.double) -> cython.void:
        arrival: cython.double
        while True:
            if self._idle():
                if self.arrival_n == 0:
                    return
                arrival = self.times[self.arrivals[self.arrival_head], ARRIVED]
                if arrival > until_s:
                    return
                if arrival > self.now:
                    self.now = arrival
            if self.now > until_s:
                return
            self._settle()
            if self.target >= 0 and self.rows[self.target, STATE] == DONE_STATE:
                return
            while self.arrival_n > 0 and self.times[self.arrivals[self.arrival_head], ARRIVED] <= self.now:
                self._arrive()
            if not (self.jumping and self._jump(until_s)) and not self._step():
                # Nothing could be computed and nothing is in flight: only an arrival can change that.
                if self.arrival_n == 0:
                    return
                arrival = self.times[self.arrivals[self.arrival_head], ARRIVED]
                if arrival > until_s:
                    return
                self.now = arrival

    @cython.cfunc
    @cython.exceptval(check=False)
    def _settle(self) -> cython.void:
        """Take in the results that are known before schedule ``g``: ends, freed blocks, first tokens."""
        i: cython.int
        r: cython.int
        for i in range(self.retired_n):
            self._end(self.retired[i])
        self.retired_n = 0
        while self.heap_n > 0 and self.heap_key[0] <= self.g:
            r = self.heap_row[0]
            i = self.heap_key[0]
            self._heap_pop()
            if self.rows[r, STATE] != DECODE or self.rows[r, KEY] != i:
                continue  # preempted meanwhile
            self._leave_decoding(r)
            if self.lag == 2 and self.rows[r, STOP] >= self.rows[r, MAX_TOKENS]:
                self.rows[r, STATE] = LAST
                self.retired[self.retired_n] = r
                self.retired_n += 1
            else:
                self._end(r)
        while self.first_n > 0 and self.firsts_due[self.first_head] <= self.g:
            r = self.firsts[self.first_head]
            self.first_head = (self.first_head + 1) % self.capacity
            self.first_n -= 1
            if self.times[r, FIRST] < 0:
                self.times[r, FIRST] = self.now

    @cython.cfunc
    @cython.exceptval(check=False)
    def _tick(self, step_s: cython.double, launch_s: cython.double) -> cython.void:
        """Time from schedule ``g`` to schedule ``g + 1`` for a batch that computes something."""
        cpu: cython.double = self.now + launch_s
        end: cython.double = max(max(self.gpu_end, self.now + self.curve.head_s) + step_s, cpu)
        if self.lag == 1:
            self.now = end
        else:
            self.now = max(cpu, self.gpu_end) if self.in_flight else cpu
        self.gpu_end = end
        self.in_flight = self.lag == 2
        self.step_count += 1
        self.g += 1

    # ---- plain decode steps in closed form

    @cython.cfunc
    @cython.exceptval(check=False)
    def _jump(self, until_s: cython.double) -> cython.bint:
        """Advance as many identical decode steps as there are until something changes; False: take a step instead."""
        if self.nd == 0 or self.prefill_n > 0 or self.hist[self._residue(self.g)] > self.free:
            return False
        if self.wait_n > 0 and self._head_fits(self.budget_max - self.nd, self.free - self.hist[self._residue(self.g)]):
            return False
        first_s: cython.double = self.curve.decode_base_s(self.nd) + self.curve.kv_s * self.context
        growth_s: cython.double = self.curve.kv_s * self.nd
        launch_s: cython.double = self.curve.launch_s(self.nd, 0, 0)
        # The form holds while the accelerator, not the CPU, sets the pace.
        if self.lag == 1:
            first_s += self.curve.head_s
        else:
            launch_s = max(launch_s, self.curve.head_s)
            if not self.in_flight or self.gpu_end < self.now + launch_s:
                return False
        if first_s < launch_s:
            return False
        m: cython.int = self._steps_before_change(until_s, first_s, growth_s)
        if m < 1:
            return False
        self.free -= self._blocks_over(m)
        before: cython.double = _sum_s(m - 1, first_s, growth_s)
        last_s: cython.double = first_s + growth_s * (m - 1)
        if self.lag == 1:
            self.now += before + last_s
            self.gpu_end = self.now
        else:
            self.now = self.gpu_end + before
            self.gpu_end = self.now + last_s
        self.context += cython.cast(cython.longlong, self.nd) * m
        self.g += m
        self.step_count += m
        return True

    @cython.cfunc
    @cython.exceptval(check=False)
    def _steps_before_change(self, until_s: cython.double, first_s: cython.double, growth_s: cython.double) -> cython.int:
        m: cython.int = 1 << 30
        stop_s: cython.double = until_s
        start: cython.double
        if self.heap_n > 0:
            m = self.heap_key[0] - self.g
        if self.retired_n > 0:
            m = min(m, 1)
        if self.first_n > 0:
            m = min(m, self.firsts_due[self.first_head] - self.g)
        if self.wait_n == 0 and self.arrival_n > 0:
            # An arrival behind a blocked head changes nothing; one that finds an empty queue may be admitted.
            stop_s = min(stop_s, self.times[self.arrivals[self.arrival_head], ARRIVED])
        if m > 1:
            start = self.gpu_end if self.lag == 2 else self.now
            m = min(m, _steps_until(stop_s - start, first_s, growth_s, m) + self.lag - 1)
        if (m // self.block_size + 1) * self.nd > self.free:
            m = self._steps_within_blocks(m)
        return m

    @cython.cfunc
    @cython.exceptval(check=False)
    def _residue(self, g: cython.int) -> cython.int:
        """Which class of ``hist`` needs a block at schedule ``g``: those with (computed - g_then + g) = 0 modulo the block size."""
        x: cython.int = (-g) % self.block_size
        return x + self.block_size if x < 0 else x

    @cython.cfunc
    @cython.exceptval(check=False)
    def _blocks_over(self, m: cython.int) -> cython.int:
        """New blocks that the decoding set takes over ``m`` schedules."""
        j: cython.int
        full: cython.int = m // self.block_size
        blocks: cython.int = full * self.nd
        for j in range(full * self.block_size, m):
            blocks += self.hist[self._residue(self.g + j)]
        return blocks

    @cython.cfunc
    @cython.exceptval(check=False)
    def _steps_within_blocks(self, m: cython.int) -> cython.int:
        full: cython.int = self.free // self.nd
        steps: cython.int = full * self.block_size
        blocks: cython.int = full * self.nd
        if steps >= m:
            return m
        while steps < m:
            blocks += self.hist[self._residue(self.g + steps)]
            if blocks > self.free:
                return steps
            steps += 1
        return m

    # ---- one step of any kind

    @cython.cfunc
    @cython.exceptval(check=False)
    def _step(self) -> cython.bint:
        """Schedule batch ``g``; False if there is nothing to compute and nothing in flight."""
        budget: cython.int = self.budget_max
        preempted: cython.longlong = self.preemption_count
        left: cython.int
        tokens: cython.int
        decodes: cython.int
        i: cython.int
        r: cython.int
        kept: cython.int = 0
        context: cython.longlong
        chunks: cython.int = 0
        prefill: cython.int = 0
        work: cython.double = 0.0
        completed: cython.int = 0
        blocks: cython.int = self.hist[self._residue(self.g)]
        if blocks <= self.free:
            self.free -= blocks
        else:
            self._allocate_under_pressure()
        budget -= self.nd
        decodes = self.nd
        context = self.context
        left = budget
        i = 0
        while i < self.prefill_n:
            r = self.prefilling[i]
            tokens = min(self.rows[r, PROMPT] + self.rows[r, DONE] - self.rows[r, COMPUTED], left)
            if tokens > 0 and not self._grow(r, tokens):
                continue  # preempted itself (it was the last admitted) or made room
            left -= tokens
            i += 1
        if self.preemption_count == preempted:
            self._admit_waiting(left)
        for i in range(self.prefill_n):
            r = self.prefilling[i]
            tokens = min(self.rows[r, PROMPT] + self.rows[r, DONE] - self.rows[r, COMPUTED], budget)
            budget -= tokens
            if tokens > 0:
                if tokens == 1 and self.rows[r, COMPUTED] >= self.rows[r, PROMPT]:
                    decodes += 1
                    context += self.rows[r, COMPUTED]
                else:
                    chunks += 1
                    prefill += tokens
                    work += tokens * (self.rows[r, COMPUTED] + 0.5 * tokens)
                self.rows[r, COMPUTED] += tokens
            if self.rows[r, COMPUTED] == self.rows[r, PROMPT] + self.rows[r, DONE]:
                self.completed[completed] = r
                completed += 1
            else:
                self.prefilling[kept] = r
                kept += 1
        self.prefill_n = kept
        if decodes + chunks == 0:
            return self._empty_step()
        self._tick(
            self.curve.gpu_s(decodes, context, prefill, work, chunks), self.curve.launch_s(decodes, prefill, chunks)
        )
        self.context += self.nd
        for i in range(completed):
            self._enter_decoding(self.completed[i])
        return True

    @cython.cfunc
    @cython.exceptval(check=False)
    def _empty_step(self) -> cython.bint:
        """Nothing to compute in batch ``g``: the results of batch g-1 are awaited, if there is one."""
        waited: cython.bint = self.in_flight or self.retired_n > 0 or self.first_n > 0
        if self.in_flight and self.gpu_end > self.now:
            self.now = self.gpu_end
        self.in_flight = False
        self.g += 1
        return waited

    @cython.cfunc
    @cython.exceptval(check=False)
    def _admit_waiting(self, budget: cython.int) -> cython.void:
        r: cython.int
        tokens: cython.int
        whole: cython.int
        while self.wait_n > 0 and self._head_fits(budget, self.free):
            r = self.waiting[self.wait_head]
            whole = self.rows[r, PROMPT] + self.rows[r, DONE] - self.rows[r, HIT]
            tokens = min(whole, budget)
            self.wait_head = (self.wait_head + 1) % self.capacity
            self.wait_n -= 1
            self.waiting_tokens -= self.rows[r, PROMPT]
            self.rows[r, STATE] = PREFILL
            self.rows[r, COMPUTED] = self.rows[r, HIT]
            self.rows[r, BLOCKS] = self._blocks_for(self.rows[r, HIT] + tokens)
            self.free -= self.rows[r, BLOCKS]
            self.running_n += 1
            self._push_order(r)
            self.prefilling[self.prefill_n] = r
            self.prefill_n += 1
            if self.times[r, SCHEDULED] < 0:
                self.times[r, SCHEDULED] = self.now
            budget -= tokens

    @cython.cfunc
    @cython.exceptval(check=False)
    def _head_fits(self, budget: cython.int, free: cython.int) -> cython.bint:
        """Whether the head of the waiting queue can be admitted now."""
        if budget <= 0 or self.running_n >= self.running_max:
            return False
        r: cython.int = self.waiting[self.wait_head]
        tokens: cython.int = self.rows[r, PROMPT] + self.rows[r, DONE] - self.rows[r, HIT]
        taken: cython.int = self.watermark if self.running_n > 0 else 0
        if tokens > budget:
            if not self.chunked:
                return False
            tokens = budget
        if self.reserve and self._blocks_for(self.rows[r, PROMPT] + self.rows[r, DONE]) + taken > free:
            return False
        return self._blocks_for(self.rows[r, HIT] + tokens) + taken <= free

    @cython.cfunc
    @cython.exceptval(check=False)
    def _blocks_for(self, tokens: cython.int) -> cython.int:
        return (min(tokens, self.model_len) + self.block_size - 1) // self.block_size

    # ---- memory pressure

    @cython.cfunc
    @cython.exceptval(check=False)
    def _allocate_under_pressure(self) -> cython.void:
        """Give each decoding request its block in admission order, preempting from the other end."""
        i: cython.int = 0
        r: cython.int
        alive: cython.bint
        self._compact_order()
        while i < self.order_n:
            r = self.order[i]
            if self.rows[r, STATE] == DECODE and self._computed(r) % self.block_size == 0:
                alive = True
                while self.free < 1:
                    if self._preempt_last() == r:
                        alive = False
                        break
                if alive:
                    self.free -= 1
            i += 1

    @cython.cfunc
    @cython.exceptval(check=False)
    def _grow(self, r: cython.int, tokens: cython.int) -> cython.bint:
        """Blocks for the next chunk of a prefilling request; False if a preemption changed the list instead."""
        need: cython.int = self._blocks_for(self.rows[r, COMPUTED] + tokens) - self.rows[r, BLOCKS]
        if need <= 0:
            return True
        if need > self.free:
            self._compact_order()
            self._preempt_last()
            return False
        self.free -= need
        self.rows[r, BLOCKS] += need
        return True

    @cython.cfunc
    @cython.exceptval(check=False)
    def _preempt_last(self) -> cython.int:
        """Preempt the last admitted request; it loses its blocks and returns to the head of the queue. Returns its row."""
        self.order_n -= 1
        r: cython.int = self.order[self.order_n]
        state: cython.int = self.rows[r, STATE]
        i: cython.int
        j: cython.int = 0
        if state == DECODE:
            self.rows[r, DONE] = self._done(r)
            self.free += self._blocks_for(self._computed_at(r))
            self._remove_from_decoding(r)
        elif state == PREFILL:
            self.free += self.rows[r, BLOCKS]
            for i in range(self.prefill_n):
                if self.prefilling[i] != r:
                    self.prefilling[j] = self.prefilling[i]
                    j += 1
            self.prefill_n = j
        else:
            self.free += self._blocks_for(self.rows[r, PROMPT] + self.rows[r, STOP] - 1)
        self.rows[r, PREEMPTIONS] += 1
        self.preemption_count += 1
        self.running_n -= 1
        self.rows[r, COMPUTED] = 0
        self.rows[r, BLOCKS] = 0
        if state == LAST or self.rows[r, DONE] >= self.rows[r, STOP]:
            # Its last token is in flight and still counts: it ends with the next results, holding nothing.
            if state != LAST:
                self.retired[self.retired_n] = r
                self.retired_n += 1
            self.rows[r, STATE] = LAST
            self.rows[r, KEY] = -1
            return r
        self.rows[r, STATE] = WAITING
        self.rows[r, HIT] = 0
        self.wait_head = (self.wait_head + self.capacity - 1) % self.capacity
        self.waiting[self.wait_head] = r
        self.wait_n += 1
        self.waiting_tokens += self.rows[r, PROMPT]
        return r

    # ---- the decoding set

    @cython.cfunc
    @cython.exceptval(check=False)
    def _done(self, r: cython.int) -> cython.int:
        """Output tokens scheduled so far of a decoding request."""
        return self.rows[r, DONE] + self.g - self.rows[r, G0]

    @cython.cfunc
    @cython.exceptval(check=False)
    def _computed(self, r: cython.int) -> cython.int:
        return self.rows[r, PROMPT] + self.rows[r, DONE] + self.g - self.rows[r, G0] - 1

    @cython.cfunc
    @cython.exceptval(check=False)
    def _computed_at(self, r: cython.int) -> cython.int:
        """Computed tokens of a request whose DONE is up to date."""
        return self.rows[r, PROMPT] + self.rows[r, DONE] - 1

    @cython.cfunc
    @cython.exceptval(check=False)
    def _class(self, computed: cython.int) -> cython.int:
        x: cython.int = (computed - self.g) % self.block_size
        return x + self.block_size if x < 0 else x

    @cython.cfunc
    @cython.exceptval(check=False)
    def _enter_decoding(self, r: cython.int) -> cython.void:
        """A prefill is complete in batch g-1: its token is in flight, and it decodes from schedule ``g`` on."""
        if self.rows[r, DONE] == 0 and self.times[r, FIRST] < 0 and (self.target < 0 or self.target == r):
            self.firsts[(self.first_head + self.first_n) % self.capacity] = r
            self.firsts_due[(self.first_head + self.first_n) % self.capacity] = self.g - 1 + self.lag
            self.first_n += 1
        self.rows[r, DONE] += 1
        self._join(r, self.g + max(self.rows[r, STOP] - self.rows[r, DONE], 0) - 1)

    @cython.cfunc
    @cython.exceptval(check=False)
    def _join(self, r: cython.int, last: cython.int) -> cython.void:
        """Join the decoding set at schedule ``g``; batch ``last`` has its last token, DONE were scheduled before."""
        computed: cython.int = self._computed_at(r)
        self.rows[r, STATE] = DECODE
        self.rows[r, G0] = self.g
        self.rows[r, KEY] = self._leaves_at(r, last)
        self.nd += 1
        self.context += computed
        self.hist[self._class(computed)] += 1
        self._heap_push(self.rows[r, KEY], r)

    @cython.cfunc
    @cython.exceptval(check=False)
    def _leaves_at(self, r: cython.int, last: cython.int) -> cython.int:
        """The first schedule without a request whose last token is in batch ``last``."""
        if self.lag == 2 and self.rows[r, STOP] < self.rows[r, MAX_TOKENS]:
            return last + 2  # its end is a surprise: it is scheduled once more in vain
        return last + 1

    @cython.cfunc
    @cython.exceptval(check=False)
    def _leave_decoding(self, r: cython.int) -> cython.void:
        self.rows[r, DONE] = self._done(r)
        self._remove_from_decoding(r)

    @cython.cfunc
    @cython.exceptval(check=False)
    def _remove_from_decoding(self, r: cython.int) -> cython.void:
        """Take a request whose DONE is up to date out of the aggregates."""
        computed: cython.int = self._computed_at(r)
        self.rows[r, G0] = self.g
        self.nd -= 1
        self.context -= computed
        self.hist[self._class(computed)] -= 1

    @cython.cfunc
    @cython.exceptval(check=False)
    def _end(self, r: cython.int) -> cython.void:
        """A request's last token has been delivered."""
        if self.rows[r, KEY] != -1:  # else it was preempted with its last token in flight and holds nothing
            self.free += self._blocks_for(self._computed_at(r))
            self.running_n -= 1
        self.rows[r, STATE] = DONE_STATE
        self.times[r, FINISHED] = self.now
        if self.times[r, FIRST] < 0:
            self.times[r, FIRST] = self.now
        self.ended[self.ended_n] = r
        self.ended_n += 1

    # ---- queues

    @cython.cfunc
    @cython.exceptval(check=False)
    def _add(self, prompt: cython.int, max_tokens: cython.int, stop: cython.int, at_s: cython.double, believed: cython.int,
             hit: cython.int, label: cython.int, priority: cython.int) -> cython.int:
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

    @cython.cfunc
    @cython.exceptval(check=False)
    def _arrive(self) -> cython.void:
        r: cython.int = self.arrivals[self.arrival_head]
        self.arrival_head = (self.arrival_head + 1) % self.capacity
        self.arrival_n -= 1
        self._queue(r)

    @cython.cfunc
    @cython.exceptval(check=False)
    def _queue(self, r: cython.int) -> cython.void:
        i: cython.int = self.wait_n
        j: cython.int
        while self.by_priority and i > 0:
            j = self.waiting[(self.wait_head + i - 1) % self.capacity]
            if self.rows[j, PRIORITY] <= self.rows[r, PRIORITY]:
                break
            self.waiting[(self.wait_head + i) % self.capacity] = j
            i -= 1
        self.rows[r, STATE] = WAITING
        self.waiting[(self.wait_head + i) % self.capacity] = r
        self.wait_n += 1

    @cython.cfunc
    @cython.exceptval(check=False)
    def _push_order(self, r: cython.int) -> cython.void:
        if self.order_n >= 2 * self.capacity:
            self._compact_order()
        self.order[self.order_n] = r
        self.order_n += 1

    @cython.cfunc
    @cython.exceptval(check=False)
    def _compact_order(self) -> cython.void:
        i: cython.int
        kept: cython.int = 0
        for i in range(self.order_n):
            if PREFILL <= self.rows[self.order[i], STATE] <= LAST and self.rows[self.order[i], KEY] != -1:
                self.order[kept] = self.order[i]
                kept += 1
        self.order_n = kept

    # ---- heap of (schedule, row); entries of preempted requests stay until they surface

    @cython.cfunc
    @cython.exceptval(check=False)
    def _heap_push(self, key: cython.int, r: cython.int) -> cython.void:
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

    @cython.cfunc
    @cython.exceptval(check=False)
    def _heap_pop(self) -> cython.void:
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

    @cython.cfunc
    @cython.exceptval(check=False)
    def _heap_rebuild(self) -> cython.void:
        """Drop the entries that no longer hold."""
        i: cython.int
        r: cython.int
        n: cython.int = self.heap_n
        self.heap_n = 0
        for i in range(n):
            r = self.heap_row[i]
            if self.rows[r, STATE] == DECODE and self.rows[r, KEY] == self.heap_key[i]:
                self._heap_push(self.heap_key[i], r)

    # ---- rows and arrays

    @cython.cfunc
    @cython.exceptval(check=False)
    def _new_row(self) -> cython.int:
        if self.free_n > 0:
            self.free_n -= 1
            return self.free_rows[self.free_n]
        if self.used == self.capacity:
            self._allocate_arrays(2 * self.capacity)
        self.used += 1
        return self.used - 1

    def _allocate_arrays(self, capacity):
        """Arrays for ``capacity`` requests, with the present content moved over."""
        old = self.capacity
        rings = ((self.wait_head, self.wait_n), (self.arrival_head, self.arrival_n), (self.first_head, self.first_n)) if old else ()
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

    def _clear(self, now_s, free):
        """An empty engine at ``now_s``."""
        i: cython.int
        self.used = self.order_n = self.wait_n = self.arrival_n = self.heap_n = self.prefill_n = self.retired_n = 0
        self.first_n = self.free_n = self.ended_n = self.wait_head = self.arrival_head = self.first_head = 0
        self.g = self.nd = self.running_n = 0
        self.context = self.waiting_tokens = self.preemption_count = self.step_count = 0
        self.free = free
        self.now = self.gpu_end = now_s
        self.in_flight = False
        self.target = -1
        for i in range(self.block_size):
            self.hist[i] = 0

    @cython.cfunc
    @cython.exceptval(check=False)
    def _take_limits(self, other: FastEngine) -> cython.void:
        if self.limits is not other.limits:
            self.limits = other.limits
            if self.block_size != other.block_size:
                self.hist = np.zeros(other.block_size, np.int32)
            self.block_size, self.budget_max, self.running_max = other.block_size, other.budget_max, other.running_max
            self.model_len, self.watermark, self.lag = other.model_len, other.watermark, other.lag
            self.reserve, self.chunked, self.by_priority = other.reserve, other.chunked, other.by_priority
        self.curve = other.curve
        self.jumping = other.jumping

    @cython.cfunc
    @cython.exceptval(check=False)
    def _copy(self, other: FastEngine) -> cython.void:
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
        self.target, self.preemption_count, self.step_count = -1, 0, 0


@cython.ccall
def ask_all(engines: list, scratch: FastEngine, prompt: cython.int, max_tokens: cython.int, totals: cython.int[::1],
            hits: cython.int[::1], priority: cython.int, at_s: cython.double, horizon_s: cython.double, believing: cython.bint, harm: cython.bint,
            out: cython.double[:, ::1]) -> None:
    """What if one more request came to each of ``engines`` at ``at_s``? No engine is changed; ``scratch`` is overwritten.

    ``totals``: its expected output tokens, one scenario each, averaged; ``hits``: (engines,) prompt tokens that each holds in its
    prefix cache; ``believing``: present requests end when they are believed to. ``out``: (engines, 6) filled with
    queue delay, TTFT, E2E (seconds from ``at_s``), preemptions, truncated (0/1), harm (seconds, sum over the others).
    """
    i: cython.int
    k: cython.int
    n: cython.int
    r: cython.int
    before: cython.int
    without_s: cython.double
    end_s: cython.double = at_s + horizon_s
    engine: FastEngine
    n = len(totals)
    for i in range(len(engines)):
        engine = engines[i]
        for k in range(6):
            out[i, k] = 0.0
        for k in range(n):
            scratch._adopt(engine, believing)
            r = scratch._ask(prompt, max_tokens, totals[k], at_s, hits[i], priority, horizon_s)
            out[i, 0] += (scratch.times[r, SCHEDULED] - at_s if scratch.times[r, SCHEDULED] >= 0 else horizon_s) / n
            out[i, 1] += (scratch.times[r, FIRST] - at_s if scratch.times[r, FIRST] >= 0 else horizon_s) / n
            out[i, 2] += (scratch.times[r, FINISHED] - at_s if scratch.times[r, FINISHED] >= 0 else horizon_s) / n
            out[i, 3] += cython.cast(cython.double, scratch.preemption_count) / n
            if scratch.times[r, FINISHED] < 0:
                out[i, 4] = 1.0
        if harm:
            before = engine.used
            out[i, 5] = scratch._finish_sum(before, end_s)
            scratch._adopt(engine, believing)
            without_s = scratch._finish_sum(before, end_s)
            out[i, 5] = max(out[i, 5] - without_s, 0.0)


@cython.cfunc
@cython.exceptval(check=False)
def _sum_s(m: cython.int, first_s: cython.double, growth_s: cython.double) -> cython.double:
    """Seconds of ``m`` steps that begin with ``first_s`` and grow by ``growth_s`` each."""
    return m * first_s + growth_s * (0.5 * m * (m - 1))


@cython.cfunc
@cython.exceptval(check=False)
def _steps_until(wait_s: cython.double, first_s: cython.double, growth_s: cython.double, most: cython.int) -> cython.int:
    """The fewest steps that take at least ``wait_s`` together, ``most`` at the most."""
    if wait_s <= 0:
        return 0
    if _sum_s(most, first_s, growth_s) < wait_s:
        return most
    b: cython.double = first_s - 0.5 * growth_s
    x: cython.int
    if growth_s * wait_s > 1e-12 * b * b:
        x = cython.cast(cython.int, (sqrt(b * b + 2.0 * growth_s * wait_s) - b) / growth_s)
    else:
        x = cython.cast(cython.int, wait_s / first_s)
    x = max(min(x, most), 0)
    while x < most and _sum_s(x, first_s, growth_s) < wait_s:
        x += 1
    while x > 0 and _sum_s(x - 1, first_s, growth_s) >= wait_s:
        x -= 1
    return x


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
