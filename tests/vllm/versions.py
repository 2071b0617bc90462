"""Whether Block's plugin works in this version of vLLM: its scheduler driven with random requests, no server, no weights.

    PYTHONPATH=src ENVIRONMENT/bin/python tests/vllm/versions.py --model DIRECTORY [--cases 6] [--json]

vLLM's own ``Scheduler`` and (0.11 and newer) ``AsyncScheduler`` run with the plugin's hooks on, as in a server; every published
snapshot is compared with the scheduler's own queues and counts. Whether that version *schedules* as the engine model
does is another question: ``differential.py`` answers it.
"""

import argparse
import dataclasses
import inspect
import json
import logging
import os
import random
import sys
from collections import deque
from typing import Any
from unittest.mock import MagicMock

os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["VLLM_PLUGINS"] = "none"
NAME = os.environ["BLOCK_VLLM_NAME"] = f"versions-{os.getpid()}"

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from block.integrations.vllm import register
from block.integrations.vllm.scheduler_view import waiting_in_order
from block.predict import snapshot as wire
from block.predictor.shared_memory import SnapshotReader
from vllm import __version__ as vllm_version

BLOCKS, BLOCK_SIZE, MODEL_LEN = 70, 16, 512
SNAPSHOTS_MAX = 20_000


def known(function: Any, **options: Any) -> dict[str, Any]:
    """Those of the options that this version's function takes."""
    taken = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in taken}


def scheduler_of(model: str, *, asynchronous: bool, priority: bool) -> Any:
    config = EngineArgs(
        **known(
            EngineArgs.__init__, model=model, tokenizer=model, enforce_eager=True, dtype="bfloat16", max_num_seqs=8,
            max_model_len=MODEL_LEN, max_num_batched_tokens=128, block_size=BLOCK_SIZE, enable_prefix_caching=False,
            enable_chunked_prefill=True, scheduling_policy="priority" if priority else "fcfs",
        )
    ).create_engine_config()  # fmt: skip
    config.scheduler_config.async_scheduling = asynchronous
    config.cache_config.num_gpu_blocks = BLOCKS
    layer = FullAttentionSpec(
        **known(FullAttentionSpec, block_size=BLOCK_SIZE, num_kv_heads=1, head_size=32, dtype=torch.bfloat16,
                use_mla=False)
    )  # fmt: skip
    cache = KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], layer)])
    structured = MagicMock()
    structured.accept_tokens.return_value, structured.should_advance.return_value = True, False
    kind = AsyncScheduler if asynchronous else Scheduler
    return kind(
        **known(
            Scheduler.__init__, vllm_config=config, kv_cache_config=cache, structured_output_manager=structured,
            block_size=BLOCK_SIZE, hash_block_size=BLOCK_SIZE, log_stats=False,
        )
    )  # fmt: skip


def request_of(chance: random.Random, number: int, *, priority: bool) -> Any:
    sampling = SamplingParams(max_tokens=chance.randint(1, 120), ignore_eos=True)
    words = chance.choices(range(100, 200), k=chance.randint(1, 300))
    return Request(
        **known(
            Request.__init__, request_id=f"cmpl-r{number}-0-0123abcd", prompt_token_ids=words, sampling_params=sampling,
            pooling_params=None, eos_token_id=None, arrival_time=float(number),
            priority=chance.randrange(3) if priority else 0,
        )
    )  # fmt: skip


def yielding(scheduler: Any, output: Any, *, asynchronous: bool) -> set[str]:
    """The requests of a batch just scheduled that it brings to their next token."""
    found = set()
    for key in output.num_scheduled_tokens:
        request = scheduler.requests[key]
        expected = request.num_output_placeholders if asynchronous else 1
        if expected and request.num_computed_tokens >= request.num_tokens + expected - 1:
            found.add(key)
    return found


def results_of(output: Any) -> Any:
    """What a model would return: a token for every request whose prompt is done with this batch."""
    keys = list(output.num_scheduled_tokens)
    tokens = [[50] if key in output.yielding else [] for key in keys]
    missing = dataclasses.MISSING
    fields = {
        f.name: None
        for f in dataclasses.fields(ModelRunnerOutput)
        if f.default is missing and f.default_factory is missing
    }
    told = {"req_ids": keys, "req_id_to_index": {k: i for i, k in enumerate(keys)}, "sampled_token_ids": tokens}
    return ModelRunnerOutput(**fields | {"prompt_logprobs_dict": {}} | told)  # required fields only


def differences(scheduler: Any, reader: SnapshotReader, flights: deque[Any]) -> dict[str, Any]:
    """Where the newest snapshot says otherwise than the scheduler."""
    frame = reader.read()
    if frame is None:
        return {}
    snapshot = wire.decode(frame)
    present = [*scheduler.running, *waiting_in_order(scheduler)]
    manager = scheduler.kv_cache_manager
    rows = snapshot.requests
    held = [len(manager.get_block_ids(r.request_id)[0]) for r in scheduler.running]
    expected = {
        "keys": [wire.request_key(r.request_id.split("-")[1]) for r in present],
        "counts": (len(scheduler.running), len(present) - len(scheduler.running)),
        "free": manager.block_pool.get_num_free_blocks(),
        "prompt": [r.num_prompt_tokens for r in present],
        "computed": [r.num_computed_tokens for r in present],
        "output": [r.num_output_tokens for r in present],
        "blocks": held + [0] * (len(present) - len(held)),
        "in flight": [sum(o.num_scheduled_tokens.get(r.request_id, 0) for o in flights) for r in present],
    }
    found = {
        "keys": snapshot.keys.tolist(),
        "counts": (snapshot.running, snapshot.waiting),
        "free": snapshot.kv_blocks_free,
        "prompt": rows[wire.PROMPT].tolist(),
        "computed": rows[wire.COMPUTED].tolist(),
        "output": rows[wire.OUTPUT].tolist(),
        "blocks": rows[wire.BLOCKS].tolist(),
        "in flight": (rows[wire.BATCH_1] + rows[wire.BATCH_2]).tolist(),
    }
    return {name: (expected[name], found[name]) for name in expected if expected[name] != found[name]}


def drive(scheduler: Any, chance: random.Random, *, asynchronous: bool, priority: bool) -> tuple[int, dict[str, Any]]:
    """Play sixty requests; snapshots compared and the first difference."""
    wrong: dict[str, Any] = {}
    reader, flights, compared = SnapshotReader(NAME), deque(), 0
    left = 60
    while left or flights or scheduler.has_requests():
        while left and chance.random() < 0.3:
            left -= 1
            scheduler.add_request(request_of(chance, left, priority=priority))
        if scheduler.has_requests():
            output = scheduler.schedule()
            output.yielding = yielding(scheduler, output, asynchronous=asynchronous)
            flights.append(output)
            if output.total_num_scheduled_tokens == 0:
                flights.pop()
            wrong = differences(scheduler, reader, flights)
            more = asynchronous and len(flights) < 2 and output.total_num_scheduled_tokens > 0
            if not wrong and more and scheduler.has_requests():
                continue
        else:
            wrong = {}
        if flights and not wrong:
            output = flights.popleft()
            scheduler.update_from_output(output, results_of(output))
            wrong = differences(scheduler, reader, flights)
        compared += 2
        if compared > SNAPSHOTS_MAX:
            return compared, {"plugin": "requests never end"}
        if scheduler._block_watcher is None:
            wrong = {"plugin": "it stopped (see the log)"}
        if wrong:
            break
    return compared, wrong


def run_case(seed: int, model: str, *, asynchronous: bool) -> tuple[int, int, dict[str, Any]]:
    """Snapshots compared, preemptions, and the first difference (empty: none)."""
    chance = random.Random(seed)
    priority = chance.random() < 0.3
    scheduler = scheduler_of(model, asynchronous=asynchronous, priority=priority)
    watcher = scheduler._block_watcher
    if watcher is None:
        return 0, 0, {"plugin": "it does not watch this scheduler (see the log)"}
    try:
        compared, wrong = drive(scheduler, chance, asynchronous=asynchronous, priority=priority)
    finally:
        watcher.close()
    preemptions = watcher._queues.preemptions
    return compared, preemptions, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory made by tools/vllm/make_tiny_model.py")
    parser.add_argument("--cases", type=int, default=6)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    register()
    found: dict[str, Any] = {"vllm": vllm_version, "block": bool(getattr(Scheduler, "_block_installed", False))}
    for asynchronous in (False, True):
        compared = preemptions = 0
        wrong: dict[str, Any] = {}
        try:
            for seed in range(args.cases):
                more, times, wrong = run_case(seed, args.model, asynchronous=asynchronous)
                compared, preemptions = compared + more, preemptions + times
                if wrong:
                    break
        except Exception as error:  # noqa: BLE001 - a version that cannot be driven is a result
            wrong = {"driving it": f"{type(error).__name__}: {error}"}
        kind = "async" if asynchronous else "sync"
        found[kind] = {"snapshots": compared, "preemptions": preemptions, "wrong": wrong}
    sys.stdout.write(json.dumps(found, indent=None if args.json else 1, default=str) + "\n")


if __name__ == "__main__":
    main()
