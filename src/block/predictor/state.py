"""What a predictor knows of its engine: the newest snapshot, the step times, and from both the answer to a what-if."""

import struct
import time
from collections.abc import Callable
from typing import Annotated, Any, Protocol

import msgspec

from block.core import Prediction
from block.errors import ClientError
from block.predict.snapshot import EngineSnapshot, decode
from block.predict.whatif import Mirror, Oracle
from block.predictor.lengths import LengthHistory, scenarios_of
from block.steptime.profile import StepTimeProfile

SCALE_KEPT_WITHIN = 0.003  # a smaller correction is not worth making the step times anew
_LENGTH = struct.Struct("<I")
_Tokens = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ``POST /predict`` body.

    The output's length is ``output_tokens``, or a distribution told by ``quantiles`` ((q, tokens) pairs, rising), or, where
    neither is given, what the engine's history says. ``harm``: also say what it does to the others.
    """

    prompt_tokens: _Tokens
    max_tokens: _Tokens | None = None
    output_tokens: _Tokens | None = None
    quantiles: (
        Annotated[
            list[tuple[Annotated[float, msgspec.Meta(ge=0, le=1)], _Tokens]], msgspec.Meta(min_length=1, max_length=64)
        ]
        | None
    ) = None
    priority: Annotated[int, msgspec.Meta(ge=-(1 << 30), le=1 << 30)] = 0
    harm: bool = False


class Calibration(Protocol):
    """Corrects the profile while the engine runs. ``scale`` multiplies all step times, a known speed included."""

    scale: float

    def observe(self, snapshot: EngineSnapshot) -> None:
        """Learn from a snapshot's step log; the same step may come several times."""
        ...


class InstanceState:
    """One engine as its predictor sees it. ``take`` is its only change; ``on_frame`` is called after each.

    ``speed`` 0.5: the engine is known to be half as fast as the profile. Nothing here waits or reads a socket.
    """

    def __init__(
        self, profile: StepTimeProfile, *, speed: float = 1.0, stale_after_s: float = 3.0,
        calibration: Calibration | None = None, wall_s: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.profile = profile
        self.lengths = LengthHistory()
        self.snapshot: EngineSnapshot | None = None
        self.framed = b""
        """The newest snapshot as the stream sends it: u32 length, bytes."""
        self.frames = 0
        self.on_frame: list[Callable[[], None]] = []
        self._speed, self._stale_after_s, self._wall_s = speed, stale_after_s, wall_s
        self._calibration = calibration
        self._oracle = Oracle()
        self._scale = 0.0
        self._mirror: Mirror | None = None
        self._loaded = False

    @property
    def scale(self) -> float:
        """What multiplies the profile's step times."""
        return 1.0 / self._speed if self._calibration is None else self._calibration.scale

    def take(self, frame: bytes) -> None:
        """The engine's newest snapshot.

        Raises:
            BadInputError: it is none.
        """
        snapshot = self.snapshot = decode(frame)
        self._loaded = False
        self.framed = _LENGTH.pack(len(frame)) + frame
        self.frames += 1
        self.lengths.watch(snapshot)
        if self._calibration is not None:
            self._calibration.observe(snapshot)
        for tell in self.on_frame:
            tell()

    def staleness(self) -> str | None:
        """Why the newest snapshot cannot be used, in a sentence; ``None``: it can. An idle engine's does not age."""
        snapshot = self.snapshot
        if snapshot is None:
            return "the engine has published nothing yet"
        age_s = self.age_s()
        if snapshot.running + snapshot.waiting > 0 and age_s > self._stale_after_s:
            return f"the engine has requests but has stood still for {age_s:.1f} s"
        return None

    def age_s(self) -> float:
        """Seconds since the newest snapshot was taken."""
        return 0.0 if self.snapshot is None else max(self._wall_s() - self.snapshot.taken_s, 0.0)

    def predict(self, question: Question) -> Prediction:
        """The what-if of a request that arrives now.

        Raises:
            ClientError: it does not fit into the context, or its quantiles do not rise (400); no usable snapshot (503).
        """
        if (why := self.staleness()) is not None:
            raise unavailable(why)
        snapshot = self.snapshot
        assert snapshot is not None
        room = snapshot.limits.max_model_len - question.prompt_tokens
        if room < 1:
            raise ClientError(
                400, f"prompt_tokens ({question.prompt_tokens}) must be below the engine's context of "
                f"{snapshot.limits.max_model_len} tokens.", param="prompt_tokens",
            )  # fmt: skip
        bound = min(question.max_tokens or room, room)
        return self._oracle.predict_all(
            [self._current_mirror(snapshot)], prompt_tokens=question.prompt_tokens, max_tokens=bound,
            output_tokens=self._output(question, bound), now_s=self._wall_s(), priority=question.priority,
            harm=question.harm,
        )[0]  # fmt: skip

    def _output(self, question: Question, bound: int) -> int | list[int]:
        if question.output_tokens is not None:
            return min(question.output_tokens, bound)
        if question.quantiles is None:
            return self.lengths.scenarios(bound)
        try:
            return scenarios_of(question.quantiles, bound)
        except ValueError as error:
            raise ClientError(400, f"{error}.", param="quantiles") from error

    def _current_mirror(self, snapshot: EngineSnapshot) -> Mirror:
        if self._mirror is None or abs(self.scale / self._scale - 1.0) > SCALE_KEPT_WITHIN:
            self._scale = self.scale
            profile = self.profile
            self._mirror = Mirror(profile.curve(self._scale, snapshot.limits), profile.input_s, profile.output_s)
            self._loaded = False
        if not self._loaded:
            self._mirror.load(snapshot, self.lengths.totals(snapshot))
            self._mirror.output_s = self.profile.output_s + self.profile.output_request_s * (snapshot.running + 1)
            self._loaded = True
        return self._mirror


def unavailable(why: str) -> ClientError:
    """The error of a predictor that cannot see its engine."""
    return ClientError(503, f"No prediction: {why}.", kind="ServiceUnavailableError")


def describe(snapshot: EngineSnapshot, age_s: float) -> dict[str, Any]:
    """A snapshot for people, as JSON can hold it."""
    from block.predict import snapshot as s

    names = ("prompt", "max_tokens", "computed", "output", "placeholders", "batch_1", "batch_2", "stale", "blocks",
             "priority", "flags", "preemptions")  # fmt: skip
    header = {name: snapshot.header[name].item() for name in snapshot.header.dtype.names}
    requests = [
        {"key": f"{key:016x}", "arrived_s": arrived, "state": "running" if i < snapshot.running else "waiting"}
        | dict(zip(names, row, strict=True))
        for i, (key, arrived, row) in enumerate(
            zip(snapshot.keys.tolist(), snapshot.arrived.tolist(), snapshot.requests.T.tolist(), strict=True)
        )
    ]
    steps = [dict(zip(s.STEP.names or (), row, strict=True)) for row in snapshot.steps.tolist()]
    return {
        "age_s": age_s, "limits": snapshot.limits, "header": header, "requests": requests, "steps": steps,
        "cached_blocks": len(snapshot.cached_blocks), "prefix": _prefix(snapshot),
    }  # fmt: skip


def _prefix(snapshot: EngineSnapshot) -> dict[str, Any] | None:
    use = snapshot.prefix
    if use is None:
        return None
    counters = {"queried_tokens": use.queried_tokens, "hit_tokens": use.hit_tokens, "blocks_cached": use.blocks_cached}
    return counters | {"hits": use.hits.tolist()}
