"""Routes, and the one place where errors become HTTP."""

import asyncio
import hmac
import logging
import os
import re
import time
from time import monotonic
from typing import Any, Final
from urllib.parse import unquote

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST

from block.errors import ClientError, UserError
from block.gateway.config import GatewayConfig, InstanceConfig
from block.gateway.dispatch import Dispatcher
from block.gateway.exchange import Exchange
from block.gateway.http1 import HttpRequest
from block.gateway.metrics import Metrics
from block.gateway.openai import GENERATING, Body, PromptRatio, as_request, read_body
from block.gateway.pool import Instance, Pool, State
from block.gateway.proxy import ClientConnection

READY: Final = frozenset({"/ready", "/readiness", "/readyz"})
LIVE: Final = frozenset({"/health", "/live", "/liveness", "/livez", "/healthz"})
NEVER_PASSED: Final = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""They change an instance and must not be reachable through its gateway."""
_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,256}")
_UNSAFE_PATH: Final = re.compile(r"(?:^|/)\.\.?(?:/|$)|%2e|%2f|%5c|//|\\", re.IGNORECASE)

log = logging.getLogger("block.gateway")


class App:
    """What every client connection talks to. Owns the set of connections."""

    def __init__(
        self, config: GatewayConfig, pool: Pool, dispatcher: Dispatcher, ratio: PromptRatio, metrics: Metrics,
        loop: asyncio.AbstractEventLoop,
    ) -> None:  # fmt: skip
        self.config, self.pool, self.dispatcher, self.metrics, self.loop = config, pool, dispatcher, metrics, loop
        self._ratio = ratio
        self.connections: set[ClientConnection] = set()
        self.self_test: str | None = None
        """Why predictions cannot be made here (then ready says no); ``None``: they can, or the policy needs none."""
        self.membership: Membership | None = None
        self._keys = [key.encode() for key in config.all_keys()]
        self._reads_text = bool(getattr(dispatcher.decider.estimator, "reads_text", False))
        self._pass = config.passthrough

    def configure(self, config: GatewayConfig) -> None:
        """Limits and keys after a reload."""
        self._keys = [key.encode() for key in config.all_keys()]
        self.config = config

    # Connections

    def opened(self, client: ClientConnection) -> bool:
        """Take a connection; False when there are too many."""
        if len(self.connections) >= self.config.connections_max:
            return False
        self.connections.add(client)
        return True

    def closed(self, client: ClientConnection) -> None:
        self.connections.discard(client)

    # Requests

    def handle(self, client: ClientConnection, http: HttpRequest) -> None:
        """Answer one request, at once or by an exchange that answers later."""
        try:
            self._route(client, http)
        except ClientError as error:
            self.metrics.errors.labels(error.code or str(error.status)).inc()
            client.answer_error(error, _echoed_id(http))
        except Exception:  # the outermost place: a bug here costs this request and no other
            log.exception("bug while handling %s %s", http.method.decode("latin-1"), http.path)
            if client.exchange is not None:
                client.exchange.client_gone()
            client.answer_error(
                ClientError(500, "The gateway made a mistake.", kind="server_error", code="internal_error"),
                _echoed_id(http),
            )

    def _route(self, client: ClientConnection, http: HttpRequest) -> None:
        path = http.path
        if path in GENERATING:
            self._authorize(http)
            if http.method != b"POST":
                raise _method_not_allowed(http, path)
            self._proxy(client, http, read_body(http.body), generating=True)
        elif http.method in (b"GET", b"HEAD") and self._answer_own(client, path):
            pass
        elif path == "/v1/models" or path.startswith(("/v1/models/", "/v1/decisions/")):
            self._authorize(http)
            if http.method not in (b"GET", b"HEAD"):
                raise _method_not_allowed(http, path)
            self._look_up(client, path)
        elif path.startswith("/admin/"):
            self._administer(client, http, path)
        elif path.startswith(self._pass) and path not in NEVER_PASSED and not _UNSAFE_PATH.search(path):
            self._authorize(http)
            self._proxy(client, http, _lenient_body(http.body), generating=False)
        else:
            raise ClientError(404, f"There is no {path} here.", code="not_found")

    def _answer_own(self, client: ClientConnection, path: str) -> bool:
        if path in LIVE:
            client.answer(200, b'{"status":"ok"}')
        elif path in READY:
            status, body = self._readiness()
            client.answer(status, body)
        elif path == "/metrics":
            self._gauge()
            client.answer(200, self.metrics.render(), CONTENT_TYPE_LATEST.encode())
        else:
            return False
        return True

    def _readiness(self) -> tuple[int, bytes]:
        reason = None
        if self.dispatcher.draining:
            reason = "draining"
        elif not self.pool.ready():
            reason = f"no instance is ready: {self.pool.why_none()}"
        elif self.self_test is not None:
            reason = self.self_test
        body = {
            "status": "ok" if reason is None else "not ready",
            "reason": reason,
            "ready_endpoints": len(self.pool.ready()),
        }
        return 200 if reason is None else 503, msgspec.json.encode(body)

    def _authorize(self, http: HttpRequest) -> None:
        if not self._keys:
            return
        given = http.fields.get(b"authorization", b"")
        token = given[7:].strip() if given[:7].lower() == b"bearer " else b""
        if not sum(hmac.compare_digest(token, key) for key in self._keys):
            raise ClientError(
                401, "The API key is missing or wrong.", kind="authentication_error", code="invalid_api_key"
            )

    def _look_up(self, client: ClientConnection, path: str) -> None:
        if path.startswith("/v1/decisions/"):
            request_id = unquote(path.removeprefix("/v1/decisions/"))
            found = self.dispatcher.decisions.explain(request_id)
            if found is None:
                raise ClientError(404, f"No decision about {request_id[:256]!r} is kept.", code="decision_not_found")
            client.answer(200, found)
            return
        models: dict[str, bytes] = {}
        for instance in self.pool.instances.values():
            for name, entry in (instance.models or {}).items():
                models.setdefault(name, entry)
        if path == "/v1/models":
            client.answer(200, b'{"object":"list","data":[%b]}' % b",".join(models.values()))
            return
        name = unquote(path.removeprefix("/v1/models/"))
        if name not in models:
            raise _no_such_model(name)
        client.answer(200, models[name])

    def _proxy(self, client: ClientConnection, http: HttpRequest, body: Body, *, generating: bool) -> None:
        model = body.model or ""
        if not self.pool.knows(model):
            raise _no_such_model(model)
        request_id = http.header(b"x-request-id")
        if request_id is None:
            request_id = os.urandom(16).hex()
        elif not _REQUEST_ID.fullmatch(request_id):
            raise ClientError(
                400, "The header x-request-id must be 1-256 visible ASCII characters.", param="x-request-id"
            )
        dispatcher = self.dispatcher
        arrived_s = monotonic()
        request, prompt_bytes = as_request(
            http, body, request_id=request_id, arrived_s=time.time(), ratio=self._ratio,
            reads_text=generating and self._reads_text,
        )  # fmt: skip
        exchange = Exchange(
            dispatcher, client, http, request,
            stream=bool(body.stream), generating=generating, prompt_bytes=prompt_bytes, arrived_s=arrived_s,
        )  # fmt: skip
        client.exchange = exchange
        dispatcher.start(exchange)

    # Administration

    def _administer(self, client: ClientConnection, http: HttpRequest, path: str) -> None:
        """``/admin/instances``: GET lists, POST adds; ``/admin/instances/NAME``: DELETE removes, ``.../drain``: POST drains."""
        key = self.config.admin_key
        if not key or self.membership is None:
            raise ClientError(404, "There is no administration here: no admin key is set.", code="not_found")
        given = http.fields.get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + key.encode()):
            raise ClientError(
                401, "The admin key is missing or wrong.", kind="authentication_error", code="invalid_api_key"
            )
        parts = [unquote(part) for part in path.removeprefix("/admin/").split("/")]
        match (http.method, parts):
            case (b"GET", ["instances"]):
                client.answer(
                    200, msgspec.json.encode({"data": [self._describe(i) for i in self.pool.instances.values()]})
                )
            case (b"POST", ["instances"]):
                client.answer(
                    201, msgspec.json.encode(self._describe(self.membership.join(_instance_of(http.body, self.pool))))
                )
            case (b"POST", ["instances", name, "drain"]):
                instance = self._instance(name)
                self.pool.drain(instance)
                client.answer(200, msgspec.json.encode(self._describe(instance)))
            case (b"DELETE", ["instances", name]):
                instance = self._instance(name)
                self.membership.leave(instance)
                client.answer(200, msgspec.json.encode(self._describe(instance)))
            case _:
                raise ClientError(404, f"There is no {http.method.decode()} {path} here.", code="not_found")

    def _instance(self, name: str) -> Instance:
        for instance in self.pool.instances.values():
            if instance.id == name:
                return instance
        raise ClientError(404, f"There is no instance named {name[:256]!r}.", code="instance_not_found")

    def _describe(self, instance: Instance) -> dict[str, Any]:
        evidence = self.dispatcher.decider.evidence.get(instance.id)
        return {
            "name": instance.id, "url": instance.config.url, "predictor": instance.config.predictor,
            "profile": instance.config.profile,
            "state": instance.state, "reason": instance.reason, "suspect": instance.suspect, "in_flight": instance.in_flight,
            "models": sorted(instance.models or ()), "evidence": evidence and (evidence.problem or "fresh"),
            "trial": instance.trial,
        }  # fmt: skip

    def _gauge(self) -> None:
        """Gauges are read from the state when someone asks."""
        metrics, now_s = self.metrics, time.time()
        metrics.ready.set(len(self.pool.ready()))
        metrics.queue_size.set(len(self.dispatcher.queue))
        metrics.connections.set(len(self.connections))
        for instance in self.pool.instances.values():
            name = instance.id
            metrics.health.labels(name).set(instance.state is State.READY)
            metrics.circuit.labels(name).set(1 if instance.circuit_open_until_s else 0 if instance.trial is None else 2)
            metrics.suspect.labels(name).set(instance.suspect is not None)
            metrics.in_flight.labels(name).set(instance.in_flight)
            metrics.in_flight_tokens.labels(name).set(instance.in_flight_tokens)
            evidence = self.dispatcher.decider.evidence.get(name)
            if evidence is not None and (instance.config.predictor or instance.config.profile):
                metrics.unseen.labels(name).set(evidence.unseen)
                metrics.stale.labels(name).set(evidence.age_s(now_s) if evidence.frames else float("inf"))


class Membership:
    """Who can add and remove instances while the gateway runs (see ``serve``)."""

    def join(self, config: InstanceConfig) -> Instance:
        raise NotImplementedError

    def leave(self, instance: Instance) -> None:
        raise NotImplementedError


def _echoed_id(http: HttpRequest) -> bytes:
    given = http.header(b"x-request-id")
    return b"x-request-id: %b\r\n" % given.encode() if given is not None and _REQUEST_ID.fullmatch(given) else b""


def _lenient_body(body: bytes) -> Body:
    """The fields of a body that need not be JSON (other routes of the engine)."""
    try:
        return read_body(body)
    except ClientError:
        return Body()


def _instance_of(body: bytes, pool: Pool) -> InstanceConfig:
    try:
        config = msgspec.json.decode(body, type=InstanceConfig)
    except (msgspec.DecodeError, UserError) as error:
        raise ClientError(400, f"This is not an instance: {error}") from None
    if config.id in pool.instances:
        raise ClientError(409, f"There is an instance named {config.id!r} already.", code="instance_exists")
    return config


def _no_such_model(name: str) -> ClientError:
    return ClientError(404, f"The model {name[:256]!r} does not exist here.", code="model_not_found", param="model")


def _method_not_allowed(http: HttpRequest, path: str) -> ClientError:
    return ClientError(405, f"{http.method.decode('latin-1')} is not allowed on {path}.", code="method_not_allowed")
