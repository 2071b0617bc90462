"""The header and the rows of a scheduler trace, in every form that is understood, as one form.

Header: the limits under ``engine`` (or ``config``, or at the top), under vLLM's names, flat or grouped (``scheduler_config``,
``cache_config``, ...). Unknown keys are ignored, unless they are known to change what a scheduler decides.

Arrivals: a list ``[id, prompt, max_tokens, priority, ...]`` or an object with these names. The prompt is a number of tokens or
its token ids. What follows may be the number of output tokens (``null``: it was aborted) and the content: one number or hash per
full block, equal where two requests agree up to there, or the token ids; or an object of named fields.

Rows: ``scheduled`` as pairs or as an object; ``running``, ``waiting`` and ``preempted`` as ids or as counts; ``finished``:
ids that ended since the last call. What a row lacks is not compared; ``scheduled`` it must have.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from block.engine.limits import EngineLimits, limits_from
from block.errors import BadInputError

GROUPS = (
    "engine",
    "config",
    "limits",
    "engine_config",
    "vllm_config",
    "scheduler_config",
    "cache_config",
    "model_config",
)
# vLLM's other names of the limits.
NAMES = {
    "scheduling_policy": "policy", "scheduler_policy": "policy", "max_num_scheduled_tokens": "max_num_batched_tokens",
    "max_num_active_seqs": "max_num_seqs", "num_gpu_blocks_override": "num_gpu_blocks", "chunked_prefill": "enable_chunked_prefill",
    "chunked_prefill_enabled": "enable_chunked_prefill", "prefix_caching": "enable_prefix_caching",
    "enable_async_scheduling": "async_scheduling", "use_async_scheduling": "async_scheduling",
    "reserve_full_isl": "scheduler_reserve_full_isl", "long_prefill_threshold": "long_prefill_token_threshold",
}  # fmt: skip
# What changes a schedule and is not modelled, with the values that do not.
UNMODELLED: dict[str, tuple[Any, ...]] = {
    "pipeline_parallel_size": (1,), "prefill_schedule_interval": (0, 1), "num_speculative_tokens": (0,),
    "speculative_config": (), "num_lookahead_tokens": (0,), "kv_transfer_config": (), "kv_connector": (), "enable_lora": (False,),
    "lora_config": (), "sliding_window": (0,), "long_prefill_token_threshold_adaptive": (False,),
    "adaptive_long_prefill_token_threshold": (False,), "decode_context_parallel_size": (1,), "num_spec_tokens": (0,),
    "spec_decode": (False,), "speculative": (False,), "speculative_decoding": (False,), "speculative_model": (), "lora": (False,),
    "lora_modules": (),
}  # fmt: skip
FIELDS = {
    "scheduled": ("scheduled", "num_scheduled_tokens", "scheduled_tokens"),
    "running": ("running", "running_ids"),
    "waiting": ("waiting", "waiting_ids"),
    "blocks_free": ("blocks_free", "kv_blocks_free", "free_blocks", "num_free_blocks"),
    "preempted": ("preempted", "preempted_ids", "preempted_req_ids"),
}
ENDED = ("finished", "finished_ids", "finished_req_ids")
ARRIVAL = {
    "key": ("id", "request", "request_id", "req_id"),
    "prompt": ("prompt_tokens", "num_prompt_tokens", "prompt", "prompt_token_ids"),
    "max_tokens": ("max_tokens", "max_output_tokens"),
    "priority": ("priority",),
    "output_tokens": ("output_tokens", "stop_after", "true_output_tokens", "num_output_tokens"),
    "content": ("content", "block_keys", "block_hashes"),
    "ids": ("prompt_token_ids", "token_ids"),
    "shared": ("shared_prefix_tokens", "prefix_tokens", "group_prefix_tokens"),
    "group": ("group", "prefix_group", "prefix_id"),
}


Chains = dict[tuple[int, tuple[int, ...]], int]  # (the blocks before, a block's token ids): a number of both


class Arrival(msgspec.Struct, frozen=True):
    """``output_tokens``: where it will end, if the trace says so; ``content``: identities of its first full blocks."""

    key: Any
    prompt_tokens: int
    max_tokens: int
    priority: int
    output_tokens: int | None
    content: list[Any]
    aborted: bool


class Call(msgspec.Struct, frozen=True):
    """One schedule(): what came before it and what it decided. ``present``: who runs or waits after it, if recorded."""

    arrivals: list[Arrival]
    decisions: dict[str, Any]
    present: frozenset[str] | None
    ended: frozenset[str]

    def gone(self, name: str) -> bool:
        """Whether a request (its id as a string) had ended before this call."""
        return name in self.ended or (self.present is not None and name not in self.present)


def read_header(header: Any) -> tuple[EngineLimits, int]:
    """The engine's limits, and how many first tokens all prompts share.

    Raises:
        BadInputError: the engine does what the model does not, or the header lacks the limits that decide the most.
        ConfigError: a limit has the wrong type or value.
        ValueError: it is not a header.
    """
    if not isinstance(header, Mapping):
        raise ValueError("the header is not a JSON object")
    fields: dict[str, Any] = {}
    _flatten(header, fields)
    for name, harmless in UNMODELLED.items():
        if fields.get(name) and fields[name] not in harmless:
            raise BadInputError(
                f"The trace's engine has {name} = {fields[name]!r}, which the scheduler model does not know."
            )
    limits = {NAMES.get(k, k): v for k, v in fields.items() if v is not None and NAMES.get(k, k) not in fields}
    limits |= {k: v for k, v in fields.items() if v is not None and k not in NAMES}
    for name, other in NAMES.items():
        # An override decides; vLLM reports both.
        if name.startswith(("num_gpu_blocks_", "max_num_scheduled", "max_num_active")) and fields.get(name):
            limits[other] = fields[name]
    if "shared_prefix_tokens" in fields:  # of no use to an engine that caches no prefixes
        limits = {"enable_prefix_caching": True, **limits}
    missing = [name for name in ("max_num_seqs", "max_num_batched_tokens", "num_gpu_blocks") if name not in limits]
    if missing:
        raise BadInputError(f"The trace's first line is not its engine's header: it lacks {', '.join(missing)}.")
    return limits_from(limits), _whole(fields.get("shared_prefix_tokens") or 0, "shared_prefix_tokens")


def _flatten(header: Mapping[str, Any], into: dict[str, Any]) -> None:
    for name, value in header.items():
        if isinstance(value, Mapping) and name in GROUPS:
            _flatten(value, into)
        else:
            into[name] = value


def read_call(row: Any, limits: EngineLimits, shared_tokens: int, chains: Chains) -> Call:
    """One row; ``chains`` is the trace's own, empty at first.

    Raises:
        ValueError: it is not one.
    """
    if not isinstance(row, Mapping):
        raise ValueError("a call is not a JSON object")
    decisions = {field: row[name] for field, names in FIELDS.items() for name in names if row.get(name) is not None}
    decisions["scheduled"] = _scheduled(decisions.get("scheduled"))
    if "blocks_free" in decisions:
        decisions["blocks_free"] = _whole(decisions["blocks_free"], "blocks_free")
    for field in ("running", "waiting", "preempted"):
        if field in decisions and not isinstance(decisions[field], int):
            decisions[field] = _ids(decisions[field], field)
    running, waiting = decisions.get("running"), decisions.get("waiting")
    present = None
    if isinstance(running, list) and isinstance(waiting, list):
        present = frozenset(map(str, running + waiting))
    ended: list[Any] = next((row[name] for name in ENDED if isinstance(row.get(name), list)), [])
    arrivals = row.get("arrivals") or []
    if not isinstance(arrivals, list):
        raise ValueError("arrivals is not a list")
    read = [_arrival(a, limits, shared_tokens, chains) for a in arrivals]
    return Call(read, decisions, present, frozenset(map(str, _ids(ended, "finished"))))


def _scheduled(value: Any) -> dict[Any, int]:
    if isinstance(value, Mapping):
        value = list(value.items())
    if not isinstance(value, list) or any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in value):
        raise ValueError("scheduled must be pairs of a request and its tokens, or an object of these")
    _ids([key for key, _ in value], "scheduled")
    return {key: _whole(tokens, "scheduled tokens", 1) for key, tokens in value}


def _whole(value: Any, what: str, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or value < least:
        raise ValueError(f"{what} is {value!r}, not a whole number of at least {least}")
    return int(value)


def _ids(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list) or any(isinstance(key, bool) or not isinstance(key, int | str) for key in value):
        raise ValueError(f"{what} is not a list of requests (numbers or names)")
    return value


def _arrival(row: Any, limits: EngineLimits, shared_tokens: int, chains: Chains) -> Arrival:
    named: dict[str, Any] = {}
    if isinstance(row, Mapping):
        _name(row, named)
    elif isinstance(row, list):
        named = dict(zip(("key", "prompt", "max_tokens", "priority"), row, strict=False))
        for extra in row[4:]:
            if isinstance(extra, Mapping):
                _name(extra, named)
            elif isinstance(extra, list):
                named["content"] = extra
            elif not isinstance(extra, str):
                named.setdefault("output_tokens", extra)
    missing = [name for name in ("key", "prompt", "max_tokens") if named.get(name) is None]
    if missing:
        raise ValueError(f"an arrival lacks {', '.join(missing)}")
    _ids([named["key"]], "an arrival's id")
    prompt, output, priority = named["prompt"], named.get("output_tokens"), named.get("priority") or 0
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise ValueError(f"an arrival's priority is {priority!r}, not a whole number")
    tokens = _whole(len(prompt) if isinstance(prompt, list) else prompt, "an arrival's prompt", 1)
    max_tokens = _whole(named["max_tokens"], "an arrival's max_tokens", 1)
    return Arrival(
        key=named["key"],
        prompt_tokens=tokens,
        max_tokens=max_tokens,
        priority=priority,
        output_tokens=None if output is None else _whole(output, "an arrival's output_tokens"),
        content=_content(named, tokens, limits.block_size, shared_tokens, chains),
        aborted="output_tokens" in named and output is None,
    )


def _name(row: Mapping[str, Any], named: dict[str, Any]) -> None:
    for field, names in ARRIVAL.items():
        for name in names:
            if name in row:
                named[field] = row[name]
                break


def _content(named: Mapping[str, Any], tokens: int, block_size: int, shared_tokens: int, chains: Chains) -> list[Any]:
    """Identities of the first full blocks, equal where all up to a block's end is equal."""
    content, ids = named.get("content"), named.get("ids")
    if isinstance(named["prompt"], list):
        ids = named["prompt"]
    elif content is not None and len(content) == tokens and tokens > (tokens + int(named["max_tokens"])) // block_size:
        ids = content  # more than there are blocks
    if ids is not None:
        return _blocks(ids, block_size, chains)
    if content is None:
        shared = int(named.get("shared") or shared_tokens)
        return [("shared", str(named.get("group")), i) for i in range(min(shared, tokens) // block_size)]
    return [tuple(key) if isinstance(key, list) else key for key in content]


def _blocks(ids: Sequence[int], block_size: int, chains: Chains) -> list[Any]:
    found, before = [], -1
    for end in range(block_size, len(ids) + 1, block_size):
        before = chains.setdefault((before, tuple(ids[end - block_size : end])), len(chains))
        found.append(("tokens", before))
    return found
