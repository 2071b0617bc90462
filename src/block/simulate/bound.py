"""How much is there to win? The same hardware as one engine: the cluster without any routing.

All instances of a configuration are poured into one: its KV blocks, batch slots and step budgets are their sums, and its
steps take as long as theirs when the load is spread evenly. Nothing is ever in the wrong place, no block is free where
nobody waits, so its capacity is what perfect balance under first come, first served would give. It is a reference, not a
strict bound: a policy that reorders requests at the gateway may pass it.

`packed` is the same with the smallest requests first at the gateway: what a central queue that may reorder gives.

`work_bound_rps` is a relaxation that no policy can beat for long: the accelerator time that each request costs at least, if every
step were shared by as many others as memory and batch slots allow, all of it spread as one likes over all instances.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from block.errors import ConfigError
from block.simulate.config import InstanceGroup, LengthModel, SimulationConfig
from block.steptime.profile import Knots, StepTimeProfile, load_profile
from block.workload.offered import Offered

Floats = npt.NDArray[np.float64]


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
        kv_mixed_s=None if profile.kv_mixed_s is None else profile.kv_mixed_s / count, shared_s=profile.shared_s / count,
        tile_requests=profile.tile_requests * count, heat_s=profile.heat_s / count**2,
    )  # fmt: skip
    group = InstanceGroup(count=1, profile=wide, speed=first.speed, limits=limits)
    return msgspec.structs.replace(config, instances=[group], policy="round-robin", failures=[])


def packed(config: SimulationConfig) -> SimulationConfig:
    """`pooled`, with the true lengths known at the gateway, which keeps what has no room and lets the smallest go first.

    Raises:
        ConfigError: as `pooled`.
    """
    return msgspec.structs.replace(pooled(config), policy="block-smallest", lengths=LengthModel())


def work_bound_rps(config: SimulationConfig, offered: Sequence[Offered]) -> float:
    """Requests/s that no policy can sustain: instances (by speed) over the least accelerator seconds a request needs.

    Per request with prompt p and output o: every token passes once (p + o - 1, prefix hits and preemptions ignored), reads
    its context, and its steps are shared with as many others as fit. A step costs its fixed time, of which a request owes
    the largest of three shares: its blocks of all blocks, its slot of all slots, its tokens of the step's tokens.

    Raises:
        ConfigError: a group's step times are not told by knots that begin at 0.
    """
    prompt = np.array([one.request.prompt_tokens for one in offered], dtype=float)
    output = np.array([one.output_tokens for one in offered], dtype=float)
    return sum(group.count * group.speed / _least_s(group, prompt, output) for group in config.instances)


def _least_s(group: InstanceGroup, prompt: Floats, output: Floats) -> float:
    """Mean least seconds of one instance (at speed 1) per request."""
    profile = group.profile if isinstance(group.profile, StepTimeProfile) else load_profile(group.profile)
    limits, size = group.limits, group.limits.block_size
    fixed_s, token_s = _chord(profile.decode_knots, limits.max_num_seqs)
    mixed_s, prefill_s = _chord(profile.mixed_knots, limits.max_num_batched_tokens)
    context = output * prompt + output * (output - 1) / 2  # summed over its decode steps
    blocks = (context / size + output * (size - 1) / (2 * size)) / limits.blocks_usable  # the last one half full
    steps = max(
        float(blocks.mean()), float(output.mean()) / limits.max_num_seqs,
        float((prompt + output).mean()) / limits.max_num_batched_tokens,
    )  # fmt: skip
    head_s = 0.0 if limits.async_scheduling else profile.head_s  # a synchronous engine pays it at every step
    least = (
        steps * (min(fixed_s, mixed_s) + head_s) + profile.chunk_s + float(output.mean() - 1) * min(token_s, prefill_s)
    )
    kv_s = profile.kv_s + profile.tile_s / max(limits.max_num_seqs, profile.tile_requests)
    least += float(prompt.mean()) * prefill_s + kv_s * float(context.mean())
    return least + profile.attention_s * float((prompt * prompt / 2).mean())


def _chord(knots: Knots, most: float) -> tuple[float, float]:
    """(seconds at 0, seconds per unit) of a line that lies nowhere above the curve on [0, most]."""
    points = [(float(at), float(seconds)) for at, seconds in knots if at <= most]
    if not points or points[0][0] > 1:
        raise ConfigError("The bound needs step times that begin at 0 or 1.")
    start_at, start_s = points[0]
    slopes = [(seconds - start_s) / (at - start_at) for at, seconds in points[1:]]
    return start_s, max(min(slopes), 0.0) if slopes else 0.0


def _widened(knots: Knots, count: int) -> Knots:
    return [(at * count, seconds) for at, seconds in knots]
