"""Instances from DNS, asked again and again: all addresses of a name, or all targets of its SRV records.

``HOST:PORT`` asks for A and AAAA records, as of a headless Kubernetes service; ``_PORT._PROTOCOL.NAME`` for SRV records, which
bring a port each (this needs dnspython, the extra ``dns``). A name that is not there (any more) keeps what was known:
health checks find out about each instance anyway, and a name server that is ill must not empty the pool.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from block.errors import ConfigError
from block.gateway.config import GatewayConfig, InstanceConfig
from block.gateway.members.discovery import Lists, Problem

TIMEOUT_S: Final = 5.0
Place = tuple[str, int]


def watch(config: GatewayConfig) -> Lists:
    """The instances of ``discovery_name`` every ``discovery_interval_s``.

    Raises:
        ConfigError: no name, no port, or no dnspython where SRV records need it.
    """
    name = config.discovery_name
    if not name:
        raise ConfigError("service_discovery = 'dns' needs discovery_name.")
    if name.startswith("_"):
        return _watch(srv_places(name, config.discovery_server), config)
    host, colon, port = name.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"discovery_name must be HOST:PORT, or _PORT._PROTOCOL.NAME for SRV records, not {name!r}.")
    return _watch(_addresses(host.strip("[]"), int(port)), config)


async def _watch(ask: Callable[[], Awaitable[Iterable[Place]]], config: GatewayConfig) -> Lists:
    known: set[Place] | None = None
    while True:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                found = set(await ask())
            if not found:
                yield Problem(f"{config.discovery_name} has no address; those known before stay")
            elif found != known:
                known = found
                yield [instance_at(host, port, config) for host, port in sorted(found)]
        except TimeoutError:
            yield Problem(f"no answer about {config.discovery_name} within {TIMEOUT_S:g} s")
        except OSError as error:
            yield Problem(f"{config.discovery_name} cannot be resolved: {error.strerror or error}")
        await asyncio.sleep(config.discovery_interval_s)


def instance_at(host: str, port: int, config: GatewayConfig) -> InstanceConfig:
    """The instance at an address, with what the configuration says of all that are discovered."""
    host = f"[{host}]" if ":" in host else host
    scheme, predictor_port = config.discovery_scheme, config.discovery_predictor_port
    return InstanceConfig(
        url=f"{scheme}://{host}:{port}",
        predictor=None if predictor_port is None else f"{scheme}://{host}:{predictor_port}",
        profile=config.discovery_profile if predictor_port is None else None,
    )


def _addresses(host: str, port: int) -> Callable[[], Awaitable[Iterable[Place]]]:
    async def ask() -> Iterable[Place]:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [(str(address[0]).partition("%")[0], port) for *_, address in found]

    return ask


def srv_places(name: str, server: str | None = None) -> Callable[[], Awaitable[Iterable[Place]]]:
    """A function that asks for the SRV records of a name. ``server``: ADDRESS[:PORT] of the name server, else the system's.

    Raises:
        ConfigError: dnspython is not there.
    """
    try:
        import dns.asyncresolver
        import dns.exception
        import dns.rdatatype
    except ImportError:
        raise ConfigError("SRV records need dnspython: pip install 'block-llm[dns]'.") from None
    resolver = dns.asyncresolver.Resolver(configure=server is None)
    if server is not None:
        address, _, port = server.partition(":")
        resolver.nameservers, resolver.port = [address], int(port or 53)
    resolver.lifetime = TIMEOUT_S

    async def ask() -> Iterable[Place]:
        try:
            answer = await resolver.resolve(name, dns.rdatatype.SRV)
        except dns.exception.DNSException as error:
            raise OSError(str(error)) from error
        return [(record.target.to_text(omit_final_dot=True), int(record.port)) for record in answer]

    return ask
