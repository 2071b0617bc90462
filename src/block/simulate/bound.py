"""How much is there to win? The same hardware as one engine: the cluster without any routing.

All instances of a configuration are poured into one: its KV blocks, batch slots and step budgets are their sums, and its
steps take as long as theirs when the load is spread evenly. Nothing is ever in the wrong place, no block is free where
nobody waits, so its capacity is what perfect balance under first come, first served would give. It is a reference, not a
strict bound: a policy that reorders requests at the gateway may pass it.
"""

import msgspec

from block.errors import ConfigError
from block.simulate.config import InstanceGroup, SimulationConfig
from block.steptime.profile import Knots, StepTimeProfile, load_profile


def pooled(config: SimulationConfig) -> SimulationConfig:
    """The configuration with its instances as one; policies do not matter any more.

    Raises:
        ConfigError: the instances are not all of one profile, speed and limits.
    """
    first, count = config.instances[0], config.instance_count
    if any((g.profile, g.speed, g.limits) != (first.profile, first.speed, first.limits) for g in config.instances):
        raise ConfigError("Only equal instances can be pooled.")
    profile = first.profile if isinstance(first.profile, StepTimeProfile) else load_profile(first.profile)
    limits = msgspec.structs.replace(
        first.limits, max_num_seqs=first.limits.max_num_seqs * count,
        max_num_batched_tokens=first.limits.max_num_batched_tokens * count,
        num_gpu_blocks=first.limits.blocks_usable * count + 1,
    )  # fmt: skip
    wide = msgspec.structs.replace(
        profile, name=f"{count} x {profile.name}", decode_knots=_widened(profile.decode_knots, count),
        mixed_knots=_widened(profile.mixed_knots, count), kv_s=profile.kv_s / count,
        attention_s=profile.attention_s / count, chunk_s=profile.chunk_s / count, request_s=profile.request_s / count,
        launch_request_s=profile.launch_request_s / count,
    )  # fmt: skip
    group = InstanceGroup(count=1, profile=wide, speed=first.speed, limits=limits)
    return msgspec.structs.replace(config, instances=[group], policy="round-robin", failures=[])


def _widened(knots: Knots, count: int) -> Knots:
    return [(at * count, seconds) for at, seconds in knots]
