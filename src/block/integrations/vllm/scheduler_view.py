"""What a vLLM V1 scheduler object holds, read the same way in every supported version (0.10 to 0.33)."""

import re
from collections.abc import Iterable
from typing import Any

from block.engine.limits import EngineLimits


def limits_of_scheduler(scheduler: Any) -> EngineLimits:
    """The limits and flags that decide this scheduler's choices.

    Raises:
        AttributeError: a version of vLLM whose scheduler is built differently.
    """
    config = scheduler.vllm_config
    options = config.scheduler_config
    tokens = getattr(scheduler, "max_num_scheduled_tokens", None) or options.max_num_batched_tokens
    running = getattr(scheduler, "max_num_active_reqs", None) or scheduler.max_num_running_reqs
    return EngineLimits(
        max_num_seqs=min(running, tokens),
        max_num_batched_tokens=tokens,
        num_gpu_blocks=scheduler.kv_cache_manager.block_pool.num_gpu_blocks,
        block_size=_block_size(scheduler),
        max_model_len=scheduler.max_model_len,
        async_scheduling=bool(getattr(options, "async_scheduling", False)),
        enable_chunked_prefill=bool(getattr(options, "enable_chunked_prefill", True)),
        enable_prefix_caching=bool(config.cache_config.enable_prefix_caching),
        policy="priority" if _name(options.policy) == "priority" else "fcfs",
        long_prefill_token_threshold=getattr(options, "long_prefill_token_threshold", 0) or 0,
        watermark=getattr(options, "watermark", 0.0) or 0.0,
        scheduler_reserve_full_isl=bool(getattr(options, "scheduler_reserve_full_isl", False)),
    )


def waiting_in_order(scheduler: Any) -> list[Any]:
    """Waiting requests in the order in which ``schedule()`` will look at them."""
    return [*waiting_apart(scheduler), *scheduler.waiting]


def waiting_apart(scheduler: Any) -> list[Any]:
    """Waiting requests held apart from the queue but looked at before it: by 0.32 those that hold blocks, by 0.18 to 0.31
    skipped ones."""
    apart: list[Any] = []
    for name in ("kv_holding_waiting", "skipped_waiting"):
        if queue := getattr(scheduler, name, None):
            apart = [*queue, *apart]
    return apart


def _block_size(scheduler: Any) -> int:
    # The scheduler's own counts context parallelism; before 0.11 only the configuration has it.
    return int(getattr(scheduler, "block_size", None) or scheduler.cache_config.block_size)


def _name(policy: Any) -> str:
    return str(getattr(policy, "value", policy))


_PREFIX = re.compile(r"^(?:\d+_)?(cmpl-|chatcmpl-)?")
_UNIQUE = re.compile(r"-[0-9a-f]{8}$")
_CHOICE = re.compile(r"-\d+$")


def external_id(request_id: str) -> str:
    """The client's ``X-Request-Id`` out of the engine's own id of the request.

    The API server makes ``cmpl-ID-CHOICE`` or ``chatcmpl-ID`` of it, parallel sampling puts ``N_`` before, and since
    about 0.15 a dash and eight hex digits follow (on older versions an id that itself ends so would be cut, and its request
    counted as somebody else's).
    """
    prefix = _PREFIX.match(request_id)
    assert prefix is not None
    name = _UNIQUE.sub("", request_id[prefix.end() :])
    return _CHOICE.sub("", name) if prefix[1] == "cmpl-" else name


def shape_of(rows: Iterable[tuple[int, int, int]]) -> tuple[int, int, int, float, int]:
    """Decode requests, context, prefill tokens, prefill work and chunks of a batch, as ``block.engine.scheduler.Batch``
    has them.

    ``rows``: for each request the tokens it computes, those computed before, and its prompt's length.
    """
    decodes = context = prefill_tokens = chunks = 0
    work = 0.0
    for tokens, before, prompt in rows:
        if tokens == 1 and before >= prompt:
            decodes += 1
            context += before
        else:
            chunks += 1
            prefill_tokens += tokens
            work += tokens * (before + 0.5 * tokens)
    return decodes, context, prefill_tokens, work, chunks
