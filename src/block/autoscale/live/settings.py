"""What ``block autoscale`` is told, as a strict TOML file: an unknown key is an error that lists the known ones."""

import os
import tomllib
from math import inf
from pathlib import Path
from typing import Any, Final

import msgspec

from block.autoscale.actuators.table import ACTUATORS, ActuatorSettings
from block.autoscale.controllers import Guard, controller_from, guard_for
from block.autoscale.live.membership import Register
from block.autoscale.terms import Kind
from block.core import Slo
from block.errors import BadInputError, ConfigError, UnknownNameError
from block.gateway.config import check_url
from block.simulate.config import unknown_keys

ADMIN_KEY_VARIABLE: Final = "BLOCK_ADMIN_KEY"


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The gateways to observe and how they learn of instances: ``admin`` (through their administration), ``file`` (``file`` is
    written, they watch it) or ``none`` (they discover them themselves). The admin key is better in ``BLOCK_ADMIN_KEY``."""

    urls: list[str] = []
    admin_key: str = ""
    admin_key_file: str | None = None
    register: Register = "admin"
    file: str | None = None
    timeout_s: float = 2.0

    def __post_init__(self) -> None:
        for url in self.urls:
            check_url("gateway URL", url)
        if (self.register == "file") != (self.file is not None):
            raise ConfigError("gateways.file goes with gateways.register = 'file'.")
        if self.file is not None and not self.file.endswith(".toml"):
            raise ConfigError(f"gateways.file must end with .toml, not {self.file!r}.")
        if not 0 < self.timeout_s < inf:
            raise ConfigError(f"gateways.timeout_s must be above 0 and finite, not {self.timeout_s}.")


class AutoscaleSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole of it. ``guard`` and ``options`` change single values of what the controller's own guard and defaults are.

    ``act_within_s``: an order to the actuator that takes longer is given up and given again. ``lock``: a file that only one
    autoscaler can hold; the others stand by ("": none; by default a Lease with the
    actuator kubernetes, else a file per name in the machine's folder for temporary files).
    """

    name: str = "auto"
    controller: str = "replay"
    options: dict[str, float] = {}
    interval_s: float = 5.0
    act_within_s: float = 60.0
    unmet_after_s: float = 600.0
    slo: Slo | None = None
    guard: dict[str, float] = {}
    kinds: list[Kind] = msgspec.field(default_factory=lambda: [Kind()])
    gateways: GatewaySettings = GatewaySettings()
    actuator: ActuatorSettings
    host: str = "127.0.0.1"
    port: int = 8300
    lock: str | None = None
    decisions_kept: int = 512

    def __post_init__(self) -> None:
        if not self.name or not all(c.isascii() and (c.isalnum() or c == "-") for c in self.name):
            raise ConfigError(f"name must be letters, digits and hyphens, not {self.name!r}.")
        for field in ("interval_s", "act_within_s", "unmet_after_s"):
            if not 0 < getattr(self, field) < inf:
                raise ConfigError(f"{field} must be above 0 and finite, not {getattr(self, field)}.")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be 0 to 65535, not {self.port}.")
        if self.decisions_kept < 1:
            raise ConfigError(f"decisions_kept must be at least 1, not {self.decisions_kept}.")
        _check_kinds(self.kinds)
        for target, value in msgspec.structs.asdict(self.slo or Slo()).items():
            if value is not None and not value > 0:
                raise ConfigError(f"slo.{target} must be above 0, not {value}.")
        if not self.gateways.urls:
            raise ConfigError("gateways.urls must name the gateways to observe.")
        controller_from(self.controller, self.kinds, self.slo, **self.options)
        most = sum(kind.most for kind in self.kinds)
        if self.guarded.least > most:
            raise ConfigError(f"guard.least is {self.guarded.least}, but all kinds together have at most {most}.")

    @property
    def guarded(self) -> Guard:
        """The guard: what suits the controller, changed by what is given here.

        Raises:
            ConfigError: a key that it does not have, or a value that it cannot take.
        """
        known = msgspec.to_builtins(guard_for(self.controller))
        unknown = sorted(set(self.guard) - set(known))
        if unknown:
            raise ConfigError(f"Unknown in guard: {', '.join(unknown)} (known: {', '.join(known)}).")
        try:
            return msgspec.convert({**known, **self.guard}, Guard, strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(f"guard: {error}.") from error


def _check_kinds(kinds: list[Kind]) -> None:
    names = [kind.name for kind in kinds]
    if not all(names) or not names or len(set(names)) < len(names):
        raise ConfigError("There must be at least one kind, each with a name, and no two of one name.")
    for kind in kinds:
        if not 0 <= kind.least <= kind.most:
            raise ConfigError(f"The kind {kind.name} needs 0 <= least <= most.")
        if not (0 < kind.price < inf and 0 <= kind.cold_start_s < inf):
            raise ConfigError(
                f"The kind {kind.name} needs a price above 0 and a cold_start_s of at least 0, both finite."
            )


def load_settings(path: Path) -> AutoscaleSettings:
    """Read a TOML file; the admin key may come from ``BLOCK_ADMIN_KEY`` or a file.

    Raises:
        BadInputError: there is no such file, it cannot be read, or it is not TOML.
        ConfigError: an unknown key or a wrong value.
    """
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInputError(f"There is no file {path}.") from error
    except OSError as error:
        raise BadInputError(f"{path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path} is not TOML: {error}.") from error
    return settings_from(fields, str(path))


def settings_from(fields: dict[str, Any], where: str) -> AutoscaleSettings:
    """Checked settings from the fields of a file.

    Raises:
        ConfigError: an unknown key or a wrong value.
    """
    actuator = fields.get("actuator")
    if not isinstance(actuator, dict) or "type" not in actuator:
        raise ConfigError(f"{where}: [actuator] needs a type: {', '.join(ACTUATORS)}.")
    if actuator["type"] not in ACTUATORS:
        raise UnknownNameError("actuator", str(actuator["type"]), ACTUATORS)
    others = {name: value for name, value in fields.items() if name != "actuator"}
    unknown = [
        *unknown_keys(others, AutoscaleSettings, ""),
        *unknown_keys({k: v for k, v in actuator.items() if k != "type"}, ACTUATORS[actuator["type"]][0], ".actuator"),
    ]
    if unknown:
        raise ConfigError(f"{where}: " + " ".join(unknown))
    try:
        return msgspec.convert(fields, AutoscaleSettings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}.") from error


def admin_key(settings: GatewaySettings) -> str:
    """The gateways' admin key: from the settings, a file, or ``BLOCK_ADMIN_KEY``.

    Raises:
        ConfigError: there are gateways and no key, it cannot be sent, or the file cannot be read.
    """
    if settings.admin_key_file is not None:
        try:
            key = Path(settings.admin_key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"The admin key file {settings.admin_key_file} cannot be read: {error}.") from error
        if not key:
            raise ConfigError(f"The admin key file {settings.admin_key_file} is empty.")
    else:
        key = settings.admin_key or os.environ.get(ADMIN_KEY_VARIABLE, "")
    if settings.urls and not key:
        raise ConfigError(f"The gateways' admin key is missing: set {ADMIN_KEY_VARIABLE} or gateways.admin_key_file.")
    if not key.isprintable():
        raise ConfigError("The gateways' admin key must be one line without control characters.")
    return key
