"""What the vLLM plugin costs the engine per snapshot: stand-ins with the attributes of vLLM's requests, no vLLM needed.

    python bench/plugin.py [--json]

A step publishes once, after schedule(); the results of the step before are taken note of when they come. Both are counted.
"steady": the same requests decode on; "churn": one request ends, one is admitted and one arrives every step, which makes
the plugin rebuild what it keeps per request. CPU time of the thread, so that a busy machine does not count. The live cost
is measured by ``make test-vllm``.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from types import SimpleNamespace
from typing import Any

from block.integrations.vllm.publisher import StatePublisher

STEPS = 400


class FakeRequest:
    def __init__(self, number: int) -> None:
        self.request_id = f"cmpl-{number:032x}-0-{number % 2**32:08x}"
        self.sampling_params = SimpleNamespace(ignore_eos=False, stop=[], stop_token_ids=[], min_tokens=0)
        self.arrival_time, self.priority, self.num_preemptions, self.num_stale_output_tokens = 1.0 + number, 0, 0, 0
        self.num_prompt_tokens, self.max_tokens = 100 + number % 400, 1000
        self.num_computed_tokens = self.num_prompt_tokens + 50
        self.num_output_placeholders, self._output_token_ids = 1, [0] * 50


def fake_scheduler(running: int, waiting: int, first: int) -> Any:
    options = SimpleNamespace(async_scheduling=True, policy="fcfs", max_num_batched_tokens=8192)
    return SimpleNamespace(
        vllm_config=SimpleNamespace(
            scheduler_config=options,
            cache_config=SimpleNamespace(enable_prefix_caching=True),
            parallel_config=SimpleNamespace(),
        ),
        kv_cache_config=SimpleNamespace(),
        kv_cache_manager=SimpleNamespace(block_pool=SimpleNamespace(num_gpu_blocks=20_000, get_num_free_blocks=lambda: 9_000)),
        max_num_running_reqs=1024, max_model_len=8192, block_size=16, _preempt_request=None,
        running=[FakeRequest(first + i) for i in range(running)],
        waiting=[FakeRequest(first + running + i) for i in range(waiting)],
    )  # fmt: skip


def publish_cost_us(running: int, waiting: int, *, churn: bool) -> tuple[float, float]:
    """Median and 99th percentile of what a step costs, microseconds."""
    scheduler = fake_scheduler(running, waiting, 0)
    publisher = StatePublisher(scheduler, f"bench-{os.getpid()}")
    spent: list[float] = []
    fresh = 1_000_000
    outputs: list[Any] = []
    try:
        for _ in range(STEPS):
            if churn:
                fresh += 1
                arrived = FakeRequest(fresh)
                publisher.arrived(arrived)
                scheduler.waiting.append(arrived)
                del scheduler.running[fresh % len(scheduler.running)]
                scheduler.running.append(scheduler.waiting.pop(0))
            for request in scheduler.running:
                request.num_computed_tokens += 1
            output = SimpleNamespace(
                num_scheduled_tokens={r.request_id: 1 for r in scheduler.running}, total_num_scheduled_tokens=running
            )
            outputs.append(output)
            took_s = _timed_s(lambda output=output: publisher.scheduled(scheduler, output, 1.0))
            if len(outputs) == 2:
                took_s += _timed_s(lambda: publisher.updated(scheduler, outputs.pop(0), 2.0))
            spent.append(took_s)
    finally:
        publisher.close()
    ordered = sorted(spent[50:])
    return 1e6 * statistics.median(ordered), 1e6 * ordered[int(0.99 * len(ordered))]


def _timed_s(action: Any) -> float:
    began_ns = time.thread_time_ns()
    action()
    return (time.thread_time_ns() - began_ns) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    results = []
    for running, waiting in ((1, 0), (32, 0), (100, 0), (250, 0), (250, 100), (250, 1000)):
        for churn in (False, True):
            median_us, p99_us = publish_cost_us(running, waiting, churn=churn)
            results.append(
                {
                    "running": running,
                    "waiting": waiting,
                    "churn": churn,
                    "median_us": round(median_us, 1),
                    "p99_us": round(p99_us, 1),
                }
            )
    if args.json:
        print(
            json.dumps(
                {"commit": commit, "host": platform.node(), "python": platform.python_version(), "results": results}
            )
        )
        return
    print(f"commit {commit}, {platform.node()}, Python {platform.python_version()}, {STEPS} steps each, no randomness")
    for r in results:
        kind = "churn " if r["churn"] else "steady"
        cost = f"{r['median_us']:7.1f} us median {r['p99_us']:7.1f} us P99"
        print(f"{r['running']:4d} running {r['waiting']:5d} waiting {kind} {cost}")


if __name__ == "__main__":
    main()
