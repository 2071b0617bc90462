"""Where the instances are found, beside those of the configuration.

A *source* is an async generator: it yields the whole list whenever it may have changed, and the newest list wins; or a
`Problem`, which changes nothing. Who is new in a list joins, who is gone from it is drained. A source ends never, raises
nothing but ConfigError at its first step (settings that are missing), and is cancelled when the gateway stops.

To add one: a module with ``watch(config)``, and its name in ``SOURCES`` and in ``GatewayConfig.service_discovery``.
"""

import importlib
from collections.abc import AsyncGenerator
from typing import Final

import msgspec

from block.errors import ConfigError
from block.gateway.config import GatewayConfig, InstanceConfig


class Problem(msgspec.Struct, frozen=True):
    """The list could not be read this time. ``reason``: one sentence for the log."""

    reason: str


Lists = AsyncGenerator[list[InstanceConfig] | Problem, None]

SOURCES: Final = {
    "file": "block.gateway.members.discovery.file",
    "dns": "block.gateway.members.discovery.dns",
    "k8s": "block.gateway.members.discovery.kubernetes",
}
"""Name -> the module whose ``watch(config)`` is the source; ``static`` is the configuration alone."""


def members_of(config: GatewayConfig) -> Lists:
    """The source that the configuration names.

    Raises:
        ConfigError: it names none that is there, or a setting of it is missing.
    """
    module = SOURCES.get(config.service_discovery)
    try:
        found = importlib.import_module(module) if module is not None else None
    except ModuleNotFoundError as error:
        raise ConfigError(f"service_discovery = {config.service_discovery!r} needs {error.name}.") from error
    if found is None:
        raise ConfigError(f"There is nothing to watch for service_discovery = {config.service_discovery!r}.")
    lists: Lists = found.watch(config)
    return lists
