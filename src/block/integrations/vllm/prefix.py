"""What an engine finds in its prefix cache, per request and in all: read from the batches that admit requests.

Which prompts are cached is not published: vLLM knows blocks by hashes of token ids, chained from a random number of
each process, so nobody outside could compare a prompt with them. Whoever routes by prefixes knows what it sent where,
and learns from ``hits`` whether that was still there.
"""

from typing import Any

import numpy as np

from block.integrations.vllm.rows import QueueRows
from block.predict.snapshot import PREFIX


class PrefixCounts:
    """Of one scheduler; ``scheduled`` is to be called with every ``schedule()``'s output, before the queues are read."""

    def __init__(self) -> None:
        self._record = np.zeros((), PREFIX)

    def scheduled(self, scheduler: Any, output: Any, queues: QueueRows) -> None:
        """Note what newly admitted requests found."""
        for new in getattr(output, "scheduled_new_reqs", ()):
            request = scheduler.requests.get(new.req_id)
            if request is not None:
                queues.found(request, new.num_computed_tokens)
            self._record["queried_tokens"] += len(new.prompt_token_ids or ())
            self._record["hit_tokens"] += new.num_computed_tokens

    def record(self, scheduler: Any) -> bytes:
        """The counters as a snapshot has them."""
        cached = getattr(scheduler.kv_cache_manager.block_pool, "cached_block_hash_to_block", None)
        self._record["blocks_cached"] = -1 if cached is None else len(cached)
        return self._record.tobytes()
