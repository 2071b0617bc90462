"""The limits and flags of one engine instance, with vLLM's names and defaults."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from block.errors import ConfigError


class EngineLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What decides an engine's schedule besides the requests. Names are vLLM's.

    ``num_gpu_blocks`` counts vLLM's null block, so one less is usable (``blocks_usable``).
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    num_gpu_blocks: int = 4096
    block_size: int = 16
    max_model_len: int = 8192
    async_scheduling: bool = True
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = False
    policy: Literal["fcfs", "priority"] = "fcfs"
    long_prefill_token_threshold: int = 0
    watermark: float = 0.0
    scheduler_reserve_full_isl: bool = True

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "max_model_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.num_gpu_blocks < 2:
            raise ConfigError(f"num_gpu_blocks must be at least 2, not {self.num_gpu_blocks}.")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must not be below max_num_seqs "
                f"({self.max_num_seqs}): every running request needs a token of each step."
            )
        if not 0.0 <= self.watermark < 1.0:
            raise ConfigError(f"watermark must be in [0, 1), not {self.watermark}.")

    @property
    def blocks_usable(self) -> int:
        return self.num_gpu_blocks - 1

    @property
    def watermark_blocks(self) -> int:
        return int(self.watermark * self.num_gpu_blocks)


def limits_from(fields: Mapping[str, Any]) -> EngineLimits:
    """Limits from a run's ``engine.json`` or a trace's header; fields that are not limits are ignored.

    Raises:
        ConfigError: a limit has the wrong type or value.
    """
    aliases = {"prefix_caching": "enable_prefix_caching", "chunked_prefill": "enable_chunked_prefill"}
    known = {f.name for f in msgspec.structs.fields(EngineLimits)}
    found = {aliases.get(k, k): v for k, v in fields.items() if aliases.get(k, k) in known}
    try:
        return msgspec.convert(found, EngineLimits)
    except msgspec.ValidationError as error:
        raise ConfigError(f"Engine limits: {error}.") from error
