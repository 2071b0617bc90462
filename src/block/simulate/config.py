"""What one simulated run is, as a strict TOML file: unknown keys are errors that list the known ones."""

import tomllib
import types
import typing
from pathlib import Path
from typing import Any

import msgspec

from block.core import Slo
from block.engine.limits import EngineLimits
from block.errors import BadInputError, ConfigError
from block.steptime.profile import StepTimeProfile
from block.workload.offer import WorkloadConfig

INSTANCES_MAX = 100_000
INTERVAL_MIN_S = 1e-3


class InstanceGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``count`` equal instances. ``profile``: a shipped name, a JSON file or an inline table; ``speed`` 0.5 is half as fast."""

    count: int = 1
    profile: str | StepTimeProfile = "h200-llama3.1-8b"
    speed: float = 1.0
    limits: EngineLimits = EngineLimits()

    def __post_init__(self) -> None:
        if self.count < 1 or not self.speed > 0:
            raise ConfigError("An instance group needs a count of at least 1 and a speed above 0.")


class GatewayModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the gateways see and reach the instances.

    ``snapshot_interval_s`` 0: every decision sees the instances as they are. Otherwise each instance publishes its state so
    often, and a gateway has it ``snapshot_delay_s`` + up to ``snapshot_jitter_s`` later. ``in_flight_accounting``: a gateway
    adds what it has itself dispatched since. ``decision_s``: time of the gateway per request, one after the other;
    ``network_s``: one way between gateway and instance.
    """

    count: int = 1
    snapshot_interval_s: float = 0.0
    snapshot_delay_s: float = 0.0
    snapshot_jitter_s: float = 0.0
    in_flight_accounting: bool = True
    decision_s: float = 0.0
    network_s: float = 0.0
    horizon_s: float = 600.0

    def __post_init__(self) -> None:
        seconds = (
            self.snapshot_interval_s,
            self.snapshot_delay_s,
            self.snapshot_jitter_s,
            self.decision_s,
            self.network_s,
        )
        if self.count < 1 or min(seconds) < 0 or not self.horizon_s > 0:
            raise ConfigError("Gateways need a count of at least 1, no negative times and a horizon above 0.")
        if 0 < self.snapshot_interval_s < INTERVAL_MIN_S:
            raise ConfigError(
                f"snapshot_interval_s must be 0 (every decision sees the truth) or at least {INTERVAL_MIN_S:g}, "
                f"not {self.snapshot_interval_s:g}."
            )


class Failure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Instance number ``instance`` (from 0) dies at ``at_s`` and is back, empty, ``for_s`` later.

    The gateways notice after ``detection_s``; until then they are refused when they choose it.
    """

    instance: int
    at_s: float
    for_s: float
    detection_s: float = 1.0

    def __post_init__(self) -> None:
        if not (self.at_s >= 0 and self.for_s > 0 and self.detection_s >= 0):
            raise ConfigError("A failure needs at_s and detection_s of at least 0 and for_s above 0.")


class LengthModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the gateways know of output lengths: an estimator by name and its options (``noise`` of the oracle, for example)."""

    estimator: str = "oracle"
    options: dict[str, float | bool | int] = {}


class SimulationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run. ``policy`` is a name or a word with options (``block-k:k=4``)."""

    name: str = ""
    seed: int = 1
    policy: str = "block"
    warmup_fraction: float = 0.1
    workload: WorkloadConfig = WorkloadConfig()
    instances: list[InstanceGroup] = msgspec.field(default_factory=lambda: [InstanceGroup(count=4)])
    gateways: GatewayModel = GatewayModel()
    lengths: LengthModel = LengthModel()
    failures: list[Failure] = []
    slo: Slo | None = None

    @property
    def instance_count(self) -> int:
        return sum(group.count for group in self.instances)

    def __post_init__(self) -> None:
        if not self.instances:
            raise ConfigError("A cluster needs at least one [[instances]] group.")
        if self.seed < 0:
            raise ConfigError(f"A seed must not be negative, not {self.seed}.")
        if self.instance_count > INSTANCES_MAX:
            raise ConfigError(f"A cluster can have {INSTANCES_MAX:,} instances at most, not {self.instance_count:,}.")
        if not 0 <= self.warmup_fraction < 1:
            raise ConfigError(f"warmup_fraction must be in [0, 1), not {self.warmup_fraction}.")
        if self.slo is not None and any(
            not target > 0 for target in msgspec.structs.astuple(self.slo) if target is not None
        ):
            raise ConfigError("The targets in [slo] are seconds above 0.")
        wrong = [f.instance for f in self.failures if not 0 <= f.instance < self.instance_count]
        if wrong:
            raise ConfigError(f"There is no instance {wrong[0]}: they are numbered 0 to {self.instance_count - 1}.")


def load_config(path: Path) -> SimulationConfig:
    """Read a TOML file; a relative ``trace`` or profile file is looked for beside it.

    Raises:
        BadInputError: the file does not exist or is not TOML.
        ConfigError: an unknown key (all of them are listed, with the known ones) or a wrong value.
    """
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInputError(f"There is no file {path}.") from error
    except OSError as error:
        raise BadInputError(f"{path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path} is not TOML: {error}.") from error
    return _beside(_converted(fields, str(path)), path.parent)


def _converted(fields: dict[str, Any], where: str) -> SimulationConfig:
    unknown = list(unknown_keys(fields, SimulationConfig, ""))
    if unknown:
        raise ConfigError(f"{where}: " + " ".join(unknown))
    try:
        return msgspec.convert(fields, SimulationConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}.") from error


def _beside(config: SimulationConfig, folder: Path) -> SimulationConfig:
    """Paths that are meant relative to the configuration's folder."""
    trace = config.workload.trace
    if trace is not None and not Path(trace).is_absolute() and (folder / trace).exists():
        workload = msgspec.structs.replace(config.workload, trace=str(folder / trace))
        config = msgspec.structs.replace(config, workload=workload)
    groups = [
        msgspec.structs.replace(group, profile=str(folder / group.profile))
        if isinstance(group.profile, str) and group.profile.endswith(".json") and (folder / group.profile).exists()
        else group
        for group in config.instances
    ]
    return msgspec.structs.replace(config, instances=groups)


def unknown_keys(fields: Any, kind: Any, at: str) -> typing.Iterator[str]:
    """One sentence for each table that has keys which its struct does not."""
    kind = _struct_in(kind)
    if isinstance(fields, list):
        for number, one in enumerate(fields):
            yield from unknown_keys(one, kind, f"{at}[{number}]")
        return
    if not isinstance(fields, dict) or kind is None:
        return
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(fields) - set(hints))
    if unknown:
        place = f"in {at.lstrip('.')}" if at else "at the top"
        yield f"Unknown {place}: {', '.join(unknown)} (known: {', '.join(hints)})."
    for name, value in fields.items():
        if name in hints:
            yield from unknown_keys(value, hints[name], f"{at}.{name}")


def _struct_in(kind: Any) -> type[msgspec.Struct] | None:
    """The struct inside ``list[...]`` or a union, if there is one."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return kind
    if typing.get_origin(kind) in (list, typing.Union, types.UnionType):
        for part in typing.get_args(kind):
            found = _struct_in(part)
            if found is not None:
                return found
    return None
