"""A step-time profile: the few numbers that say how fast one (GPU, model, parallelism) is, as JSON."""

from array import array
from pathlib import Path

import msgspec

from block.errors import BadInputError, UnknownNameError
from block.steptime.curve import StepCurve

SHIPPED = Path(__file__).parent / "profiles"


class StepTimeProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds per step of one (GPU, model, tensor parallelism); see ``curve.StepCurve`` for the formula.

    ``decode_knots``: (decode requests, seconds), ``mixed_knots``: (tokens in a step with prefill, seconds), both
    linear between knots and beyond the last two. ``input_s``: from the API's arrival to the scheduler's queue;
    ``output_s``: from a step's results to the caller.
    """

    name: str
    gpu: str
    model: str
    tensor_parallel: int = 1
    source: str = ""
    decode_knots: list[tuple[float, float]]
    mixed_knots: list[tuple[float, float]]
    kv_s: float
    kv_mixed_s: float = 0.0
    attention_s: float = 0.0
    chunk_s: float = 0.0
    decode_request_s: float = 0.0
    launch_decode_s: float = 0.0
    launch_mixed_s: float = 0.0
    launch_chunk_s: float = 0.0
    input_s: float = 0.0
    output_s: float = 0.0

    def curve(self, scale: float = 1.0) -> StepCurve:
        """The compiled form; ``scale`` multiplies all times (a slower GPU, an online correction)."""
        return StepCurve(
            _dense(self.decode_knots, scale), _dense(self.mixed_knots, scale), self.kv_s * scale, self.kv_mixed_s * scale,
            self.attention_s * scale, self.chunk_s * scale, self.decode_request_s * scale,
            self.launch_decode_s * scale, self.launch_mixed_s * scale, self.launch_chunk_s * scale,
        )  # fmt: skip


def _dense(knots: list[tuple[float, float]], scale: float) -> "array[float]":
    import numpy as np

    x, y = np.array(knots, dtype=float).T
    if x[0] > 0:
        x, y = np.concatenate(([0.0], x)), np.concatenate(([y[0]], y))
    slope = (y[-1] - y[-2]) / (x[-1] - x[-2]) if len(x) > 1 else 0.0
    grid = np.arange(0, int(x[-1]) + 2)
    dense = np.where(grid <= x[-1], np.interp(grid, x, y), y[-1] + slope * (grid - x[-1]))
    return array("d", (dense * scale).tolist())


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
        return msgspec.json.decode(path.read_bytes(), type=StepTimeProfile)
    except (msgspec.DecodeError, OSError) as error:
        raise BadInputError(f"{path} is not a step-time profile: {error}.") from error


def profile_names() -> list[str]:
    """Names of the shipped profiles."""
    return sorted(p.stem for p in SHIPPED.glob("*.json"))
