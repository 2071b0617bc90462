"""Instances from Kubernetes: the ready endpoints of a Service, or the ready pods that a selector names, as they come and go.

``discovery_name`` is ``[NAMESPACE/]SERVICE[:PORT]`` (EndpointSlices of the Service; PORT is a port's name or number, the first port
where none is given) or ``[NAMESPACE/]pods:KEY=VALUE[,KEY=VALUE]:PORT``. Instances are named after their pods.

The whole is listed, then watched; every ``discovery_interval_s`` at most a watch begins anew with a list, so that whatever was
missed heals. What cannot be read changes nothing. The gateway's service account needs get, list and watch on it (``deploy/``).
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final, NamedTuple

from block.errors import ActuatorError, ConfigError
from block.gateway.config import GatewayConfig, InstanceConfig
from block.gateway.members.discovery import Lists, Problem
from block.integrations.kubernetes import Api, connect

TIMEOUT_S: Final = 10.0
WATCH_LEAST_S: Final = 5.0
SERVICE: Final = "kubernetes.io/service-name"


class Wanted(NamedTuple):
    """What to watch."""

    path: str
    selector: str
    port: str
    pods: bool


def watch(config: GatewayConfig) -> Lists:
    """The instances behind ``discovery_name``.

    Raises:
        ConfigError: no name, or one that cannot be understood.
    """
    return _watch(wanted(config.discovery_name or ""), config)


def wanted(name: str) -> Wanted:
    """What a ``discovery_name`` names.

    Raises:
        ConfigError: it cannot be understood.
    """
    namespace, slash, rest = name.rpartition("/")
    namespace = namespace if slash else "default"
    if rest.startswith("pods:"):
        selector, _, port = rest.removeprefix("pods:").rpartition(":")
        if "=" not in selector or not port.isdigit():
            raise ConfigError(f"discovery_name must be [NAMESPACE/]pods:KEY=VALUE:PORT, not {name!r}.")
        return Wanted(f"/api/v1/namespaces/{namespace}/pods", selector, port, pods=True)
    service, _, port = rest.partition(":")
    if not service:
        raise ConfigError(
            "service_discovery = 'k8s' needs discovery_name: [NAMESPACE/]SERVICE[:PORT] or [NAMESPACE/]pods:KEY=VALUE:PORT."
        )
    path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
    return Wanted(path, f"{SERVICE}={service}", port, pods=False)


async def _watch(what: Wanted, config: GatewayConfig) -> Lists:
    api: Api | None = None
    told: list[InstanceConfig] | None = None
    try:
        while True:
            try:
                api = api or await connect(None, None, TIMEOUT_S)
                async for objects in _states(api, what, max(WATCH_LEAST_S, config.discovery_interval_s)):
                    found = instances_of(objects.values(), what, config)
                    if found != told:
                        told = found
                        yield found
            except ActuatorError as error:
                yield Problem(str(error))
                await asyncio.sleep(config.discovery_interval_s)
    finally:
        if api is not None:
            await api.close()


async def _states(api: Api, what: Wanted, within_s: float) -> AsyncIterator[Mapping[str, Any]]:
    """All objects by name, again after every event, for so long."""
    listed = await api.get(what.path, labelSelector=what.selector)
    objects = {one["metadata"]["name"]: one for one in listed.get("items") or ()}
    yield objects
    version = (listed.get("metadata") or {}).get("resourceVersion", "")
    async for event in api.watch(what.path, within_s, labelSelector=what.selector, resourceVersion=version):
        kind, one = event.get("type"), event.get("object") or {}
        if kind == "ERROR":  # the version is too old, for example: begin anew
            return
        name = (one.get("metadata") or {}).get("name")
        if kind == "DELETED":
            objects.pop(name, None)
        elif kind in ("ADDED", "MODIFIED"):
            objects[name] = one
        yield objects


def instances_of(objects: Any, what: Wanted, config: GatewayConfig) -> list[InstanceConfig]:
    """Ready endpoints (or pods) as instances, in the order of their names."""
    found: dict[str, InstanceConfig] = {}
    for one in objects:
        for name, address, port in _ready_pods(one, what.port) if what.pods else _ready_endpoints(one, what.port):
            found[name] = _instance(name, address, port, config)
    return [found[name] for name in sorted(found)]


def _ready_pods(pod: Mapping[str, Any], port: str) -> list[tuple[str, str, int]]:
    status, meta = pod.get("status") or {}, pod["metadata"]
    ready = any(c.get("type") == "Ready" and c.get("status") == "True" for c in status.get("conditions") or ())
    if not ready or meta.get("deletionTimestamp") or not status.get("podIP"):
        return []
    return [(meta["name"], status["podIP"], int(port))]


def _ready_endpoints(piece: Mapping[str, Any], port: str) -> list[tuple[str, str, int]]:
    ports = [one for one in piece.get("ports") or () if port in ("", one.get("name"), str(one.get("port")))]
    if not ports or not ports[0].get("port"):
        return []
    number = int(ports[0]["port"])
    found = []
    for endpoint in piece.get("endpoints") or ():
        conditions = endpoint.get("conditions") or {}
        if conditions.get("ready") is False or conditions.get("terminating") or not endpoint.get("addresses"):
            continue
        address = endpoint["addresses"][0]
        found.append(((endpoint.get("targetRef") or {}).get("name") or f"{address}:{number}", address, number))
    return found


def _instance(name: str, address: str, port: int, config: GatewayConfig) -> InstanceConfig:
    host = f"[{address}]" if ":" in address else address
    scheme, predictor_port = config.discovery_scheme, config.discovery_predictor_port
    return InstanceConfig(
        url=f"{scheme}://{host}:{port}", name=name,
        predictor=None if predictor_port is None else f"{scheme}://{host}:{predictor_port}",
        profile=config.discovery_profile if predictor_port is None else None,
    )  # fmt: skip
