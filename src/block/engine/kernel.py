"""The fast form of the engine model: the same decisions and times as ``pipeline.Engine``, in jumps.

Theory of operation
-------------------
Between one arrival, completion, prefill or exhausted pool and the next, an engine decodes the same batch again and
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
Who gets tokens and blocks, and who is preempted, is in ``admission``, the arrays are in ``store``.

Equality with stepping and with ``pipeline.Engine`` is a property test (tests/engine/test_kernel.py). What it
approximates is prefix caching: ``prefix.PrefixCache`` in the simulator; a what-if knows only the hits that it is told.
The file also runs uncompiled, for reading and coverage.
"""

import cython
import numpy as np

if cython.compiled:
    from cython.cimports.block.engine.store import (
        ARRIVED,
        BELIEVED,
        COMPUTED,
        DECODE,
        DONE,
        DONE_STATE,
        EXPECTED,
        FINISHED,
        FIRST,
        KEY,
        LABEL,
        LAST,
        MAX_TOKENS,
        PREEMPTIONS,
        PROMPT,
        SCHEDULED,
        STATE,
        STOP,
        TOKENS,
        UNUSED,
        WAITING,
    )
    from cython.cimports.block.engine.admission import Admission
    from cython.cimports.libc.math import sqrt
else:
    from block.engine.store import (
        ARRIVED,
        BELIEVED,
        COMPUTED,
        DECODE,
        DONE,
        DONE_STATE,
        EXPECTED,
        FINISHED,
        FIRST,
        KEY,
        LABEL,
        LAST,
        MAX_TOKENS,
        PREEMPTIONS,
        PROMPT,
        SCHEDULED,
        STATE,
        STOP,
        TOKENS,
        UNUSED,
        WAITING,
    )
    from math import sqrt

    from block.engine.admission import Admission

OUTLIVED_TOKENS = cython.declare(
    cython.int, 10
)  # how much longer a request is believed to go on once it outlived its estimate


class FastEngine(Admission):
    """One engine instance in virtual time. ``advance`` is the only thing that makes time pass."""

    # ---- for callers

    def add(self, prompt_tokens, max_tokens, stop_after, at_s, believed=0, hit_tokens=0, label=0, priority=0) -> int:
        """A request that reaches the queue at ``at_s``; returns its row. It ends after ``min(stop_after, max_tokens)``
        output tokens; what-ifs made from this engine see ``believed`` instead (0: the truth)."""
        return self._add(prompt_tokens, max_tokens, stop_after, at_s, believed, hit_tokens, label, priority)

    def expect(self, row: int, keys: tuple) -> None:
        """The content keys of the prompt of a request just added; its hit is looked up when it is about to run."""
        self.cache.expect(row, keys, int(self.rows[row, PROMPT]))
        self._look(row)

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
            times = (float(self.times[r, SCHEDULED]), float(self.times[r, FIRST]), float(self.times[r, FINISHED]))
            out.append((int(self.rows[r, LABEL]), *times, int(self.rows[r, PREEMPTIONS])))
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

    def copy_from(self, other, believing=False):
        """Become a copy of another engine (arrays are reused); ``believing``: requests end when they are
        believed to, not when they will."""
        self._adopt(other, believing)

    def _adopt(self, other, believing):
        self._copy(other)
        if believing:
            self._believe()

    def _believe(self):
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

    # ---- time

    def _idle(self):
        """Nothing runs, waits or is in flight."""
        return self.running_n == 0 and self.wait_n == 0 and self.first_n == 0 and not self.in_flight

    def _run(self, until_s):
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
            self.cap = self.prefill_cap if self.running_n + self.wait_n > 1 else self.budget_max
            if not (self.jumping and self._jump(until_s)) and not self._step():
                # Nothing could be computed and nothing is in flight: only an arrival can change that.
                if self.arrival_n == 0:
                    return
                arrival = self.times[self.arrivals[self.arrival_head], ARRIVED]
                if arrival > until_s:
                    return
                self.now = arrival

    def _settle(self):
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

    def _heat(self, prefill):
        """The accelerator's heat when batch ``g`` starts; its own ``prefill`` tokens heat the next one."""
        began: cython.double = max(self.gpu_end, self.now + self.curve.head_s)
        heat: cython.double = self.curve.heat_after(self.heat, began - self.heated_s)
        self.heat = heat + prefill
        self.heated_s = began
        return heat

    def _tick(self, step_s, launch_s):
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

    def _jump(self, until_s):
        """Advance as many identical decode steps as there are until something changes; False: take a step instead."""
        if self.nd == 0 or self.prefill_n > 0 or self.hist[self._residue(self.g)] > self.free:
            return False
        if self.wait_n > 0 and self._head_fits(self.budget_max - self.nd, self.free - self.hist[self._residue(self.g)]):
            return False
        first_s: cython.double = self.curve.decode_base_s(self.nd)
        kv_s: cython.double = self.curve.decode_kv_s(self.nd)
        growth_s: cython.double = kv_s * self.nd
        first_s += kv_s * self.context - self.curve.shared_s * self.held * self.block_size
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

    def _steps_before_change(self, until_s, first_s, growth_s):
        m: cython.int = 1 << 30
        stop_s: cython.double = until_s
        start: cython.double
        if self.heap_n > 0:
            m = self.heap_key[0] - self.g
        if self.retired_n > 0:
            m = min(m, 1)
        if self.first_n > 0:
            m = min(m, self.firsts_due[self.first_head] - self.g)
        if self.arrival_n > 0 and (self.wait_n == 0 or self.by_priority):
            # An arrival behind a blocked head changes nothing; one that becomes the head may be admitted.
            stop_s = min(stop_s, self.times[self.arrivals[self.arrival_head], ARRIVED])
        if m > 1:
            start = self.gpu_end if self.lag == 2 else self.now
            m = min(m, _steps_until(stop_s - start, first_s, growth_s, m) + self.lag - 1)
        if (m // self.block_size + 1) * self.nd > self.free:
            m = self._steps_within_blocks(m)
        return m

    def _blocks_over(self, m):
        """New blocks that the decoding set takes over ``m`` schedules."""
        j: cython.int
        full: cython.int = m // self.block_size
        blocks: cython.int = full * self.nd
        for j in range(full * self.block_size, m):
            blocks += self.hist[self._residue(self.g + j)]
        return blocks

    def _steps_within_blocks(self, m):
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

    def _step(self):
        """Schedule batch ``g``; False if there is nothing to compute and nothing in flight."""
        preempted: cython.longlong = self.preemption_count
        one_by_one: cython.bint = (self.by_priority or self.cap < self.budget_max) and (
            self.prefill_n > 0 or self.hist[self._residue(self.g)] > self.free
        )
        left: cython.int = self._fill_in_order() if one_by_one else self._fill()
        if self.preemption_count == preempted:
            self._admit_waiting(left)
        if one_by_one:
            self._set_aside()
        goes_on: cython.bint = self._compute() or self._empty_step() or self.preemption_count > preempted
        if one_by_one:
            self._take_back()
        return goes_on

    def _compute(self):
        """Batch ``g`` with the tokens that its requests were given; False if there are none."""
        i: cython.int
        r: cython.int
        tokens: cython.int
        kept: cython.int = 0
        decodes: cython.int = self.nd
        context: cython.longlong = self.context
        chunks: cython.int = 0
        prefill: cython.int = 0
        work: cython.double = 0.0
        completed: cython.int = 0
        for i in range(self.prefill_n):
            r = self.prefilling[i]
            tokens = self.rows[r, TOKENS]
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
            return False
        heat: cython.double = self._heat(prefill) if chunks > 0 else 0.0
        self._tick(
            self.curve.gpu_s(decodes, context, prefill, work, chunks, heat, 1.0 * self.held * self.block_size),
            self.curve.launch_s(decodes, prefill, chunks),
        )
        self.context += self.nd
        for i in range(completed):
            self._enter_decoding(self.completed[i])
        return True

    def _empty_step(self):
        """Nothing to compute in batch ``g``: the results of batch g-1 are awaited, if there is one."""
        waited: cython.bint = self.in_flight or self.retired_n > 0 or self.first_n > 0
        if self.in_flight and self.gpu_end > self.now:
            self.now = self.gpu_end
        self.in_flight = False
        self.g += 1
        return waited


def _sum_s(m, first_s, growth_s):
    """Seconds of ``m`` steps that begin with ``first_s`` and grow by ``growth_s`` each."""
    return m * first_s + growth_s * (0.5 * m * (m - 1))


def _steps_until(wait_s, first_s, growth_s, most):
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
