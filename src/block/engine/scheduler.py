"""vLLM's V1 scheduler, decision by decision, for one dense model without LoRA, multi-modal or speculative decoding.

Theory of operation
-------------------
The engine repeats schedule() -> execute -> update(). ``schedule`` fills one batch within the token budget: running
requests first, in admission order (a decode is one token, an unfinished prefill what fits), then waiting ones, each
only if its KV blocks fit. A running request that cannot get a block preempts the last one admitted (or, under the
priority policy, the least important): it loses its blocks, returns to the head of the queue and is recomputed.
``update`` gives every request whose tokens are all computed its next output token and frees the finished.

With asynchronous scheduling two batches are in flight: ``schedule`` for the next one runs before the results of the last are
known. A request then carries *placeholders* for output tokens that are being computed, and a preempted one keeps
*stale* tokens in flight, whose output still counts when it comes. Nothing else differs, so one class serves both;
who calls it decides how many batches are in flight.

Blocks are counters unless prefix caching is on; then they have identities (``PrefixPool``): a full block is known by
the content of everything up to its end, may be shared, and when free stays findable until it is evicted, least
recently used first.

Sources: vLLM 0.10-0.33 ``vllm/v1/core/sched`` as specified in docs/engine-model.md; exact against recorded traces
and against the real classes (tests/engine/test_scheduler_traces.py, ``make test-vllm``). This file also runs uncompiled.
"""

from bisect import insort
from collections import deque

import cython

from block.engine.sequence import FINISHED, PREEMPTED, RUNNING

if cython.compiled:
    from cython.cimports.block.engine.blocks import PrefixPool
    from cython.cimports.block.engine.sequence import Batch, Sequence
else:
    from block.engine.blocks import PrefixPool
    from block.engine.sequence import Batch, Sequence


@cython.cclass
class Scheduler:
    """The queues and the blocks of one engine; ``schedule`` and ``update`` are its only ways to change, besides ``add``
    and ``abort``. See the file's head."""

    limits = cython.declare(object, visibility="public")
    running = cython.declare(list, visibility="public")
    waiting = cython.declare(object, visibility="public")
    pool = cython.declare(PrefixPool, visibility="public")
    preemptions = cython.declare(cython.longlong, visibility="public")
    _free = cython.declare(cython.longlong)
    _block_size = cython.declare(cython.longlong)
    _budget = cython.declare(cython.longlong)
    _running_max = cython.declare(cython.longlong)
    _model_len = cython.declare(cython.longlong)
    _prefill_cap = cython.declare(cython.longlong)
    _watermark = cython.declare(cython.longlong)
    _reserve = cython.declare(cython.bint)
    _chunked = cython.declare(cython.bint)
    _priority = cython.declare(cython.bint)

    def __init__(self, limits):
        self.limits = limits
        self.running = []
        self.waiting = [] if limits.policy == "priority" else deque()
        self.pool = PrefixPool(limits.num_gpu_blocks) if limits.enable_prefix_caching else None
        self.preemptions = 0
        self._free = limits.blocks_usable
        self._block_size = limits.block_size
        self._budget = limits.max_num_batched_tokens
        self._running_max = limits.max_num_seqs
        self._model_len = limits.max_model_len
        self._prefill_cap = limits.long_prefill_token_threshold
        self._watermark = limits.watermark_blocks
        self._reserve = limits.scheduler_reserve_full_isl
        self._chunked = limits.enable_chunked_prefill
        self._priority = limits.policy == "priority"

    # ---- what anyone may ask or bring

    @property
    def blocks_free(self) -> int:
        return self._free_blocks()

    @property
    def has_requests(self) -> bool:
        return bool(self.running) or bool(self.waiting)

    def can_ever_run(self, sequence) -> bool:
        """Whether this engine could serve the sequence at all, alone, to its end."""
        total = min(sequence.prompt + sequence.stop_after, self._model_len)
        return sequence.prompt < self._model_len and -(-total // self._block_size) <= self.limits.blocks_usable

    def add(self, sequence) -> None:
        """Append a new request to the waiting queue."""
        self._enqueue(sequence, False)

    def abort(self, sequence) -> None:
        """Remove a request at once (client gone, or stopped from outside); its blocks are free afterwards."""
        if sequence.status == FINISHED:
            return
        if sequence.status == RUNNING:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)
        sequence.status = FINISHED

    # ---- schedule

    @cython.ccall
    def schedule(self) -> Batch:
        """Fill the next batch; may preempt. An empty batch means that there is nothing to compute now."""
        batch: Batch = Batch()
        budget: cython.longlong = self._budget
        cap: cython.longlong = 0
        if self._prefill_cap > 0 and len(self.running) + len(self.waiting) > 1:
            cap = self._prefill_cap
        budget = self._schedule_running(batch, budget, cap)
        if not batch.preempted:
            self._schedule_waiting(batch, budget, cap)
        self._commit(batch)
        return batch

    @cython.cfunc
    def _schedule_running(self, batch: Batch, budget: cython.longlong, cap: cython.longlong) -> cython.longlong:
        i: cython.longlong = 0
        n: cython.longlong
        seq: Sequence
        victim: Sequence
        scheduled: cython.bint
        while i < len(self.running) and budget > 0:
            seq = self.running[i]
            if seq.placeholders > 0 and seq.computed + 2 - seq.placeholders >= seq.prompt + seq.max_tokens:
                i += 1  # its last token is already being computed
                continue
            n = seq.prompt + seq.output + seq.placeholders - seq.computed
            if 0 < cap < n:
                n = cap
            n = min(n, budget, self._model_len - seq.computed - 1)
            if n <= 0:
                i += 1
                continue
            scheduled = True
            while not self._allocate(seq, n):
                victim = self._choose_victim()
                j: cython.longlong = self.running.index(victim)
                del self.running[j]
                if j < i:
                    i -= 1
                    budget += self._unschedule(batch, victim)
                self._preempt(victim, batch)
                if victim is seq:
                    scheduled = False
                    break
            if not scheduled:
                break
            batch.sequences.append(seq)
            batch.tokens.append(n)
            budget -= n
            i += 1
        return budget

    @cython.cfunc
    def _schedule_waiting(self, batch: Batch, budget: cython.longlong, cap: cython.longlong) -> cython.void:
        n: cython.longlong
        seq: Sequence
        looked_past: list = []
        while self.waiting and budget > 0 and len(self.running) < self._running_max:
            seq = self.waiting[0]
            if seq.stale > 0:  # its output from before the preemption is still in flight
                looked_past.append(self._pop_waiting())
                continue
            hit: list = self._cached_prefix(seq)
            computed: cython.longlong = len(hit) * self._block_size
            n = seq.prompt + seq.output - computed
            if 0 < cap < n:
                n = cap
            if not self._chunked and n > budget:
                break
            n = min(n, budget)
            if not self._admit(seq, n, hit):
                break
            self._pop_waiting()
            self.running.append(seq)
            seq.status = RUNNING
            seq.computed = computed
            batch.sequences.append(seq)
            batch.tokens.append(n)
            budget -= n
        for seq in reversed(looked_past):
            self._enqueue(seq, True)

    @cython.cfunc
    def _commit(self, batch: Batch) -> cython.void:
        """Count the batch's tokens as computed (optimistically) and sum up its shape."""
        i: cython.longlong
        n: cython.longlong
        seq: Sequence
        samples: cython.bint
        for i in range(len(batch.sequences)):
            seq = batch.sequences[i]
            n = batch.tokens[i]
            if n == 1 and seq.computed >= seq.prompt:
                batch.decode_requests += 1
                batch.context += seq.computed
            else:
                batch.chunks.append((n, seq.computed))
                batch.prefill_tokens += n
                batch.prefill_work += n * (seq.computed + 0.5 * n)
            batch.total_tokens += n
            seq.computed += n
            seq.in_flight += n
            samples = seq.computed >= seq.prompt + seq.output + seq.placeholders
            if samples:
                seq.placeholders += 1
            batch.samples.append(samples)
        if self.pool is not None:
            batch.shared = self._shared_blocks() * self._block_size

    # ---- update

    @cython.ccall
    def update(self, batch: Batch) -> list:
        """Take in a batch's results, oldest batch first. Returns the sequences that got a token; finished ones have the status."""
        i: cython.longlong
        n: cython.longlong
        seq: Sequence
        was_stale: cython.bint
        any_finished: cython.bint = False
        sampled: list = []
        for i in range(len(batch.sequences)):
            seq = batch.sequences[i]
            n = batch.tokens[i]
            seq.in_flight -= n
            was_stale = seq.stale > 0
            if was_stale:
                seq.stale -= n
            if seq.status == FINISHED or not batch.samples[i]:
                continue
            seq.output += 1
            sampled.append(seq)
            if not was_stale:
                seq.placeholders -= 1
            if seq.status == RUNNING and self.pool is not None:  # also when it ends now: its blocks stay findable
                self._enter_full_blocks(seq, seq.computed - seq.placeholders)
            if seq.output >= seq.stop_after or seq.prompt + seq.output >= self._model_len:
                if seq.status != RUNNING:
                    self.waiting.remove(seq)
                self._release(seq)
                seq.status = FINISHED
                any_finished = True
        if any_finished:
            self.running = [s for s in self.running if cython.cast(Sequence, s).status == RUNNING]
        return sampled

    # ---- queues

    @cython.cfunc
    def _pop_waiting(self) -> Sequence:
        return self.waiting.pop(0) if self._priority else self.waiting.popleft()

    @cython.cfunc
    def _enqueue(self, seq: Sequence, front: cython.bint) -> cython.void:
        if self._priority:
            insort(self.waiting, seq)
        elif front:
            self.waiting.appendleft(seq)
        else:
            self.waiting.append(seq)

    @cython.cfunc
    def _choose_victim(self) -> Sequence:
        if self._priority:
            return max(self.running)
        return self.running[len(self.running) - 1]

    @cython.cfunc
    def _unschedule(self, batch: Batch, victim: Sequence) -> cython.longlong:
        """Take a victim out of the batch being filled; returns the tokens that it gives back to the budget."""
        for k in range(len(batch.sequences)):
            if batch.sequences[k] is victim:
                n: cython.longlong = batch.tokens[k]
                del batch.sequences[k]
                del batch.tokens[k]
                return n
        return 0

    @cython.cfunc
    def _preempt(self, seq: Sequence, batch: Batch) -> cython.void:
        self._release(seq)
        seq.status = PREEMPTED
        seq.computed = 0
        seq.placeholders = 0
        seq.stale = seq.in_flight
        seq.preemptions += 1
        self.preemptions += 1
        batch.preempted.append(seq)
        self._enqueue(seq, True)

    # ---- blocks

    @cython.cfunc
    def _free_blocks(self) -> cython.longlong:
        return self._free if self.pool is None else len(self.pool.free)

    @cython.cfunc
    def _shared_blocks(self) -> cython.longlong:
        """Blocks of running sequences counted once for each but the first that holds them."""
        held: cython.longlong = 0
        for seq in self.running:
            held += cython.cast(Sequence, seq).blocks
        return held - (self.limits.blocks_usable - self._free_blocks())

    @cython.cfunc
    def _blocks_for(self, tokens: cython.longlong) -> cython.longlong:
        return (tokens + self._block_size - 1) // self._block_size

    @cython.cfunc
    def _allocate(self, seq: Sequence, n: cython.longlong) -> cython.bint:
        """Blocks for ``n`` more tokens of a running sequence; changes nothing when they do not fit."""
        need: cython.longlong = max(self._blocks_for(min(seq.computed + n, self._model_len)) - seq.blocks, 0)
        if need > self._free_blocks():
            return False
        self._take(seq, need)
        if self.pool is not None:
            self._enter_full_blocks(seq, seq.computed + n)
        return True

    @cython.cfunc
    def _admit(self, seq: Sequence, n: cython.longlong, hit: list) -> cython.bint:
        """Blocks for a waiting sequence's first ``n`` tokens after its cached prefix; changes nothing when they do not fit."""
        hits: cython.longlong = len(hit)
        free: cython.longlong = self._free_blocks()
        taken: cython.longlong = self._watermark if len(self.running) > 0 else 0
        if self.pool is not None:
            taken += self.pool.unreferenced(hit)
        if self._reserve:
            whole: cython.longlong = self._blocks_for(min(seq.prompt + seq.output, self._model_len)) - hits
            if max(whole, 0) + taken > free:
                return False
        upto: cython.longlong = hits * self._block_size + n
        need: cython.longlong = max(self._blocks_for(min(upto, self._model_len)) - hits, 0)
        if need + taken > free:
            return False
        seq.blocks = hits
        if self.pool is not None:
            self.pool.touch(hit)
            seq.block_ids = list(hit)
            seq.cached_blocks = hits
            if seq.preemptions == 0:
                seq.hit_tokens = hits * self._block_size
                self.pool.queried_tokens += seq.prompt
                self.pool.hit_tokens += seq.hit_tokens
        self._take(seq, need)
        if self.pool is not None:
            self._enter_full_blocks(seq, upto)
        return True

    @cython.cfunc
    def _take(self, seq: Sequence, count: cython.longlong) -> cython.void:
        seq.blocks += count
        if self.pool is None:
            self._free -= count
        elif count > 0:
            seq.block_ids += self.pool.take(count)

    @cython.cfunc
    def _release(self, seq: Sequence) -> cython.void:
        if self.pool is None:
            self._free += seq.blocks
        else:
            self.pool.release(seq.block_ids)
            seq.block_ids = []
        seq.blocks = 0
        seq.cached_blocks = 0

    @cython.cfunc
    def _cached_prefix(self, seq: Sequence) -> list:
        if self.pool is None:
            return []
        # The last token is always computed, so that there is something to sample from.
        return self.pool.find(seq, (seq.prompt + seq.output - 1) // self._block_size)

    @cython.cfunc
    def _enter_full_blocks(self, seq: Sequence, upto: cython.longlong) -> cython.void:
        i: cython.longlong
        full: cython.longlong = min(upto, seq.prompt + seq.output) // self._block_size
        for i in range(seq.cached_blocks, full):
            self.pool.enter(seq.block_ids[i], seq.block_key(i))
        if full > seq.cached_blocks:
            seq.cached_blocks = full
