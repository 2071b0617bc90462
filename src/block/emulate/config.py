"""Every setting of an emulated engine."""

import msgspec

from block.engine.limits import EngineLimits
from block.errors import ConfigError


class EmulateConfig(msgspec.Struct, frozen=True, kw_only=True):
    """``speed`` 0.5: every step takes twice as long (what the API adds stays). ``name``: of the snapshots in shared
    memory, ``None`` for none.

    ``output_lengths``: see ``emulate.lengths``. ``fail_rate``: fraction of requests that get a 500.
    """

    limits: EngineLimits
    profile: str
    speed: float = 1.0
    models: tuple[str, ...] = ("emulated",)
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    seed: int = 0
    output_lengths: str = "sharegpt"
    api_key: str | None = None
    startup_s: float = 0.0
    snapshot_interval_s: float = 0.002
    publish_cached_blocks: bool = False
    fail_rate: float = 0.0
    allow_faults: bool = False
    prompt_tokens_details: bool = False

    def __post_init__(self) -> None:
        if not self.speed > 0:
            raise ConfigError(f"speed must be greater than 0, not {self.speed}.")
        if not 0 <= self.fail_rate <= 1:
            raise ConfigError(f"fail_rate must be between 0 and 1, not {self.fail_rate}.")
        if min(self.startup_s, self.snapshot_interval_s) < 0:
            raise ConfigError("startup_s and snapshot_interval_s must not be negative.")
        if not self.models or not all(self.models):
            raise ConfigError("the served model needs a name.")
        limits = self.limits
        if not limits.enable_chunked_prefill and limits.max_num_batched_tokens < limits.max_model_len:
            raise ConfigError(
                f"without chunked prefill max_num_batched_tokens ({limits.max_num_batched_tokens}) must not be below "
                f"max_model_len ({limits.max_model_len}): a longer prompt could never be scheduled."
            )
