"""The routes under ``/admin/``: who is a member, and what came lately. Opened by a key, or by a port of its own.

With several worker processes a change made at one is told to the others, and what each of them saw is put together.
"""

import hmac
import ipaddress
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import msgspec

from block import dashboard
from block.errors import ClientError, UserError
from block.gateway.config import InstanceConfig
from block.gateway.members.pool import Instance
from block.gateway.peers import answer_to_change, as_admin, workers_told
from block.gateway.wire.http1 import HttpRequest
from block.gateway.wire.proxy import ClientConnection, Surface

if TYPE_CHECKING:
    from block.gateway.app import App


class Admin:
    """``/admin/instances``: GET lists, POST adds; ``.../NAME``: DELETE removes; ``.../NAME/drain``: POST drains.

    ``/workers`` and its like are other routers' names for the same. ``/admin/recent``: what came and ended lately;
    ``/admin/dashboard``: the page that shows it. ``/admin/changes``: what was changed here, for a worker process that starts later.
    """

    def __init__(self, app: "App", *, own_port: bool) -> None:
        self._app, self._own_port = app, own_port

    def handle(self, client: ClientConnection, http: HttpRequest) -> None:
        """Answer one request, at once or, with other workers to tell or to ask, a little later.

        Raises:
            ClientError: not allowed, not found, or not understood.
        """
        if http.method in (b"GET", b"HEAD") and http.path == "/admin/dashboard":
            self._check_door(client)  # no key: a browser cannot bring it along, and the page itself tells nothing
            client.answer(200, dashboard.page(), dashboard.CONTENT_TYPE, dashboard.HEADERS)
            return
        self.check_allowed(client, http)
        if not http.path.startswith("/admin/"):
            self._handle_as_others_do(client, http)
            return
        parts = [unquote(part) for part in http.path.removeprefix("/admin/").split("/")]
        workers = None if client.surface is Surface.WORKER else self._app.workers
        if http.method == b"GET" and parts == ["recent"]:
            cursor = parse_qs(http.target.partition(b"?")[2].decode("ascii", "replace")).get("after", [""])[-1]
            if workers is None:
                client.answer(200, msgspec.json.encode(self._recent(cursor)))
            else:
                self._app.answer_later(client, http, workers.recent(cursor, self._recent))
            return
        self._finish(client, http, *self._answer(http.method, parts, http.body))

    def _handle_as_others_do(self, client: ClientConnection, http: HttpRequest) -> None:
        """``/workers`` and its like, as SGLang's and vLLM's routers have them."""
        instances = self._app.pool.instances
        if http.method in (b"GET", b"HEAD"):
            told = workers_told(http.path, instances.values())
            if told is not None:
                client.answer(200, msgspec.json.encode(told))
                return
        method, parts, body = as_admin(http, instances.values())
        _, found, tell = self._answer(method, parts, body)
        self._finish(client, http, *answer_to_change(method, found["name"], found["url"]), tell)

    def _finish(
        self, client: ClientConnection, http: HttpRequest, status: int, found: Any, tell: tuple[str, str, bytes] | None
    ) -> None:
        """Answer, once the other workers were told what there is to tell."""
        workers, answer = self._app.workers, msgspec.json.encode(found)
        if workers is None or tell is None or client.surface is Surface.WORKER:
            client.answer(status, answer)
        else:
            self._app.answer_later(client, http, workers.tell(*tell, answer=(status, answer)))

    def _recent(self, cursor: str) -> Any:
        return self._app.dispatcher.recent.after(cursor, self._app.dispatcher, self._app.pool)

    def check_allowed(self, client: ClientConnection, http: HttpRequest) -> None:
        """
        Raises:
            ClientError: not through this door, or not without the key.
        """
        if client.surface is Surface.WORKER:
            return  # a socket that only this user's processes can open
        self._check_door(client)
        key = self._app.config.admin_key
        if key:
            given = http.fields.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + key.encode()):
                raise ClientError(
                    401, "The admin key is missing or wrong.", kind="authentication_error", code="invalid_api_key"
                )
        elif b"origin" in http.fields:  # a page in a browser on this host must not reach an open port through it
            raise ClientError(403, "Browsers may not use this without an admin key.", code="forbidden")

    def _check_door(self, client: ClientConnection) -> None:
        own_port = self._own_port
        if (own_port and client.surface is not Surface.ADMIN) or (not own_port and not self._app.config.admin_key):
            why = "it has a port of its own" if own_port else "no admin key is set"
            raise ClientError(404, f"There is no administration here: {why}.", code="not_found")

    def _answer(
        self, method: bytes, parts: Sequence[str], body: bytes
    ) -> tuple[int, Any, tuple[str, str, bytes] | None]:  # fmt: skip
        """(status, answer, what to tell other workers: method, path and body)."""
        app = self._app
        match (method, parts):
            case (b"GET", ["instances"]):
                return 200, {"data": [self._describe(i) for i in app.pool.instances.values()]}, None
            case (b"GET", ["changes"]):
                return 200, app.members.changes(), None
            case (b"POST", ["instances"]):
                config = self._instance_of(body)
                told = ("POST", "/admin/instances", msgspec.json.encode(config))
                return 201, self._describe(app.members.join(config)), told
            case (b"POST", ["instances", name, "drain"]):
                instance = self._instance(name)
                app.pool.drain(instance)
                return 200, self._describe(instance), ("POST", f"/admin/instances/{quote(name, safe='')}/drain", b"")
            case (b"DELETE", ["instances", name]):
                instance = self._instance(name)
                app.members.dismiss(instance)
                return 200, self._describe(instance), ("DELETE", f"/admin/instances/{quote(name, safe='')}", b"")
        path = "/".join(parts)
        raise ClientError(404, f"There is no {method.decode('latin-1')} /admin/{path} here.", code="not_found")

    def _instance(self, name: str) -> Instance:
        for instance in self._app.pool.instances.values():
            if instance.id == name:
                return instance
        raise ClientError(404, f"There is no instance named {name[:256]!r}.", code="instance_not_found")

    def _instance_of(self, body: bytes) -> InstanceConfig:
        try:
            config = msgspec.json.decode(body, type=InstanceConfig)
        except (msgspec.DecodeError, UserError) as error:
            raise ClientError(400, f"This is not an instance: {error}") from None
        for url in (config.url, config.predictor):
            if url is not None and not may_register(url, self._app.config.instance_allow):
                raise ClientError(403, f"{url!r} is not among the hosts that may be added.", code="host_not_allowed")
        if config.id in self._app.pool.instances:
            raise ClientError(409, f"There is an instance named {config.id!r} already.", code="instance_exists")
        return config

    def _describe(self, instance: Instance) -> dict[str, Any]:
        evidence = self._app.dispatcher.decider.evidence.get(instance.id)
        return {
            "name": instance.id, "url": instance.config.url, "predictor": instance.config.predictor,
            "profile": instance.config.profile, "origin": self._app.members.origins.get(instance.id),
            "state": instance.state, "reason": instance.reason, "suspect": instance.suspect, "in_flight": instance.in_flight,
            "models": sorted(instance.models or ()), "trial": instance.trial,
            "evidence": evidence and ("fresh" if evidence.fresh(time.time()) else evidence.problem),
        }  # fmt: skip


def may_register(url: str, allowed: Sequence[str]) -> bool:
    """Whether an instance at this URL may be added while the gateway runs.

    ``allowed``: networks (``10.0.0.0/8``) and host names with wildcards (``*.internal``); empty: every host but those that are
    never an engine's (link-local addresses, where clouds keep their credentials; multicast; the unspecified one).
    """
    host = (urlsplit(url).hostname or "").rstrip(".")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return not allowed or any(fnmatchcase(host, pattern.lower()) for pattern in allowed)
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    if address.is_link_local or address.is_multicast or address.is_unspecified:
        return False
    return not allowed or any(_in_network(address, pattern) for pattern in allowed)


def _in_network(address: "ipaddress.IPv4Address | ipaddress.IPv6Address", pattern: str) -> bool:
    try:
        return address in ipaddress.ip_network(pattern, strict=False)
    except ValueError:
        return fnmatchcase(str(address), pattern.lower())
