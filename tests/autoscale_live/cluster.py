"""A Kubernetes API for tests: the real one where its programs are at hand, else one that answers the same calls.

The real one is etcd, kube-apiserver and kube-controller-manager, started here, with RBAC on; ``BLOCK_KUBERNETES`` names the folder
with the programs (``tools/kubernetes/build.sh`` makes them). No kubelet runs: a test says by ``make_ready`` what a kubelet would.
The emulated one holds the calls that Block makes against rules written down from the API's documentation and
checked against the real one by the same tests: objects under their paths, merge patches, the scale subresource, selectors, watches,
conflicts by resourceVersion, and a controller that makes and deletes pods in the order that Kubernetes does (not ready ones
first, then by deletion cost, then the youngest; highest ordinal first for the ordered sets).
"""

# ruff: noqa: ASYNC110  (what is waited for happens in another process)

import asyncio
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

ADMIN, AUTOSCALER, GATEWAY = "admin-token", "autoscaler-token", "gateway-token"
NAMESPACE = "default"
LWS_API = "leaderworkerset.x-k8s.io/v1"
COST = "controller.kubernetes.io/pod-deletion-cost"
GROUPS = {
    "Deployment": ("apps/v1", "deployments"), "StatefulSet": ("apps/v1", "statefulsets"), "Pod": ("v1", "pods"),
    "ReplicaSet": ("apps/v1", "replicasets"), "LeaderWorkerSet": (LWS_API, "leaderworkersets"), "Service": ("v1", "services"),
    "ServiceAccount": ("v1", "serviceaccounts"), "Role": ("rbac.authorization.k8s.io/v1", "roles"),
    "RoleBinding": ("rbac.authorization.k8s.io/v1", "rolebindings"), "ConfigMap": ("v1", "configmaps"),
    "Lease": ("coordination.k8s.io/v1", "leases"), "EndpointSlice": ("discovery.k8s.io/v1", "endpointslices"),
}  # fmt: skip
LWS_DEFINITION = {
    "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
    "metadata": {"name": "leaderworkersets.leaderworkerset.x-k8s.io"},
    "spec": {
        "group": "leaderworkerset.x-k8s.io", "scope": "Namespaced",
        "names": {"kind": "LeaderWorkerSet", "plural": "leaderworkersets", "singular": "leaderworkerset"},
        "versions": [{
            "name": "v1", "served": True, "storage": True,
            "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            "subresources": {"status": {}, "scale": {
                "specReplicasPath": ".spec.replicas", "statusReplicasPath": ".status.replicas",
                "labelSelectorPath": ".status.hpaPodSelector"}},
        }],
    },
}  # fmt: skip


def path_of(kind: str, name: str = "", namespace: str = NAMESPACE) -> str:
    version, plural = GROUPS[kind]
    root = f"/api/{version}" if "/" not in version else f"/apis/{version}"
    return f"{root}/namespaces/{namespace}/{plural}" + (f"/{name}" if name else "")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Cluster:
    """What tests do with either; ``url`` and ``folder`` are set by ``start``."""

    real = False
    url = ""
    folder: Path

    def kubeconfig(self, token: str = ADMIN) -> str:
        """A file that leads here."""
        file = self.folder / f"{token}.kubeconfig"
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": self.url, "insecure-skip-tls-verify": True}}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        }  # fmt: skip
        file.write_text(json.dumps(config))
        return str(file)

    async def ask(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:
        headers = {"authorization": f"Bearer {ADMIN}", "content-type": kind}
        async with aiohttp.ClientSession() as session:
            data = None if body is None else json.dumps(body)
            tls = False if self.url.startswith("https") else True  # noqa: SIM211
            async with session.request(method, self.url + path, data=data, headers=headers, ssl=tls) as answer:
                told = await answer.json(content_type=None)
                assert answer.status < 300, (method, path, told)
                return told

    async def create(self, item: dict[str, Any]) -> Any:
        return await self.ask("POST", path_of(item["kind"]), item)

    async def workload(self, kind: str, name: str, replicas: int) -> None:
        """A Deployment, StatefulSet or LeaderWorkerSet of pods labelled ``app: NAME``."""
        labels = {"app": name}
        template = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "engine", "image": "engine"}]}}
        spec: dict[str, Any] = {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template}
        if kind == "StatefulSet":
            spec |= {"serviceName": name, "podManagementPolicy": "Parallel"}
        item = {
            "apiVersion": GROUPS[kind][0],
            "kind": kind,
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": spec,
        }
        await self.create(item)

    async def pods(self, app: str) -> list[dict[str, Any]]:
        listed = (await self.ask("GET", path_of("Pod") + f"?labelSelector=app%3D{app}"))["items"]
        return [pod for pod in listed if not pod["metadata"].get("deletionTimestamp")]

    async def pods_until(self, app: str, count: int) -> list[dict[str, Any]]:
        async with asyncio.timeout(30):
            while len(found := await self.pods(app)) != count:
                await asyncio.sleep(0.1)
        return found

    async def make_ready(self, pod: str, address: str = "127.0.0.1", *, ready: bool = True) -> None:
        """As a kubelet would report it."""
        condition = {"type": "Ready", "status": "True" if ready else "False", "lastTransitionTime": now()}
        status = {"phase": "Running", "podIP": address, "conditions": [condition]}
        await self.ask(
            "PATCH", path_of("Pod", pod) + "/status", {"status": status}, "application/strategic-merge-patch+json"
        )

    async def make_all_ready(self, app: str) -> list[str]:
        names = [pod["metadata"]["name"] for pod in await self.pods(app)]
        for name in names:
            await self.make_ready(name)
        return names


class RealCluster(Cluster):
    """Processes; one control plane for all tests of a session."""

    real = True

    def __init__(self, programs: Path, folder: Path) -> None:
        self.folder, self._programs = folder, programs
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        etcd, port = free_port(), free_port()
        self.url = f"https://127.0.0.1:{port}"
        folder = self.folder
        (folder / "tokens.csv").write_text(
            f'{ADMIN},admin,admin,"system:masters"\n'
            f'{AUTOSCALER},system:serviceaccount:{NAMESPACE}:block-autoscaler,a,"system:serviceaccounts"\n'
            f'{GATEWAY},system:serviceaccount:{NAMESPACE}:block-gateway,g,"system:serviceaccounts"\n'
        )
        subprocess.run(["openssl", "genrsa", "-out", folder / "sa.key", "2048"], check=True, capture_output=True)
        self._run(
            "etcd", "--data-dir", folder / "etcd", "--unsafe-no-fsync", f"--listen-peer-urls=http://127.0.0.1:{free_port()}",
            f"--listen-client-urls=http://127.0.0.1:{etcd}", f"--advertise-client-urls=http://127.0.0.1:{etcd}",
        )  # fmt: skip
        self._run(
            self._programs / "kube-apiserver", f"--etcd-servers=http://127.0.0.1:{etcd}", f"--secure-port={port}",
            "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", f"--cert-dir={folder}/certs",
            f"--service-account-key-file={folder}/sa.key", f"--service-account-signing-key-file={folder}/sa.key",
            "--service-account-issuer=https://kubernetes.default.svc", f"--token-auth-file={folder}/tokens.csv",
            "--authorization-mode=RBAC", "--disable-admission-plugins=ServiceAccount", "--service-cluster-ip-range=10.0.0.0/24",
        )  # fmt: skip
        self._until_ready(port)
        self._run(
            self._programs / "kube-controller-manager", f"--kubeconfig={self.kubeconfig()}", "--leader-elect=false",
            f"--cert-dir={folder}/manager", "--secure-port=0", "--port=0", f"--service-account-private-key-file={folder}/sa.key",
            "--controllers=deployment,replicaset,statefulset,endpointslice,endpoint",
        )  # fmt: skip

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    async def clear(self) -> None:
        """Nothing of a test is left (the garbage collector does not run here)."""
        async with asyncio.timeout(30):
            while True:
                for kind in ("Deployment", "ReplicaSet", "StatefulSet"):
                    await self.ask("DELETE", path_of(kind) + "?propagationPolicy=Background")
                await self.ask("DELETE", path_of("Pod") + "?gracePeriodSeconds=0")
                await asyncio.sleep(0.2)
                if not (await self.ask("GET", path_of("Pod")))["items"]:
                    return

    def _run(self, *command: Any) -> None:
        name = Path(command[0]).name
        with (self.folder / f"{name}.log").open("wb") as log:
            words = [str(word) for word in command]
            self._processes.append(subprocess.Popen(words, stdout=log, stderr=log, cwd=self.folder))

    def _until_ready(self, port: int) -> None:
        import http.client

        context = ssl._create_unverified_context()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=5)
            try:
                connection.request("GET", "/readyz", headers={"authorization": f"Bearer {ADMIN}"})
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            finally:
                connection.close()
            time.sleep(0.3)
        raise AssertionError((self.folder / "kube-apiserver.log").read_text()[-2000:])


def programs() -> Path | None:
    """The folder with the real programs, if there is one."""
    folder = os.environ.get("BLOCK_KUBERNETES")
    if folder is None or shutil.which("etcd") is None:
        return None
    return Path(folder) if (Path(folder) / "kube-controller-manager").exists() else None


class EmulatedCluster(Cluster):
    """Objects in a dictionary behind HTTP."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects: dict[str, dict[str, Any]] = {}
        self.refuse: set[str] = set()
        """Methods that are answered 403."""
        self._version = 0
        self._number = 0
        self._watchers: set[tuple[str, tuple[tuple[str, str], ...], asyncio.Queue[Any]]] = set()
        self._events: list[tuple[int, str, dict[str, Any]]] = []
        self._runner: web.AppRunner | None = None

    async def start(self) -> "EmulatedCluster":
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("authorization", "").removeprefix("Bearer ") not in (ADMIN, AUTOSCALER, GATEWAY):
            return self._status(401, "Unauthorized")
        if request.method in self.refuse:
            return self._status(403, f"may not {request.method}")
        path, sub = request.path, ""
        for name in ("scale", "status"):
            if path.endswith("/" + name):
                path, sub = path.removesuffix("/" + name), name
        collection = path.rsplit("/", 1)[-1] in {plural for _, plural in GROUPS.values()}
        if request.method == "GET" and collection:
            return await self._list(request, path)
        body = await request.json() if request.can_read_body else {}
        if request.method == "POST":
            return self._create(path, body)
        found = self.objects.get(path)
        if found is None:
            return self._status(404, f"{path} not found")
        if request.method in ("PATCH", "PUT"):
            return self._write(request.method, path, sub, body)
        if request.method == "DELETE":
            self._delete(path)
            return web.json_response({"kind": "Status", "status": "Success"})
        return web.json_response(self._scale(found) if sub == "scale" else found)

    def _create(self, path: str, body: dict[str, Any]) -> web.Response:
        name = body["metadata"]["name"]
        if f"{path}/{name}" in self.objects:
            return self._status(409, f"{name} already exists")
        body["metadata"] |= {"creationTimestamp": now()}
        self._store(f"{path}/{name}", body, "ADDED")
        return web.json_response(body, status=201)

    def _write(self, method: str, path: str, sub: str, body: dict[str, Any]) -> web.Response:
        found = self.objects[path]
        version = (body.get("metadata") or {}).get("resourceVersion")
        if version is not None and version != found["metadata"]["resourceVersion"]:
            return self._status(409, "the object has been modified")
        self._store(
            path,
            body | {"metadata": {**found["metadata"], **body["metadata"]}} if method == "PUT" else _merged(found, body),
            "MODIFIED",
        )
        found = self.objects[path]
        return web.json_response(self._scale(found) if sub == "scale" else found)

    async def _list(self, request: web.Request, path: str) -> web.StreamResponse:
        wanted = dict(part.split("=", 1) for part in request.query.get("labelSelector", "").split(",") if part)
        if request.query.get("watch") != "true":
            items = [one for at, one in self.objects.items() if at.rpartition("/")[0] == path and _chosen(one, wanted)]
            return web.json_response(
                {"kind": "List", "metadata": {"resourceVersion": str(self._version)}, "items": items}
            )
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(request)
        watcher = (path, tuple(wanted.items()), queue := asyncio.Queue[Any]())
        self._watchers.add(watcher)
        since = int(request.query.get("resourceVersion") or 0)
        for version, at, event in self._events:
            if version > since and at.rpartition("/")[0] == path and _chosen(event["object"], wanted):
                queue.put_nowait(event)
        try:
            async with asyncio.timeout(float(request.query.get("timeoutSeconds", "60"))):
                while True:
                    await response.write(json.dumps(await queue.get()).encode() + b"\n")
        except TimeoutError:
            pass
        finally:
            self._watchers.discard(watcher)
        return response

    def _store(self, path: str, item: dict[str, Any], event: str) -> None:
        self._version += 1
        item["metadata"]["resourceVersion"] = str(self._version)
        self.objects[path] = item
        self._tell(path, event, item)
        if item["kind"] in ("Deployment", "StatefulSet", "LeaderWorkerSet"):
            self._control(item)

    def _delete(self, path: str) -> None:
        self._version += 1
        self._tell(path, "DELETED", self.objects.pop(path))

    def _tell(self, path: str, event: str, item: dict[str, Any]) -> None:
        self._events.append((self._version, path, {"type": event, "object": item}))
        for at, wanted, queue in self._watchers:
            if path.rpartition("/")[0] == at and _chosen(item, dict(wanted)):
                queue.put_nowait({"type": event, "object": item})

    @staticmethod
    def _scale(item: dict[str, Any]) -> dict[str, Any]:
        chosen = ",".join(f"{key}={value}" for key, value in item["spec"]["selector"]["matchLabels"].items())
        return {"kind": "Scale", "spec": {"replicas": item["spec"]["replicas"]}, "status": {"selector": chosen}}

    def _control(self, item: dict[str, Any]) -> None:
        """Make or delete pods, as the workload's controller does."""
        labels = item["spec"]["template"]["metadata"]["labels"]
        pods = [one for one in self.objects.values() if one["kind"] == "Pod" and _chosen(one, labels)]
        ordered = item["kind"] != "Deployment"
        for number in range(len(pods), item["spec"]["replicas"]):
            self._number += 1
            name = f"{item['metadata']['name']}-{number if ordered else f'x{self._number}'}"
            more = {"leaderworkerset.sigs.k8s.io/worker-index": "0"} if item["kind"] == "LeaderWorkerSet" else {}
            pod = {
                "kind": "Pod",
                "metadata": {"name": name, "labels": labels | more, "creationTimestamp": now()},
                "status": {"phase": "Pending"},
            }
            self._store(path_of("Pod", name), pod, "ADDED")

        def rank(pod: dict[str, Any]) -> tuple[Any, ...]:
            name = pod["metadata"]["name"]
            if ordered:
                return (-int(name.rpartition("-")[2]),)
            ready = any(c["status"] == "True" for c in pod["status"].get("conditions", ()))
            return ready, int(pod["metadata"].get("annotations", {}).get(COST, 0)), -int(name.rpartition("-x")[2])

        for pod in sorted(pods, key=rank)[: max(0, len(pods) - item["spec"]["replicas"])]:
            self._delete(path_of("Pod", pod["metadata"]["name"]))

    @staticmethod
    def _status(code: int, message: str) -> web.Response:
        return web.json_response({"kind": "Status", "status": "Failure", "message": message, "code": code}, status=code)


def _chosen(item: dict[str, Any], wanted: dict[str, str]) -> bool:
    labels = item["metadata"].get("labels") or {}
    return all(labels.get(key) == value for key, value in wanted.items())


def _merged(old: Any, new: Any) -> Any:
    """A JSON merge patch (RFC 7396)."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    merged = dict(old)
    for key, value in new.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merged(merged.get(key, {} if isinstance(value, dict) else None), value)
    return merged
