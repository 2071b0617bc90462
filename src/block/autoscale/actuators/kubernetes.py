"""Instances as pods: scales a Deployment, StatefulSet or LeaderWorkerSet through its ``scale`` subresource.

The workload's controller starts and deletes pods; this only says how many. Its pods are those that the scale's own selector names.
Less is done pod by pod: the one to go is drained at the gateways first, is marked with the lowest deletion cost (a
Deployment deletes the cheapest ready pod; the other two always delete the highest ordinal, so that one is chosen here), and only
then is the count lowered by one. What is not ready yet would be deleted first, so lowering waits for it.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, Final, Literal

import msgspec

from block.autoscale.actuators.surroundings import Surroundings
from block.autoscale.terms import Member, Phase
from block.errors import ActuatorError, ConfigError
from block.gateway.config import InstanceConfig
from block.integrations.kubernetes import Api, connect

Resource = Literal["deployment", "statefulset", "leaderworkerset"]
API_OF: Final[dict[Resource, tuple[str, str, str]]] = {
    "deployment": ("apps", "v1", "deployments"),
    "statefulset": ("apps", "v1", "statefulsets"),
    "leaderworkerset": ("leaderworkerset.x-k8s.io", "v1", "leaderworkersets"),
}
DELETION_COST: Final = "controller.kubernetes.io/pod-deletion-cost"
WORKER_INDEX: Final = "leaderworkerset.sigs.k8s.io/worker-index"
STEADY_WITHIN_S: Final = 120.0
"""How long a drained pod waits for others to become ready before the count is lowered all the same."""

log = logging.getLogger("block.autoscale")


class Workload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What runs the instances of one kind."""

    name: str
    resource: Resource = "deployment"
    port: int = 8000
    predictor_port: int | None = None


class KubernetesSettings(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="kubernetes"
):
    """``workloads``: the kind's name -> its workload. ``kubeconfig``: a file and a ``context`` in it; where none is given,
    the pod's own service account, else the user's configuration."""

    workloads: dict[str, Workload]
    namespace: str = "default"
    kubeconfig: str | None = None
    context: str | None = None
    drain_within_s: float = 600.0
    timeout_s: float = 10.0

    def __post_init__(self) -> None:
        if not self.workloads:
            raise ConfigError("actuator.workloads must name a workload for every kind.")
        if not self.timeout_s > 0:
            raise ConfigError("actuator.timeout_s must be above 0.")


class _Pod(msgspec.Struct, frozen=True):
    """What is needed of a pod."""

    name: str
    address: str | None
    phase: Phase
    since_s: float
    created_s: float


class KubernetesActuator:
    """Owns which pods are on their way out."""

    keeps_members = True

    def __init__(self, settings: KubernetesSettings, surroundings: Surroundings) -> None:
        self._settings, self._around = settings, surroundings
        if missing := sorted(set(surroundings.kinds) - set(settings.workloads)):
            raise ConfigError(f"actuator.workloads lacks the kind {missing[0]}.")
        self._api: Api | None = None
        self._leaving: dict[str, str] = {}
        """Pods that shall go -> their kind."""
        self._removals: dict[str, asyncio.Task[None]] = {}
        self._lowering = (
            asyncio.Lock()
        )  # the count is read, lowered by one and seen to be lower by one removal at a time
        self._welcomed: set[str] = set()
        self.ordered_s: dict[str, float] = {}

    async def scale_to(self, want: Mapping[str, int]) -> None:
        """Raise the count at once; lower it pod by pod as they are drained.

        Raises:
            ActuatorError: the API server does not answer, or refuses.
        """
        for kind, count in want.items():
            if kind not in self._settings.workloads:
                raise ActuatorError(f"There is no kind {kind!r}.")
            replicas, selector = await self._scale_of(kind)
            leaving = sum(of == kind for of in self._leaving.values())
            if count > replicas - leaving:
                await self._set(kind, count + leaving)
            elif count < replicas - leaving:
                pods = [pod for pod in await self._pods(kind, selector) if pod.name not in self._leaving]
                for pod in self._first_to_go(kind, pods)[: replicas - leaving - count]:
                    log.info("pod %s is to be removed", pod.name)
                    self._leaving[pod.name] = kind
                    self._removals[pod.name] = asyncio.create_task(self._remove(kind, pod))

    async def members(self) -> Sequence[Member]:
        """All pods of all workloads. Those that are ready are welcomed at the gateways.

        Raises:
            ActuatorError: the API server does not answer, or refuses.
        """
        members: list[Member] = []
        there: set[str] = set()
        for kind, workload in self._settings.workloads.items():
            _, selector = await self._scale_of(kind)
            for pod in await self._pods(kind, selector):
                phase = Phase.DRAINING if pod.name in self._leaving else pod.phase
                members.append(Member(pod.name, kind, phase, pod.since_s))
                self.ordered_s[pod.name] = pod.created_s
                there.add(pod.name)
                if phase is Phase.READY and pod.address is not None:
                    self._around.membership.welcome(_config(pod, workload))
                    self._welcomed.add(pod.name)
        for name in self._welcomed - there:
            self._around.membership.forget(name)
        self._welcomed &= there
        self.ordered_s = {name: at_s for name, at_s in self.ordered_s.items() if name in there}
        return members

    async def close(self) -> None:
        """Pods stay as they are; those being drained are left to the next autoscaler."""
        for task in self._removals.values():
            task.cancel()
        await asyncio.gather(*self._removals.values(), return_exceptions=True)
        if self._api is not None:
            await self._api.close()

    # Removal

    def _first_to_go(self, kind: str, pods: Sequence[_Pod]) -> list[_Pod]:
        if self._settings.workloads[kind].resource != "deployment":
            return sorted(pods, key=lambda pod: -_ordinal(pod.name))
        in_flight = self._around.membership.in_flight
        return sorted(pods, key=lambda pod: (pod.phase is Phase.READY, in_flight(pod.name), -pod.created_s))

    async def _remove(self, kind: str, pod: _Pod) -> None:
        try:
            if pod.phase is Phase.READY:
                await self._mark(pod.name)
                if not await self._around.membership.retire(pod.name, self._settings.drain_within_s):
                    log.warning("pod %s was not empty after %g s", pod.name, self._settings.drain_within_s)
            await self._turn(kind, pod.name)
            async with self._lowering:
                if pod.phase is Phase.READY:
                    await self._steady(kind)
                replicas, _ = await self._scale_of(kind)
                await self._set(kind, max(0, replicas - 1))
                await self._gone(kind, pod.name)
        except ActuatorError as error:
            log.warning("pod %s could not be removed, it will be tried again: %s", pod.name, error)
        finally:
            self._around.membership.forget(pod.name)
            self._leaving.pop(pod.name, None)
            self._removals.pop(pod.name, None)

    async def _turn(self, kind: str, name: str) -> None:
        """Of an ordered set only the highest ordinal can go: until this is it among those that shall go."""
        if self._settings.workloads[kind].resource == "deployment":
            return
        while any(of == kind and _ordinal(other) > _ordinal(name) for other, of in self._leaving.items()):  # noqa: ASYNC110
            await asyncio.sleep(0.2)

    async def _steady(self, kind: str) -> None:
        """Until no pod of the kind is still starting: those would be deleted in place of the one that was drained."""
        until_s = monotonic() + STEADY_WITHIN_S
        while monotonic() < until_s:
            _, selector = await self._scale_of(kind)
            pods = [pod for pod in await self._pods(kind, selector) if pod.name not in self._leaving]
            if all(pod.phase is not Phase.STARTING for pod in pods):
                return
            await asyncio.sleep(1.0)

    async def _gone(self, kind: str, name: str) -> None:
        """Until the pod is deleted or being deleted (then it is no longer counted as a replica)."""
        until_s = monotonic() + STEADY_WITHIN_S
        while monotonic() < until_s:
            _, selector = await self._scale_of(kind)
            pods = {pod.name: pod for pod in await self._pods(kind, selector)}
            if name not in pods or pods[name].phase is Phase.DRAINING:
                return
            await asyncio.sleep(0.2)
        log.warning("the count was lowered, but pod %s was not the one deleted", name)

    # The API server

    async def _connected(self) -> Api:
        if self._api is None:
            self._api = await connect(self._settings.kubeconfig, self._settings.context, self._settings.timeout_s)
        return self._api

    async def _scale_of(self, kind: str) -> tuple[int, str]:
        """(replicas asked for, selector of its pods)."""
        api, workload = await self._connected(), self._settings.workloads[kind]
        scale = await api.get(f"{self._path(kind)}/{workload.name}/scale")
        selector = (scale.get("status") or {}).get("selector")
        if not selector:
            raise ActuatorError(f"The {workload.resource} {workload.name} tells no selector of its pods.")
        return int((scale.get("spec") or {}).get("replicas", 0)), selector

    async def _set(self, kind: str, replicas: int) -> None:
        api, workload = await self._connected(), self._settings.workloads[kind]
        log.info("%s %s: %d replicas", workload.resource, workload.name, replicas)
        await api.patch(f"{self._path(kind)}/{workload.name}/scale", {"spec": {"replicas": replicas}})

    async def _mark(self, pod: str) -> None:
        with suppress(ActuatorError):  # without the right to annotate, another pod may go than the one that was drained
            path = f"/api/v1/namespaces/{self._settings.namespace}/pods/{pod}"
            await (await self._connected()).patch(path, {"metadata": {"annotations": {DELETION_COST: "-1000"}}})

    async def _pods(self, kind: str, selector: str) -> list[_Pod]:
        api, workload = await self._connected(), self._settings.workloads[kind]
        if workload.resource == "leaderworkerset":  # one instance is one group; its leader takes the requests
            selector = f"{selector},{WORKER_INDEX}=0"
        listed = await api.get(f"/api/v1/namespaces/{self._settings.namespace}/pods", labelSelector=selector)
        return [_pod(item) for item in listed.get("items") or ()]

    def _path(self, kind: str) -> str:
        group, version, plural = API_OF[self._settings.workloads[kind].resource]
        return f"/apis/{group}/{version}/namespaces/{self._settings.namespace}/{plural}"


def _config(pod: _Pod, workload: Workload) -> InstanceConfig:
    host = f"[{pod.address}]" if pod.address and ":" in pod.address else pod.address
    predictor = None if workload.predictor_port is None else f"http://{host}:{workload.predictor_port}"
    return InstanceConfig(url=f"http://{host}:{workload.port}", predictor=predictor, name=pod.name)


def _ordinal(name: str) -> int:
    number = name.rpartition("-")[2]
    return int(number) if number.isdigit() else 0


def _pod(item: Mapping[str, Any]) -> _Pod:
    meta, status = item["metadata"], item.get("status") or {}
    created_s = seconds_of(meta.get("creationTimestamp"))
    ready: Mapping[str, Any] = next((c for c in status.get("conditions") or () if c.get("type") == "Ready"), {})
    phase, since_s = Phase.STARTING, created_s
    if meta.get("deletionTimestamp"):
        phase, since_s = Phase.DRAINING, seconds_of(meta["deletionTimestamp"])
    elif status.get("phase") in ("Failed", "Succeeded", "Unknown"):
        phase = Phase.DOWN
    elif ready.get("status") == "True":
        phase, since_s = Phase.READY, seconds_of(ready.get("lastTransitionTime")) or created_s
    return _Pod(meta["name"], status.get("podIP"), phase, since_s, created_s)


def seconds_of(text: str | None) -> float:
    """A Kubernetes time as seconds since the epoch; 0.0 where there is none."""
    from datetime import datetime

    return 0.0 if not text else datetime.fromisoformat(text).timestamp()
