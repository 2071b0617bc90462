"""What users of other routers have in their fingers: names of policies, headers that name instances, routes for workers.

SGLang's and vLLM's routers, production-stack, AIBrix, LiteLLM and llm-d spell the same things differently. Every spelling here
means something that this gateway has under its own name; nothing is added.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, quote, unquote

import msgspec

from block.core import InstanceId
from block.errors import ClientError
from block.gateway.wire.http1 import HttpRequest

if TYPE_CHECKING:
    from block.gateway.members.pool import Instance

POLICIES: Final[Mapping[str, str]] = {
    "round_robin": "round-robin", "roundrobin": "round-robin", "simple-shuffle": "random",
    "power_of_two": "power-of-two", "least_load": "least-outstanding", "least-request": "least-outstanding",
    "least-busy": "least-outstanding", "cache_aware": "prefix-affinity", "prefixaware": "prefix-affinity",
    "prefix-cache": "prefix-affinity", "consistent_hash": "consistent-hash", "consistent_hashing": "consistent-hash",
    "prefix_hash": "consistent-hash", "session": "consistent-hash",
}  # fmt: skip
"""Others' names of policies -> the nearest one here."""

SUBSET: Final = b"x-gateway-destination-endpoint-subset"
TARGET: Final = b"x-smg-target-worker"
STRATEGY: Final = b"routing-strategy"
READ: Final = frozenset({SUBSET, TARGET, STRATEGY})
"""Request headers that say where a request may go; most requests have none of them."""

WORKER_ROUTES: Final = frozenset({"/workers", "/list_workers", "/get_loads", "/add_worker", "/remove_worker"})


def policy_called(name: str) -> str:
    """A policy's name here, options kept, for a name that may be another router's."""
    known, colon, options = name.partition(":")
    return POLICIES.get(known, known) + colon + options


def instances_asked_for(http: HttpRequest, instances: "Mapping[InstanceId, Instance]") -> frozenset[InstanceId] | None:
    """The instances that a request's headers restrict it to, by name or ``host:port``; ``None``: any will do.

    Only instances that are members can be meant, so a header cannot make the gateway connect anywhere else. Of a subset none
    may be a member any more: then nobody is left.

    Raises:
        ClientError: 400, the one worker that is named is none.
    """
    found: frozenset[InstanceId] | None = None
    subset = http.header(SUBSET)
    if subset is not None:
        named = {one.strip() for one in subset.split(",")}
        found = frozenset(i for i, instance in instances.items() if not named.isdisjoint(_names(instance)))
    target = http.header(TARGET)
    if target is not None:
        if target.isascii() and target.isdigit() and len(target) < 7:  # a place in the list of workers
            one = frozenset(list(instances)[int(target) : int(target) + 1])
        else:
            one = frozenset(i for i, instance in instances.items() if target.rstrip("/") in _names(instance))
        if not one:
            header = TARGET.decode()
            raise ClientError(
                400, f"The header {header} names no instance of this gateway: {target[:256]!r}.", param=header
            )
        found = one if found is None else found & one
    return found


def _names(instance: "Instance") -> tuple[str, ...]:
    netloc = instance.host_header.decode()
    return instance.id, netloc, instance.connections.host, instance.config.url.rstrip("/")


class AsWorker(msgspec.Struct, frozen=True):
    """A worker as ``POST /workers`` names it; what else others' clients send has no meaning here."""

    url: str
    predictor: str | None = None
    profile: str | None = None
    name: str = ""


def as_admin(http: HttpRequest, instances: "Iterable[Instance]") -> tuple[bytes, list[str], bytes]:
    """A change asked for as other routers have it: method, path parts below ``/admin/`` and body of the same here.

    Raises:
        ClientError: it names no worker, or is no such change.
    """
    path, method = http.path, http.method
    if path in ("/add_worker", "/remove_worker") and method == b"POST":
        url = parse_qs(http.target.partition(b"?")[2].decode("ascii", "replace")).get("url", [""])[-1]
        if not url:
            raise ClientError(400, f"{path} wants ?url=URL.", param="url")
        if path == "/add_worker":
            return b"POST", ["instances"], msgspec.json.encode({"url": url.rstrip("/")})
        return b"DELETE", ["instances", _worker(url, instances).id], b""
    if path == "/workers" and method == b"POST":
        try:
            worker = msgspec.json.decode(http.body, type=AsWorker)
        except msgspec.MsgspecError as error:
            raise ClientError(400, f"This is not a worker: {error}") from None
        given = {name: value for name, value in msgspec.structs.asdict(worker).items() if value}
        return b"POST", ["instances"], msgspec.json.encode(given)
    if path.startswith("/workers/") and method == b"DELETE":
        return b"DELETE", ["instances", _worker(unquote(path.removeprefix("/workers/")), instances).id], b""
    raise ClientError(404, f"There is no {method.decode('latin-1')} {path} here.", code="not_found")


def workers_told(path: str, instances: "Iterable[Instance]") -> Any:
    """What other routers' GET routes say of the workers; ``None``: this is none of them."""
    if path == "/list_workers":
        return {"urls": [instance.config.url for instance in instances]}
    if path == "/get_loads":
        return {"workers": [{"worker": i.config.url, "load": i.in_flight} for i in instances]}
    if path == "/workers":
        workers = [_described(instance) for instance in instances]
        return {"workers": workers, "total": len(workers)}
    if path.startswith("/workers/"):
        return _described(_worker(unquote(path.removeprefix("/workers/")), instances))
    return None


def answer_to_change(method: bytes, worker: str, url: str) -> tuple[int, dict[str, Any]]:
    """(status, answer) as SGLang's gateway has it."""
    answer = {"status": "accepted", "worker_id": worker, "url": url}
    return 202, answer | {"location": f"/workers/{quote(worker, safe='')}"} if method == b"POST" else answer


def _described(instance: "Instance") -> dict[str, Any]:
    return {
        "id": instance.id, "url": instance.config.url, "model_id": next(iter(sorted(instance.models or ())), "unknown"),
        "worker_type": "regular", "is_healthy": instance.state == "ready" and not instance.suspect,
        "load": instance.in_flight, "connection_mode": "HTTP",
    }  # fmt: skip


def _worker(named: str, instances: "Iterable[Instance]") -> "Instance":
    for instance in instances:
        if named.rstrip("/") in _names(instance):
            return instance
    raise ClientError(404, f"There is no worker {named[:256]!r}.", code="instance_not_found")
