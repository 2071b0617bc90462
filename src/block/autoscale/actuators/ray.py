"""Replicas of Ray Serve deployments, set by Serve's own REST API (the dashboard's), so that Ray need not be installed here.

The application must say ``external_scaler_enabled: true`` and have no autoscaling of its own. Serve drains a replica before it
stops it (``graceful_shutdown_timeout_s``) and routes among replicas itself: gateways see its proxies, not the replicas.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

import aiohttp
import msgspec

from block.autoscale.actuators.surroundings import Surroundings
from block.autoscale.terms import Member, Phase
from block.errors import ActuatorError, ConfigError
from block.gateway.config import check_url

PHASES: Final = {
    "STARTING": Phase.STARTING, "RECOVERING": Phase.STARTING, "UPDATING": Phase.READY, "RUNNING": Phase.READY,
    "PENDING_MIGRATION": Phase.READY, "STOPPING": Phase.DRAINING,
}  # fmt: skip


class Serving(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The deployment whose replicas are the instances of one kind."""

    application: str
    deployment: str


class RaySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="ray"):
    """``deployments``: the kind's name -> its deployment; ``dashboard``: where Ray's dashboard listens."""

    deployments: dict[str, Serving]
    dashboard: str = "http://127.0.0.1:8265"
    timeout_s: float = 10.0

    def __post_init__(self) -> None:
        check_url("dashboard URL", self.dashboard)
        if not self.timeout_s > 0:
            raise ConfigError("actuator.timeout_s must be above 0.")


class RayActuator:
    """Keeps nothing: Serve knows all."""

    keeps_members = True
    joins_gateways = False

    def __init__(self, settings: RaySettings, surroundings: Surroundings) -> None:
        self._settings, self._session = settings, surroundings.session
        if missing := sorted(set(surroundings.kinds) - set(settings.deployments)):
            raise ConfigError(f"actuator.deployments lacks the kind {missing[0]}.")

    async def scale_to(self, want: Mapping[str, int]) -> None:
        """Set each deployment's replicas where they are not as many already.

        Raises:
            ActuatorError: Serve does not answer, refuses, or has no such deployment.
        """
        applications = await self._applications()
        for kind, count in want.items():
            at, found = self._deployment(applications, kind)
            if found.get("target_num_replicas") != count:
                path = f"/api/v1/applications/{quote(at.application)}/deployments/{quote(at.deployment)}/scale"
                await self._ask("POST", path, {"target_num_replicas": count})

    async def members(self) -> Sequence[Member]:
        """All replicas.

        Raises:
            ActuatorError: Serve does not answer, or has no such deployment.
        """
        applications, members = await self._applications(), []
        for kind in self._settings.deployments:
            for replica in self._deployment(applications, kind)[1].get("replicas") or ():
                phase = PHASES.get(replica.get("state", ""), Phase.STARTING)
                members.append(Member(replica["replica_id"], kind, phase, float(replica.get("start_time_s") or 0.0)))
        return members

    async def close(self) -> None:
        return

    async def _applications(self) -> dict[str, Any]:
        told = await self._ask("GET", "/api/serve/applications/")
        found = told.get("applications")
        return found if isinstance(found, dict) else {}

    def _deployment(self, applications: Mapping[str, Any], kind: str) -> tuple[Serving, dict[str, Any]]:
        at = self._settings.deployments.get(kind)
        if at is None:
            raise ActuatorError(f"There is no kind {kind!r}.")
        found = ((applications.get(at.application) or {}).get("deployments") or {}).get(at.deployment)
        if not isinstance(found, dict):
            raise ActuatorError(f"Ray Serve has no deployment {at.deployment!r} in an application {at.application!r}.")
        return at, found

    async def _ask(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=self._settings.timeout_s)
        url = self._settings.dashboard.rstrip("/") + path
        try:
            async with self._session.request(method, url, json=body, timeout=timeout) as answer:
                text = await answer.read()
                if answer.status >= 400:
                    raise ActuatorError(f"Ray Serve refused {method} {path}: {answer.status} {_said(text)}")
                told = msgspec.json.decode(text)
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
            raise ActuatorError(f"Ray Serve did not answer {method} {path}: {error!r}") from error
        return told if isinstance(told, dict) else {}


def _said(text: bytes) -> str:
    try:
        return str(msgspec.json.decode(text)["error"])[:500]
    except (msgspec.DecodeError, KeyError, TypeError):
        return text[:200].decode(errors="replace")
