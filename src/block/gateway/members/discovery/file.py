"""Instances from a file that somebody else keeps: llm-d's endpoint file, or instances as in the configuration.

llm-d's (YAML or JSON), which may say more: ``url`` instead of address and port, ``scheme``, ``predictor`` (a URL),
``predictor_port``, ``profile`` and the engine's limits. What routing does not need (namespace, labels, model, hardware, role)
is passed over::

    endpoints:
      - {name: gpu1, namespace: default, address: 10.0.0.1, port: 8000, labels: {llm-d.ai/role: decode}}

One's own (TOML, or YAML and JSON with the same keys)::

    [[instances]]
    url = "http://10.0.0.1:8000"
    predictor = "http://10.0.0.1:8200"

The file is looked at twice a second, behind links too (Kubernetes swaps a ConfigMap's link).
"""

import asyncio
import tomllib
from pathlib import Path
from typing import Any, Final

import msgspec

from block.errors import ConfigError, UserError
from block.gateway.config import GatewayConfig, InstanceConfig
from block.gateway.members.discovery import Lists, Problem
from block.gateway.wire.tls import stamp

LOOK_S: Final = 0.5
BYTES_MAX: Final = 16 << 20
_PASSED_OVER: Final = frozenset({"namespace", "labels", "annotations", "model", "hardware", "role"})
_PLACE: Final = frozenset({"address", "port", "scheme", "predictor_port"})


def watch(config: GatewayConfig) -> Lists:
    """The instances of ``discovery_file``, again whenever it changes.

    Raises:
        ConfigError: no file is named.
    """
    if config.discovery_file is None:
        raise ConfigError("service_discovery = 'file' needs discovery_file.")
    return _watch(config.discovery_file, config)


async def _watch(file: str, config: GatewayConfig) -> Lists:
    seen: object = ()
    while True:
        now = stamp(file)
        if now != seen:
            seen = now
            try:
                yield read_instances(file, config)
            except UserError as error:
                yield Problem(str(error))
        await asyncio.sleep(min(LOOK_S, config.discovery_interval_s))


def read_instances(file: str, config: GatewayConfig) -> list[InstanceConfig]:
    """The instances of a file.

    Raises:
        ConfigError: it cannot be read, or is not a list of instances.
    """
    path = Path(file)
    try:
        if path.stat().st_size > BYTES_MAX:
            raise ConfigError(f"{file} is larger than {BYTES_MAX} bytes.")
        content = _parsed(path)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # of the parsers
        raise ConfigError(f"{file} cannot be understood: {str(error).splitlines()[0]}.") from error
    if not isinstance(content, dict) or not (("endpoints" in content) ^ ("instances" in content)):
        raise ConfigError(f"{file} must hold either 'endpoints' (as llm-d's) or 'instances' (as the configuration).")
    rows = content.get("endpoints", content.get("instances"))
    if rows is None:  # a YAML key without a value
        rows = []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{file} must hold a list of instances.")
    of_llm_d = "endpoints" in content
    instances = [_instance(file, n, _as_instance(row, config) if of_llm_d else row) for n, row in enumerate(rows)]
    names = [instance.id for instance in instances]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{file} has two instances named {name!r}.")
    return instances


def _parsed(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".toml":
        return tomllib.loads(text)
    if text.lstrip()[:1] == "{":
        return msgspec.json.decode(text)
    try:
        import yaml
    except ImportError:
        raise ConfigError(
            f"{path} is YAML, which needs PyYAML (pip install pyyaml); JSON and TOML need nothing."
        ) from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        raise ValueError(f"not YAML{f' (line {where.line + 1})' if where is not None else ''}") from error


def _as_instance(row: dict[str, Any], config: GatewayConfig) -> dict[str, Any]:
    """One of llm-d's endpoints under the names of an ``InstanceConfig``."""
    own = {key: value for key, value in row.items() if key not in _PASSED_OVER | _PLACE}
    address, scheme = row.get("address"), row.get("scheme", config.discovery_scheme)
    if address is not None:
        host = f"[{address}]" if ":" in str(address) else str(address)
        port = row.get("port")
        own.setdefault("url", f"{scheme}://{host}" if port is None else f"{scheme}://{host}:{port}")
        predictor_port = row.get("predictor_port", config.discovery_predictor_port)
        if predictor_port is not None and "profile" not in own:
            own.setdefault("predictor", f"{scheme}://{host}:{predictor_port}")
    if config.discovery_profile is not None and "predictor" not in own:
        own.setdefault("profile", config.discovery_profile)
    return own


def _instance(file: str, number: int, row: dict[str, Any]) -> InstanceConfig:
    try:
        return msgspec.convert(row, InstanceConfig)
    except (msgspec.ValidationError, UserError) as error:
        raise ConfigError(f"{file}, entry {number + 1}: {str(error).rstrip('.')}.") from error
