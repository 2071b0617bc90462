"""A request inside the engine model, and the batch that one step computes."""

import cython

WAITING = 0
RUNNING = 1
PREEMPTED = 2
FINISHED = 3


@cython.cclass
class Sequence:
    """One request inside the engine. ``stop_after`` is when it will end; only ``update`` looks at it.

    ``block_keys``: the identity of the content of its first full blocks, equal between two sequences exactly where
    everything up to that block's end is equal; blocks beyond the list (all, if ``None``) are the sequence's own.
    """

    def __init__(self, key, prompt, max_tokens, stop_after=None, priority=0, order=0.0, block_keys=None, arrived_s=0.0):
        self.key = key
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.stop_after = max_tokens if stop_after is None else min(stop_after, max_tokens)
        self.priority = priority
        self.order = order
        self.block_keys = block_keys
        self.computed = 0
        self.output = 0
        self.placeholders = 0
        self.in_flight = 0
        self.stale = 0
        self.blocks = 0
        self.block_ids = []
        self.cached_blocks = 0
        self.hit_tokens = 0
        self.preemptions = 0
        self.status = WAITING
        self.arrived_s = arrived_s
        self.scheduled_s = -1.0
        self.first_token_s = -1.0
        self.finished_s = -1.0

    @cython.ccall
    def block_key(self, i: cython.longlong) -> object:
        """Identity of the content of everything up to the end of block ``i``."""
        if self.block_keys is not None and i < len(self.block_keys):
            return self.block_keys[i]
        return (self.key, i)

    def __lt__(self, other) -> bool:
        """Order of the waiting queue under the priority policy."""
        if self.priority != other.priority:
            return self.priority < other.priority
        return self.order < other.order


@cython.cclass
class Batch:
    """What one step computes: aligned lists, and the aggregates a step-time model needs.

    ``context`` sums the tokens already in cache of the decoding requests; ``prefill_work`` sums, over prefill
    chunks, tokens x (computed before + tokens / 2). ``chunks`` lists (tokens, computed before). ``shared``: tokens of the running
    sequences' blocks that another one holds too, counted once less than held.
    """

    def __init__(self):
        self.sequences = []
        self.tokens = []
        self.samples = []
        self.chunks = []
        self.total_tokens = 0
        self.decode_requests = 0
        self.context = 0
        self.prefill_tokens = 0
        self.prefill_work = 0.0
        self.shared = 0
        self.preempted = []
