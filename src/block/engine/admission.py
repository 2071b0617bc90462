"""Who gets tokens, slots and blocks in a batch of the fast engine, and who loses them.

Decodes come before prefills in admission order, so their tokens and blocks can be given all at once, but for two engines: a
cap on prompts (``long_prefill_token_threshold``) lets requests decode behind an unfinished prompt, and the priority policy
preempts from anywhere. Their steps with prefills or without blocks go through the running requests one by one
(``_fill_in_order``); a decode that gets nothing is set aside for the step.
"""

import cython

if cython.compiled:
    from cython.cimports.block.engine.store import (
        BLOCKS,
        COMPUTED,
        DECODE,
        DONE,
        DONE_STATE,
        EngineStore,
        FINISHED,
        FIRST,
        G0,
        HELD,
        HIT,
        KEY,
        LAST,
        MAX_TOKENS,
        PREEMPTIONS,
        PREFILL,
        PROMPT,
        SCHEDULED,
        STATE,
        STOP,
        TOKENS,
    )
else:
    from block.engine.store import (
        BLOCKS,
        COMPUTED,
        DECODE,
        DONE,
        DONE_STATE,
        EngineStore,
        FINISHED,
        FIRST,
        G0,
        HELD,
        HIT,
        KEY,
        LAST,
        MAX_TOKENS,
        PREEMPTIONS,
        PREFILL,
        PROMPT,
        SCHEDULED,
        STATE,
        STOP,
        TOKENS,
    )


class Admission(EngineStore):
    """The decisions of one engine's batches; ``kernel.FastEngine`` gives them time."""

    # ---- who gets tokens and blocks

    def _fill(self):
        """Tokens (``TOKENS`` of a prefill) and blocks for the running requests, the decodes at once; returns the budget left."""
        i: cython.int = 0
        r: cython.int
        tokens: cython.int
        left: cython.int = self.budget_max
        blocks: cython.int = self.hist[self._residue(self.g)]
        while blocks > self.free:
            # vLLM gives blocks in admission order and preempts from the other end; whoever is left has its block.
            self._preempt(self._pop_last(), 0)
            blocks = self.hist[self._residue(self.g)]
        self.free -= blocks
        left -= self.nd
        while i < self.prefill_n:
            r = self.prefilling[i]
            tokens = min(self.rows[r, PROMPT] + self.rows[r, DONE] - self.rows[r, COMPUTED], left)
            if tokens > 0 and not self._grow(r, tokens):
                continue  # preempted itself (it was the last admitted) or made room
            self.rows[r, TOKENS] = tokens
            left -= tokens
            i += 1
        return left

    def _fill_in_order(self):
        """As ``_fill``, one by one in admission order: ``TOKENS`` of every running request; returns the budget left."""
        i: cython.int
        j: cython.int
        r: cython.int
        victim: cython.int = -1
        tokens: cython.int
        left: cython.int = self.budget_max
        self._compact_order()
        for i in range(self.order_n):
            self.rows[self.order[i], TOKENS] = 0
        i = 0
        while i < self.order_n and left > 0:
            r = self.order[i]
            tokens = self._wanted(r, left)
            while self._blocks_wanted(r, tokens) > self.free:
                j = self._choose_victim()
                victim = self.order[j]
                self._remove_from_order(j)
                if j < i:
                    i -= 1
                    left += self.rows[victim, TOKENS]
                self._preempt(victim, self.rows[victim, TOKENS])
                if victim == r:
                    return left  # vLLM ends the round here: those behind it get nothing
            if tokens > 0:
                self._take_blocks(r, self._blocks_wanted(r, tokens))
                self.rows[r, TOKENS] = tokens
                left -= tokens
            i += 1
        return left

    def _wanted(self, r, left):
        """Tokens for a running request in this step."""
        if self.rows[r, STATE] == DECODE:
            return 1
        if self.rows[r, STATE] == PREFILL:
            return min(self.rows[r, PROMPT] + self.rows[r, DONE] - self.rows[r, COMPUTED], self.cap, left)
        return 0  # its last token is being computed

    def _blocks_wanted(self, r, tokens):
        """Blocks that a running request lacks for ``tokens`` more."""
        computed: cython.int
        if tokens == 0:
            return 0
        if self.rows[r, STATE] == DECODE:
            computed = self._computed(r)
            return self._blocks_for(computed + 1) - self._blocks_for(computed)
        return max(self._blocks_for(self.rows[r, COMPUTED] + tokens) - self.rows[r, BLOCKS], 0)

    def _take_blocks(self, r, blocks):
        self.free -= blocks
        if self.rows[r, STATE] == PREFILL:
            self.rows[r, BLOCKS] += blocks

    def _choose_victim(self):
        """Place in ``order`` (compact) of the request to preempt: the last, or the least important, youngest."""
        i: cython.int
        worst: cython.int = self.order_n - 1
        if self.by_priority:
            worst = 0
            for i in range(1, self.order_n):
                if self._before(self.order[worst], self.order[i]):
                    worst = i
        return worst

    def _set_aside(self):
        """Take the decodes that get no token in batch ``g`` out of the decoding set."""
        i: cython.int
        for i in range(self.order_n):
            if self.rows[self.order[i], STATE] == DECODE and self.rows[self.order[i], TOKENS] == 0:
                self._leave_decoding(self.order[i])

    def _take_back(self):
        """They decode from the next schedule on; who was only to be computed in vain leaves when it would have."""
        i: cython.int
        r: cython.int
        for i in range(self.order_n):
            r = self.order[i]
            if self.rows[r, STATE] == DECODE and self.rows[r, TOKENS] == 0:
                if self.rows[r, DONE] < self.rows[r, STOP]:
                    self._join(r, self.g + self.rows[r, STOP] - self.rows[r, DONE] - 1)
                else:
                    self._join(r, self.rows[r, KEY] - 2)

    def _admit_waiting(self, budget):
        r: cython.int
        tokens: cython.int
        while self.wait_n > 0 and self._head_fits(budget, self.free):
            r = self.waiting[self.wait_head]
            if self.cache is not None:
                self.cache.admit(r, self.rows[r, HIT])
            tokens = min(self.rows[r, PROMPT] + self.rows[r, DONE] - self.rows[r, HIT], self.cap, budget)
            self.rows[r, TOKENS] = tokens
            self.wait_head = (self.wait_head + 1) % self.capacity
            self.wait_n -= 1
            self.waiting_tokens -= self.rows[r, PROMPT]
            self.rows[r, STATE] = PREFILL
            self.rows[r, COMPUTED] = self.rows[r, HIT]
            self.rows[r, BLOCKS] = self._blocks_for(self.rows[r, HIT] + tokens)
            self.free -= self.rows[r, BLOCKS] - self.rows[r, HELD]
            self.held += self.rows[r, HELD]
            if self.cache is not None:
                self.cache.fit(self.free)
            self.running_n += 1
            self._push_order(r)
            self.prefilling[self.prefill_n] = r
            self.prefill_n += 1
            if self.times[r, SCHEDULED] < 0:
                self.times[r, SCHEDULED] = self.now
            budget -= tokens

    def _head_fits(self, budget, free):
        """Whether the head of the waiting queue can be admitted now."""
        if budget <= 0 or self.running_n >= self.running_max:
            return False
        r: cython.int = self.waiting[self.wait_head]
        if self.cache is not None:
            self.cache.fit(self.free)
            if self.looked_row != r or self.looked_version != self.cache.version:
                self._look(r)
        elif self.rows[r, HIT] > 0:
            self.rows[r, HELD] = self._borrowed(self.rows[r, HIT] // self.block_size)
        tokens: cython.int = min(self.rows[r, PROMPT] + self.rows[r, DONE] - self.rows[r, HIT], self.cap)
        taken: cython.int = self.watermark if self.running_n > 0 else 0
        if tokens > budget:
            if not self.chunked:
                return False
            tokens = budget
        free += self.rows[r, HELD]
        if self.reserve and self._blocks_for(self.rows[r, PROMPT] + self.rows[r, DONE]) + taken > free:
            return False
        return self._blocks_for(self.rows[r, HIT] + tokens) + taken <= free

    # ---- the prefix cache, where there is one

    def _look(self, r):
        """What a waiting request would find in the cache now."""
        self.looked_row, self.looked_version = r, self.cache.version
        found = self.cache.look(r)
        self.rows[r, HIT], self.rows[r, HELD] = found[0], found[1]

    def _give_back(self, r, blocks, over):
        """A request loses its ``blocks``; what others still use of them does not become free."""
        if self.cache is not None:
            self.cache.fit(self.free)
        self.free += blocks - self.rows[r, HELD]
        self.held -= self.rows[r, HELD]
        self.rows[r, HELD] = 0
        if self.cache is None:
            return
        for heir, inherited in self.cache.release(r, over=over):
            self.rows[heir, HELD] -= inherited
            self.held -= inherited
            self.free -= inherited

    # ---- memory pressure

    def _grow(self, r, tokens):
        """Blocks for the next chunk of a prefilling request; False if a preemption changed the list instead."""
        need: cython.int = self._blocks_for(self.rows[r, COMPUTED] + tokens) - self.rows[r, BLOCKS]
        if need <= 0:
            return True
        if need > self.free:
            self._preempt(self._pop_last(), 0)
            return False
        self.free -= need
        self.rows[r, BLOCKS] += need
        return True

    def _preempt(self, r, tokens):
        """A request (no longer in ``order``) loses its blocks, those for ``tokens`` of this step too, and queues again."""
        state: cython.int = self.rows[r, STATE]
        blocks: cython.int
        i: cython.int
        j: cython.int = 0
        if state == DECODE:
            self.rows[r, DONE] = self._done(r)
            blocks = self._blocks_for(self._computed_at(r) + tokens)
            self._remove_from_decoding(r)
        elif state == PREFILL:
            blocks = self.rows[r, BLOCKS]
            for i in range(self.prefill_n):
                if self.prefilling[i] != r:
                    self.prefilling[j] = self.prefilling[i]
                    j += 1
            self.prefill_n = j
        else:
            blocks = self._blocks_for(self.rows[r, PROMPT] + self.rows[r, STOP] - 1)
        self._give_back(r, blocks, state == LAST or self.rows[r, DONE] >= self.rows[r, STOP])
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
            return
        self.rows[r, HIT] = 0
        self._requeue(r)
        self.waiting_tokens += self.rows[r, PROMPT]

    # ---- the decoding set

    def _enter_decoding(self, r):
        """A prefill is complete in batch g-1: its token is in flight, and it decodes from schedule ``g`` on."""
        if self.rows[r, DONE] == 0 and self.times[r, FIRST] < 0 and (self.target < 0 or self.target == r):
            self.firsts[(self.first_head + self.first_n) % self.capacity] = r
            self.firsts_due[(self.first_head + self.first_n) % self.capacity] = self.g - 1 + self.lag
            self.first_n += 1
        if self.cache is not None:
            self.cache.complete(r)
        self.rows[r, DONE] += 1
        self._join(r, self.g + max(self.rows[r, STOP] - self.rows[r, DONE], 0) - 1)

    def _join(self, r, last):
        """Join the decoding set at schedule ``g``; batch ``last`` has its last token, DONE were scheduled before."""
        computed: cython.int = self._computed_at(r)
        self.rows[r, STATE] = DECODE
        self.rows[r, G0] = self.g
        self.rows[r, KEY] = self._leaves_at(r, last)
        self.nd += 1
        self.context += computed
        self.hist[self._class(computed)] += 1
        self._heap_push(self.rows[r, KEY], r)

    def _leaves_at(self, r, last):
        """The first schedule without a request whose last token is in batch ``last``."""
        if self.lag == 2 and self.rows[r, STOP] < self.rows[r, MAX_TOKENS]:
            return last + 2  # its end is a surprise: it is scheduled once more in vain
        return last + 1

    def _leave_decoding(self, r):
        self.rows[r, DONE] = self._done(r)
        self._remove_from_decoding(r)

    def _remove_from_decoding(self, r):
        """Take a request whose DONE is up to date out of the aggregates."""
        computed: cython.int = self._computed_at(r)
        self.rows[r, G0] = self.g
        self.nd -= 1
        self.context -= computed
        self.hist[self._class(computed)] -= 1

    def _end(self, r):
        """A request's last token has been delivered."""
        if self.rows[r, KEY] != -1:  # else it was preempted with its last token in flight and holds nothing
            self._give_back(r, self._blocks_for(self._computed_at(r)), True)
            self.running_n -= 1
        self.rows[r, STATE] = DONE_STATE
        self.times[r, FINISHED] = self.now
        if self.times[r, FIRST] < 0:
            self.times[r, FIRST] = self.now
        self.ended[self.ended_n] = r
        self.ended_n += 1
