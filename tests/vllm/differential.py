"""Drive the real vLLM scheduler classes beside the model, with random arrivals and fake model outputs, and compare
every call.

    differential.py [--cases 40] [--requests 120] [--seed 0] [--mode sync|async] [--record DIRECTORY] [--json]

Runs with the interpreter of the environment that ``tools/vllm/install.sh`` made (and ``PYTHONPATH=src``); needs neither
a model's weights nor a server. A case is one random configuration: FCFS or priority, prefix caching with shared,
repeated and continued prompts, ``long_prefill_token_threshold``, watermark, ``scheduler_reserve_full_isl``, chunked
prefill, EOS before max_tokens, aborts.
"""

import argparse
import json
import os
import random
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler as SyncScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from block.engine.limits import EngineLimits
from block.engine.scheduler import Scheduler
from block.engine.sequence import FINISHED, Sequence
from block.integrations.vllm.publisher import StatePublisher
from block.integrations.vllm.rows import BEYOND_COUNTED
from block.integrations.vllm.scheduler_view import limits_of_scheduler, waiting_in_order
from block.integrations.vllm.trace import TraceRecorder
from block.predict import snapshot as wire
from block.predictor.shared_memory import SnapshotReader
from vllm import __version__ as vllm_version

EOS, WORDS = 7, range(100, 30_000)
# The model's names of what vLLM counts for a request, and vLLM's (None: asked from the KV cache manager).
COUNTERS = {
    "prompt": "num_prompt_tokens", "computed": "num_computed_tokens", "output": "num_output_tokens",
    "placeholders": "num_output_placeholders", "in_flight": "num_in_flight_tokens", "stale": "num_stale_output_tokens",
    "blocks": None, "preemptions": "num_preemptions",
}  # fmt: skip


def random_limits(chance: random.Random, *, asynchronous: bool) -> EngineLimits:
    block_size, model_len = chance.choice([16, 32]), chance.choice([512, 1024])
    running = chance.choice([4, 16, 64])
    chunked = chance.random() < 0.8
    tokens = max(chance.choice([64, 256, 1024]), running) if chunked else chance.choice([model_len, 2 * model_len])
    return EngineLimits(
        max_num_seqs=running,
        max_num_batched_tokens=tokens,
        block_size=block_size,
        num_gpu_blocks=max(chance.choice([70, 150, 1000]), model_len // block_size + 1),
        max_model_len=model_len,
        async_scheduling=asynchronous,
        enable_chunked_prefill=chunked,
        enable_prefix_caching=chance.random() < 0.6,
        policy=chance.choice(["fcfs", "fcfs", "priority"]),
        long_prefill_token_threshold=chance.choice([0, 0, 48]),
        watermark=chance.choice([0.0, 0.0, 0.05]),
        scheduler_reserve_full_isl=chance.random() < 0.8,
    )


def real_scheduler(limits: EngineLimits, model: str) -> Any:
    names = (
        "max_model_len",
        "max_num_seqs",
        "block_size",
        "long_prefill_token_threshold",
        "watermark",
        "enable_prefix_caching",
        "scheduler_reserve_full_isl",
    )
    config = EngineArgs(
        model=model, tokenizer=model, enforce_eager=True, dtype="bfloat16", scheduling_policy=limits.policy,
        max_num_batched_tokens=limits.max_num_batched_tokens, **{n: getattr(limits, n) for n in names},
    ).create_engine_config()  # fmt: skip
    # What the CPU platform would refuse, the classes themselves can do.
    config.scheduler_config.async_scheduling = limits.async_scheduling
    config.scheduler_config.enable_chunked_prefill = limits.enable_chunked_prefill
    config.cache_config.num_gpu_blocks = limits.num_gpu_blocks
    layer = FullAttentionSpec(block_size=limits.block_size, num_kv_heads=1, head_size=32, dtype=torch.bfloat16)
    cache = KVCacheConfig(
        num_blocks=limits.num_gpu_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], layer)]
    )
    kind = AsyncScheduler if limits.async_scheduling else SyncScheduler
    scheduler = kind(
        vllm_config=config, kv_cache_config=cache, structured_output_manager=MagicMock(), block_size=limits.block_size,
        hash_block_size=limits.block_size, log_stats=False,
    )  # fmt: skip
    scheduler.structured_output_manager.accept_tokens.return_value = True
    return scheduler


class Workload:
    """Random requests whose contents overlap: shared beginnings, exact repetitions, and continuations of earlier
    answers."""

    def __init__(self, chance: random.Random, limits: EngineLimits) -> None:
        self._chance, self._limits = chance, limits
        self._beginnings = [self._words(chance.randint(20, 200)) for _ in range(3)]
        self._earlier: list[tuple[list[int], list[int]]] = []
        self._keys: dict[tuple[int, tuple[int, ...]], int] = {}

    def make(self) -> tuple[list[int], list[int], int]:
        """Prompt, answer (ends in EOS or at max_tokens) and max_tokens."""
        chance = self._chance
        prompt = self._words(chance.randint(1, 250))
        kind = chance.random()
        if kind < 0.3:
            prompt = chance.choice(self._beginnings) + prompt
        elif kind < 0.4 and self._earlier:
            prompt = list(chance.choice(self._earlier)[0])
        elif kind < 0.6 and self._earlier:
            before, answer = chance.choice(self._earlier)
            prompt = before + answer + self._words(chance.randint(1, 30))
        prompt = prompt[: self._limits.max_model_len - chance.randint(1, 200)]
        max_tokens = chance.randint(1, 150)
        answer = self._words(min(max_tokens, chance.randint(1, 200)))
        if len(answer) < max_tokens or chance.random() < 0.2:
            answer[-1] = EOS
        self._earlier.append((prompt, answer))
        return prompt, answer, max_tokens

    def keys(self, tokens: list[int]) -> list[int]:
        """An identity for the content up to the end of each full block."""
        size, keys, parent = self._limits.block_size, [], -1
        for start in range(0, len(tokens) - size + 1, size):
            parent = self._keys.setdefault((parent, tuple(tokens[start : start + size])), len(self._keys))
            keys.append(parent)
        return keys

    def _words(self, n: int) -> list[int]:
        return self._chance.choices(WORDS, k=n)


class Pair:
    """The real scheduler and the model, given the same requests and results."""

    def __init__(self, seed: int, *, asynchronous: bool, model: str, record: Path | None) -> None:
        self.chance = random.Random(seed)
        self.limits = random_limits(self.chance, asynchronous=asynchronous)
        self.real = real_scheduler(self.limits, model)
        assert limits_of_scheduler(self.real) == self.limits, (limits_of_scheduler(self.real), self.limits)
        self.mine = Scheduler(self.limits)
        self.workload = Workload(self.chance, self.limits)
        digest = get_hash_fn_by_name("sha256")
        init_none_hash(digest)
        self.hasher = (
            get_request_block_hasher(self.limits.block_size, digest) if self.limits.enable_prefix_caching else None
        )
        self.recorder = TraceRecorder(record, self.real, vllm_version) if record else None
        self.pairs: dict[str, tuple[Any, Any, list[int]]] = {}
        self.in_flight: deque[tuple[Any, Any]] = deque()
        self.victims: list[str] = []
        self.tokens = 0
        self.hidden = set() if self.limits.async_scheduling else {"placeholders"}  # what vLLM does not count
        name = f"differential-{os.getpid()}"
        self.publisher = StatePublisher(self.real, name, waiting_max=20)
        self.reader = SnapshotReader(name)
        preempt = self.real._preempt_request

        def noted(request: Any, *args: Any, **kwargs: Any) -> Any:
            self.victims.append(request.request_id)
            self.publisher.preempted(request)
            if self.recorder:
                self.recorder.preempted(request)
            return preempt(request, *args, **kwargs)

        self.real._preempt_request = noted

    def add(self) -> None:
        prompt, answer, max_tokens = self.workload.make()
        number = len(self.pairs)
        key = f"r{number}"
        priority = self.chance.randrange(3) if self.limits.policy == "priority" else 0
        options = SamplingParams(max_tokens=max_tokens, stop_token_ids=[EOS], ignore_eos=True)
        request = Request(
            request_id=key, prompt_token_ids=prompt, sampling_params=options, pooling_params=None,
            arrival_time=float(number), priority=priority, block_hasher=self.hasher,
        )  # fmt: skip
        sequence = Sequence(
            key, len(prompt), max_tokens, stop_after=len(answer), priority=priority, order=float(number),
            block_keys=self.workload.keys(prompt + answer),
        )  # fmt: skip
        self.pairs[key] = (request, sequence, answer)
        self.hidden |= {c for c, name in COUNTERS.items() if name and not hasattr(request, name)}  # an older version
        self.real.add_request(request)
        self.mine.add(sequence)
        if self.recorder:
            self.recorder.arrived(request)

    def abort_one(self) -> None:
        live = [key for key, (_request, sequence, _answer) in self.pairs.items() if sequence.status != FINISHED]
        if live:
            key = self.chance.choice(live)
            self.real.finish_requests(key, RequestStatus.FINISHED_ABORTED)
            self.mine.abort(self.pairs[key][1])

    def schedule(self) -> dict[str, Any]:
        """One ``schedule()`` on both sides; returns what differs (empty: nothing)."""
        self.victims.clear()
        output, batch = self.real.schedule(), self.mine.schedule()
        if self.recorder:
            self.recorder.scheduled(self.real, output, 0.0)
        self.in_flight.append((output, batch))
        real, mine = self._real_state(output), self._model_state(batch)
        self.publisher.scheduled(self.real, output, 1.0)
        return {name: (mine[name], real[name]) for name in real if mine[name] != real[name]} or self.snapshot_errors()

    def update(self) -> None:
        output, batch = self.in_flight.popleft()
        sampling = {sequence.key for sequence, samples in zip(batch.sequences, batch.samples, strict=True) if samples}
        keys = list(output.num_scheduled_tokens)
        sampled = []
        for key in keys:
            request, _sequence, answer = self.pairs[key]
            done = request.num_output_tokens
            sampled.append(
                [answer[done]] if key in sampling and done < len(answer) else [50] if key in sampling else []
            )
        self.tokens += sum(map(len, sampled))
        index = {key: i for i, key in enumerate(keys)}
        self.real.update_from_output(
            output, ModelRunnerOutput(req_ids=keys, req_id_to_index=index, sampled_token_ids=sampled)
        )
        self.mine.update(batch)
        self.publisher.updated(self.real, output, 2.0)

    def snapshot_errors(self) -> dict[str, Any]:
        """What the published snapshot says otherwise than the model."""
        buffer = self.reader.read()
        if buffer is None:  # an empty batch came back: nothing new to publish
            return {}
        snapshot = wire.decode(buffer)
        present = [*self.mine.running, *list(self.mine.waiting)[:20]]
        batches = [
            {s.key: (n, m) for s, n, m in zip(b.sequences, b.tokens, b.samples, strict=True)}
            for _o, b in self.in_flight
            if b.sequences
        ]
        older, newer = [*batches, {}, {}][:2]
        requests = {}
        for sequence in present:
            (first, samples_1), (second, samples_2) = older.get(sequence.key, (0, 0)), newer.get(sequence.key, (0, 0))
            flags = wire.SAMPLES_1 * bool(samples_1) + wire.SAMPLES_2 * bool(samples_2)
            room = self.limits.max_model_len - sequence.prompt
            requests[wire.request_key(sequence.key)] = (
                sequence.prompt, min(sequence.max_tokens, room), sequence.computed, sequence.output,
                sequence.placeholders, first, second, sequence.stale, sequence.blocks, sequence.priority, flags,
                sequence.preemptions,
            )  # fmt: skip
        expected = {
            "snapshot.limits": self.limits,
            "snapshot.queues": (
                len(self.mine.running),
                min(len(self.mine.waiting), 20),
                len(self.mine.waiting),
                self.mine.blocks_free,
                len(batches),
            ),
            "snapshot.beyond": self._tokens_beyond(int(snapshot.header["waiting_tokens_beyond"])),
            "snapshot.preemptions": self.mine.preemptions,
            "snapshot.requests": requests,
        }
        header = snapshot.header
        found = {
            "snapshot.limits": snapshot.limits,
            "snapshot.queues": tuple(
                int(header[f]) for f in ("running", "waiting", "waiting_total", "kv_blocks_free", "batches_in_flight")
            ),
            "snapshot.beyond": int(header["waiting_tokens_beyond"]),
            "snapshot.preemptions": int(header["preemptions_total"]),
            "snapshot.requests": {
                int(k): tuple(int(x) for x in column)
                for k, column in zip(snapshot.keys, snapshot.requests.T, strict=True)
            },
        }
        return {name: (expected[name], found[name]) for name in expected if expected[name] != found[name]}

    def _tokens_beyond(self, told: int) -> int:
        """The prompts beyond the cap; the publisher counts a long tail only now and then, so there "about" is enough."""
        beyond = [s.prompt for s in list(self.mine.waiting)[20:]]
        true = sum(beyond)
        return told if len(beyond) > BEYOND_COUNTED and abs(told - true) < 0.25 * true else true

    def close(self) -> None:
        self.publisher.close()
        if self.recorder:
            self.recorder.close()

    def _real_state(self, output: Any) -> dict[str, Any]:
        manager = self.real.kv_cache_manager
        present = [*self.real.running, *waiting_in_order(self.real)]
        told = hasattr(Request, "is_prefill_chunk") or any(hasattr(r, "is_prefill_chunk") for r in present)
        chunks = [key for key in output.num_scheduled_tokens if told and self.real.requests[key].is_prefill_chunk]
        return {
            "scheduled": list(output.num_scheduled_tokens.items()),
            **({"samples": [key not in chunks for key in output.num_scheduled_tokens]} if told else {}),
            "running": [r.request_id for r in self.real.running],
            "waiting": [r.request_id for r in waiting_in_order(self.real)],
            "blocks_free": manager.block_pool.get_num_free_blocks(),
            "preempted": list(self.victims),
            "counters": [self._real_counters(r) for r in present],
        }

    def _real_counters(self, r: Any) -> tuple[int, ...]:
        held = len(self.real.kv_cache_manager.get_block_ids(r.request_id)[0])
        found = [held if name is None else getattr(r, name, 0) for name in COUNTERS.values()]
        return tuple(0 if c in self.hidden else value for c, value in zip(COUNTERS, found, strict=True))

    def _model_state(self, batch: Any) -> dict[str, Any]:
        present = [*self.mine.running, *self.mine.waiting]
        return {
            "scheduled": [(s.key, n) for s, n in zip(batch.sequences, batch.tokens, strict=True)],
            "samples": [bool(x) for x in batch.samples],
            "running": [s.key for s in self.mine.running],
            "waiting": [s.key for s in self.mine.waiting],
            "blocks_free": self.mine.blocks_free,
            "preempted": [s.key for s in batch.preempted],
            "counters": [tuple(0 if c in self.hidden else getattr(s, c) for c in COUNTERS) for s in present],
        }


def run_case(pair: Pair, requests: int) -> tuple[int, dict[str, Any]]:
    """Play one case in the engine's own order; returns the calls made and the first difference (empty: none)."""
    chance = pair.chance
    arrivals, at = deque(), 0
    for _ in range(requests):
        at += chance.choice([0, 0, 1, 2, 5])
        arrivals.append(at)
    calls = turn = 0
    while arrivals or pair.in_flight or pair.real.has_requests():
        while arrivals and arrivals[0] <= turn:
            arrivals.popleft()
            pair.add()
        turn += 1
        if chance.random() < 0.02:
            pair.abort_one()
        if pair.real.has_requests():
            calls += 1
            wrong = pair.schedule()
            if wrong:
                return calls, {"call": calls, **wrong}
            if pair.limits.async_scheduling and len(pair.in_flight) < 2:
                continue
        if chance.random() < 0.01 and not pair.recorder:  # a trace cannot tell on which side of an update an abort was
            pair.abort_one()
        if pair.in_flight:
            pair.update()
            wrong = pair.snapshot_errors()
            if wrong:
                return calls, {"call": calls, "after": "update", **wrong}
    return calls, {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory made by tools/vllm/make_tiny_model.py")
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=["sync", "async", "both"], default="both")
    parser.add_argument("--record", type=Path, help="write each case's golden trace into this directory")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    totals: dict[str, Any] = {
        "vllm": vllm_version,
        "cases": 0,
        "calls": 0,
        "tokens": 0,
        "preemptions": 0,
        "mismatched_cases": 0,
        "first_mismatch": None,
    }
    started_s = time.process_time()
    modes = {"sync": [False], "async": [True], "both": [False, True]}[args.mode]
    for seed in range(args.seed, args.seed + args.cases):
        for asynchronous in modes:
            mode = "async" if asynchronous else "sync"
            record = args.record / f"{mode}-{seed}.jsonl.gz" if args.record else None
            pair = Pair(seed, asynchronous=asynchronous, model=args.model, record=record)
            calls, wrong = run_case(pair, args.requests)
            pair.close()
            totals["cases"] += 1
            totals["calls"] += calls
            totals["tokens"] += pair.tokens
            totals["preemptions"] += pair.mine.preemptions
            if wrong:
                totals["mismatched_cases"] += 1
                totals["first_mismatch"] = totals["first_mismatch"] or {
                    "seed": seed,
                    "mode": mode,
                    "limits": repr(pair.limits),
                    **wrong,
                }
    totals["cpu_s"] = round(time.process_time() - started_s, 1)
    sys.stdout.write(json.dumps(totals, indent=None if args.json else 1, default=str) + "\n")
    sys.exit(1 if totals["mismatched_cases"] else 0)


if __name__ == "__main__":
    main()
