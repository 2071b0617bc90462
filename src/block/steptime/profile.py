"""A step-time profile: the few numbers that say how fast one (GPU, model, parallelism) is, as JSON."""

import os
from array import array
from itertools import pairwise
from math import inf
from pathlib import Path

import msgspec

from block.engine.limits import EngineLimits
from block.errors import BadInputError, ConfigError, UnknownNameError
from block.steptime.curve import StepCurve

SHIPPED = Path(__file__).parent / "profiles"
GRAPH_TOKENS_MOST = 512  # vLLM captures CUDA graphs of up to min(512, 2 x max_num_seqs) tokens

KNOT_MOST = 10_000_000  # requests or tokens of a step

Knots = list[tuple[float, float]]


class RegimeError(msgspec.Struct, frozen=True, kw_only=True):
    """How far a profile is from measured steps of one kind: of the sum, and of one window or step (medians, absolute)."""

    regime: str
    samples: int
    bias_fraction: float
    error_p50_fraction: float
    error_p90_fraction: float


class StepTimeProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds per step of one (GPU, model, tensor parallelism); see ``curve.StepCurve`` for the formula.

    ``decode_knots``: (decode requests, seconds), ``mixed_knots``: (tokens of a step with prefill, seconds), both linear
    between knots and beyond the last two. ``kv_mixed_s``: seconds a context token in steps with prefill
    [kv_s]. ``caching_s``: what every step takes longer with prefix caching on, ``eager_s``: a step with prefill that is
    too large for a captured CUDA graph. ``heat_s``: seconds per prefill token and token
    prefilled within the last ``heat_memory_s`` (seconds, e-folding). ``tile_s``: seconds per token of the mean context, of which
    fewer than ``tile_requests`` requests share one. ``shared_s``: seconds spared per token of context that another request has too.
    ``input_s``: from the API's arrival to the scheduler's queue; ``output_s`` + ``output_request_s`` per request of the
    batch: from a step's results to the caller.
    """

    name: str
    gpu: str
    model: str
    tensor_parallel: int = 1
    source: str = ""
    licence: str = ""
    decode_knots: Knots
    mixed_knots: Knots
    kv_s: float
    kv_mixed_s: float | None = None
    attention_s: float = 0.0
    chunk_s: float = 0.0
    request_s: float = 0.0
    caching_s: float = 0.0
    eager_s: float = 0.0
    heat_s: float = 0.0
    heat_memory_s: float = 1.0
    tile_s: float = 0.0
    tile_requests: float = 1.0
    shared_s: float = 0.0
    launch_decode_s: float = 0.0
    launch_graph_s: float = 0.0
    launch_eager_s: float = 0.0
    launch_request_s: float = 0.0
    head_s: float = 0.0
    input_s: float = 0.0
    output_s: float = 0.0
    output_request_s: float = 0.0
    errors: list[RegimeError] = []

    def curve(self, scale: float = 1.0, limits: EngineLimits | None = None) -> StepCurve:
        """The compiled form; ``scale`` multiplies all times (a slower GPU, an online correction).

        ``limits``: the engine's, which decide the CUDA graphs captured and whether ``caching_s`` counts; vLLM's
        defaults if not given.
        """
        limits = limits or EngineLimits()
        more_s = self.caching_s if limits.enable_prefix_caching else 0.0
        mixed = _dense(self.mixed_knots, scale, more_s)
        for tokens in range(graph_tokens(limits) + 1, len(mixed)):
            mixed[tokens] += self.eager_s * scale
        return StepCurve(
            _dense(self.decode_knots, scale, more_s), mixed, self.kv_s * scale,
            (self.kv_s if self.kv_mixed_s is None else self.kv_mixed_s) * scale,
            self.attention_s * scale, self.chunk_s * scale, self.request_s * scale, self.launch_decode_s * scale,
            self.launch_graph_s * scale, self.launch_eager_s * scale, self.launch_request_s * scale, self.head_s * scale,
            graph_tokens(limits), self.heat_s * scale, self.heat_memory_s,
            self.tile_s * scale, self.tile_requests, self.shared_s * scale,
        )  # fmt: skip


def graph_tokens(limits: EngineLimits) -> int:
    """The most tokens of a step that vLLM runs from captured CUDA graphs (its default ``max_cudagraph_capture_size``)."""
    return min(GRAPH_TOKENS_MOST, 2 * limits.max_num_seqs)


def _dense(knots: Knots, scale: float, more_s: float) -> "array[float]":
    import numpy as np

    x, y = np.array(knots, dtype=float).T
    if x[0] > 0:
        x, y = np.concatenate(([0.0], x)), np.concatenate(([y[0]], y))
    slope = (y[-1] - y[-2]) / (x[-1] - x[-2]) if len(x) > 1 else 0.0
    grid = np.arange(0, int(x[-1]) + 2)
    dense = np.where(grid <= x[-1], np.interp(grid, x, y), y[-1] + slope * (grid - x[-1]))
    return array("d", ((dense + more_s) * scale).tolist())


def load_profile(name_or_path: str) -> StepTimeProfile:
    """A shipped profile by name, or one from a JSON file.

    Raises:
        UnknownNameError: neither a shipped profile nor a file.
        BadInputError: the file is not a profile.
    """
    path = SHIPPED / f"{name_or_path}.json"
    if not path.exists():
        path = Path(name_or_path)
        if not path.exists():
            raise UnknownNameError("profile", name_or_path, profile_names())
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=StepTimeProfile)
        _check(profile)
    except (msgspec.DecodeError, OSError, ValueError) as error:
        raise BadInputError(f"{path} is not a step-time profile: {error}.") from error
    return profile


def _check(profile: StepTimeProfile) -> None:
    """Raises ValueError where no engine could take such times."""
    for name in ("decode_knots", "mixed_knots"):
        knots: Knots = getattr(profile, name)
        if not knots or not knots[0][0] >= 0 or not knots[-1][0] <= KNOT_MOST or not knots[0][1] > 0:
            raise ValueError(f"{name} needs knots of 0 to {KNOT_MOST} with times above 0")
        for (x, y), (further, later) in pairwise(knots):
            if not (x < further and y <= later < inf):
                raise ValueError(f"{name} must rise, which ({further:g}, {later:g}) after ({x:g}, {y:g}) does not")
    for name, value in msgspec.structs.asdict(profile).items():
        if isinstance(value, float) and not 0 <= value < inf:
            raise ValueError(f"{name} must not be negative, as {value:g} is")
    if not profile.heat_memory_s > 0:
        raise ValueError("heat_memory_s must be above 0")


def check_writable(path: Path) -> None:
    """Make the directory of a file that is to be written, and say at once if it cannot be.

    Raises:
        ConfigError: it cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written: choose another file.")


def save_profile(profile: StepTimeProfile, path: Path) -> None:
    """Write a profile as JSON.

    Raises:
        ConfigError: it cannot be written there.
    """
    check_writable(path)
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from error


def profile_names() -> list[str]:
    """Names of the shipped profiles."""
    return sorted(p.stem for p in SHIPPED.glob("*.json"))


def profile_for(gpu: str, model: str, tensor_parallel: int = 1) -> StepTimeProfile:
    """The shipped profile of a GPU and a model.

    Raises:
        UnknownNameError: none is shipped.
    """
    for name in profile_names():
        profile = load_profile(name)
        if (profile.gpu, profile.model, profile.tensor_parallel) == (gpu, model, tensor_parallel):
            return profile
    raise UnknownNameError(
        "shipped profile", f"{model} on {gpu} with tensor parallelism {tensor_parallel}", profile_names()
    )
