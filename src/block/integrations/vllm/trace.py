"""Record every decision of a real vLLM scheduler as a golden trace (the format is in ``block.engine.trace``).

A trace is kept in memory, at most ``CALLS_MAX`` calls, because only later it is known how many tokens each request got
and which prefix blocks two requests share. It is written by ``close`` and whenever the engine falls idle: vLLM kills
its engine process rather than letting it end, unless it has a ``--shutdown-timeout``. Turn it on in a server with
``BLOCK_VLLM_TRACE=FILE``.
"""

import gzip
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from block.integrations.vllm.scheduler_view import limits_of_scheduler, waiting_in_order

CALLS_MAX: Final = 200_000
WRITE_EVERY_S: Final = 2.0


class TraceRecorder:
    """Watches one scheduler object; ``arrived``, ``preempted`` and ``scheduled`` are to be called as those things
    happen."""

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
        self._written_s = time.monotonic()

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

    def updated(self, scheduler: Any, _output: Any, _finished_s: float) -> None:
        """Write what there is when nothing is left to do; what an update changes shows at the next call."""
        if not scheduler.running and not scheduler.waiting and time.monotonic() - self._written_s >= WRITE_EVERY_S:
            self.close()

    def close(self) -> None:
        """Write the file: the whole trace so far."""
        self._complete_arrivals()
        with gzip.open(self._path, "wt", compresslevel=6) as file:
            file.write(json.dumps({"engine": self._engine}) + "\n")
            for call in self._calls:
                arrivals = [_trimmed(a) for a in call["arrivals"]]
                file.write(json.dumps({**call, "arrivals": arrivals}, separators=(",", ":")) + "\n")
        self._written_s = time.monotonic()

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
            # vLLM appends to a request's chain as it generates, so a later writing may find more.
            arrival[5] = [numbers.setdefault(h, len(numbers)) for h in shared]

    def _number(self, request: Any) -> int:
        return int(self._arrivals[request.request_id][0])


def _trimmed(arrival: list[Any]) -> list[Any]:
    """Without the optional fields at its end that say nothing."""
    end = 6 if arrival[5] else 5 if arrival[4] is not None else 4
    return arrival[:end]
