"""Record every decision of a real vLLM scheduler as a golden trace (the format is in ``block.engine.trace``).

A trace is kept in memory, at most ``CALLS_MAX`` calls, and written by ``close``: only then it is known how many tokens each request
got and which prefix blocks two requests share. Turn it on in a server with ``BLOCK_VLLM_TRACE=FILE``.
"""

import gzip
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from block.integrations.vllm.scheduler_view import limits_of_scheduler, waiting_in_order

CALLS_MAX: Final = 200_000


class TraceRecorder:
    """Watches one scheduler object; ``arrived``, ``preempted`` and ``scheduled`` are to be called as those things happen."""

    def __init__(self, path: Path, scheduler: Any, version: str) -> None:
        self._path = path
        limits = limits_of_scheduler(scheduler)
        self._engine = {"vllm": version, **{f: getattr(limits, f) for f in limits.__struct_fields__}}
        self._arrivals: dict[str, list[Any]] = {}
        self._requests: dict[str, Any] = {}
        self._new: list[list[Any]] = []
        self._preempted: list[int] = []
        self._calls: list[dict[str, Any]] = []
        self._started_s: float | None = None

    def arrived(self, request: Any) -> None:
        arrival = [len(self._arrivals), request.num_prompt_tokens, request.max_tokens, request.priority, None, None]
        self._arrivals[request.request_id] = arrival
        self._requests[request.request_id] = request
        self._new.append(arrival)

    def preempted(self, request: Any) -> None:
        self._preempted.append(self._number(request))

    def scheduled(self, scheduler: Any, output: Any, _started_s: float) -> None:
        """Note the state after one ``schedule()`` call that returned ``output``."""
        if len(self._calls) >= CALLS_MAX:
            return
        now_s = time.monotonic()
        if self._started_s is None:
            self._started_s = now_s
        self._calls.append(
            {
                "t_s": round(now_s - self._started_s, 6),
                "arrivals": self._new,
                "scheduled": [[self._arrivals[key][0], n] for key, n in output.num_scheduled_tokens.items()],
                "running": [self._number(r) for r in scheduler.running],
                "waiting": [self._number(r) for r in waiting_in_order(scheduler)],
                "blocks_free": scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
                "preempted": self._preempted,
            }
        )
        self._new, self._preempted = [], []

    def updated(self, scheduler: Any, output: Any, finished_s: float) -> None:
        """Nothing to do: what an update changes shows at the next call."""

    def close(self) -> None:
        """Write the file. Later calls are not recorded."""
        self._complete_arrivals()
        with gzip.open(self._path, "wt", compresslevel=9) as file:
            for line in ({"engine": self._engine}, *self._calls):
                file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def _complete_arrivals(self) -> None:
        """Fill in what each request's end and the others' contents tell."""
        hashes = {key: [bytes(h) for h in getattr(r, "block_hashes", ())] for key, r in self._requests.items()}
        holders = Counter(h for chain in hashes.values() for h in set(chain))
        numbers: dict[bytes, int] = {}
        for key, arrival in self._arrivals.items():
            request = self._requests[key]
            if request.status.name in ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED"):
                arrival[4] = request.num_output_tokens
            # Only what others have too needs an identity; a chain's shared part is its beginning.
            shared = [h for h in hashes[key] if holders[h] > 1]
            arrival[5] = [numbers.setdefault(h, len(numbers)) for h in shared]
            while arrival[-1] in (None, []) and len(arrival) > 4:
                arrival.pop()

    def _number(self, request: Any) -> int:
        return int(self._arrivals[request.request_id][0])
