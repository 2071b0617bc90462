"""A Kubernetes Lease as the lock: its holder acts, and who stops renewing it loses it after ``LEASE_S``."""

import os
import secrets
import socket
import time
from datetime import UTC, datetime
from typing import Any, Final

from block.errors import ActuatorError
from block.integrations.kubernetes import Api, ConflictError, connect

LEASE_S: Final = 30


class LeaseLock:
    """Renewed at every decision. Where the API server does not answer it is not held: nobody acts blindly."""

    def __init__(
        self, name: str, namespace: str, kubeconfig: str | None, context: str | None, timeout_s: float
    ) -> None:
        self._path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._name, self._where, self._timeout_s = name, (kubeconfig, context), timeout_s
        self._me = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._api: Api | None = None
        self.sure_until_s = 0.0
        self._seen: tuple[str, float] = ("", 0.0)
        """The other holder's last renewal and when it was first seen here: only our own clock measures its age."""

    async def held(self) -> bool:
        """Take it where it is free or run out; renew it where it is ours."""
        asked_s = time.monotonic()
        try:
            if self._api is None:
                self._api = await connect(*self._where, self._timeout_s)
            held = await self._take(self._api)
        except ActuatorError:
            return False
        if held:
            self.sure_until_s = asked_s + LEASE_S
        return held

    async def release(self) -> None:
        if self._api is not None:
            await self._api.close()
            self._api = None

    async def _take(self, api: Api) -> bool:
        listed = await api.get(self._path, fieldSelector=f"metadata.name={self._name}")
        found = next((one for one in listed.get("items") or () if one["metadata"]["name"] == self._name), None)
        try:
            if found is None:
                await api.send("POST", self._path, self._lease({"name": self._name}))
                return True
            if found["spec"].get("holderIdentity") != self._me and not self._run_out(found):
                return False
            # The resourceVersion makes this fail if somebody else was faster.
            await api.send("PUT", f"{self._path}/{self._name}", self._lease(found["metadata"]))
        except ConflictError:
            return False
        return True

    def _run_out(self, lease: dict[str, Any]) -> bool:
        renewed = f"{lease['spec'].get('holderIdentity')} {lease['spec'].get('renewTime')}"
        if renewed != self._seen[0]:
            self._seen = renewed, time.monotonic()
        return time.monotonic() - self._seen[1] > float(lease["spec"].get("leaseDurationSeconds") or LEASE_S)

    def _lease(self, metadata: dict[str, Any]) -> dict[str, Any]:
        renewed = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        kept = {key: metadata[key] for key in ("name", "namespace", "resourceVersion") if key in metadata}
        return {
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": kept,
            "spec": {"holderIdentity": self._me, "leaseDurationSeconds": LEASE_S, "renewTime": renewed},
        }  # fmt: skip
