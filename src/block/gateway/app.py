"""Routes, and the one place where errors become HTTP."""

import asyncio
import logging
import os
import re
import time
from collections.abc import Coroutine, Sequence
from time import monotonic
from typing import Any, Final
from urllib.parse import unquote

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST

from block.core import InstanceId
from block.errors import ClientError
from block.gateway.admin import Admin
from block.gateway.config import GatewayConfig
from block.gateway.dispatch import Dispatcher
from block.gateway.exchange import Asked, Exchange
from block.gateway.keys import Keys
from block.gateway.members.membership import Membership
from block.gateway.members.pool import Pool
from block.gateway.peers import READ as PEERS_READ
from block.gateway.peers import STRATEGY, WORKER_ROUTES, instances_asked_for
from block.gateway.processes.workers import Whole, Workers, families_of
from block.gateway.records.gauges import read_gauges
from block.gateway.records.metrics import Metrics
from block.gateway.wire.continuation import tape_of
from block.gateway.wire.cors import Cors
from block.gateway.wire.http1 import HttpRequest
from block.gateway.wire.openai import GENERATING, Body, PromptRatio, as_request, read_body
from block.gateway.wire.openapi import document as openapi_document
from block.gateway.wire.proxy import ClientConnection, Surface
from block.policy.table import Policy

READY: Final = frozenset({"/ready", "/readiness", "/readyz", "/health_generate"})
LIVE: Final = frozenset({"/health", "/live", "/liveness", "/livez", "/healthz", "/ping"})
GETTING: Final = READY | LIVE | {"/metrics", "/openapi.json"}
WHAT_IF: Final = "/v1/decisions"
WITHOUT_SLASH: Final = GENERATING | GETTING | {"/v1/models"}
"""A slash behind these is taken off; an engine would redirect to itself."""
NEVER_PASSED: Final = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""They change an instance and must not be reachable through its gateway."""
ADMIN: Final = ("/admin/", "/workers/")
OWN: Final = ("/health", "/live", "/ping", "/read", "/metrics", *ADMIN, *WORKER_ROUTES, "/v1/decisions/")
"""What the other surfaces have (see `Surface`)."""
_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,256}")
_UNSAFE_PATH: Final = re.compile(r"(?:^|/)\.\.?(?:/|$)|%2e|%2f|%5c|//|\\", re.IGNORECASE)

log = logging.getLogger("block.gateway")


class App:
    """What every client connection talks to. Owns the set of connections."""

    def __init__(
        self, config: GatewayConfig, pool: Pool, dispatcher: Dispatcher, members: Membership, ratio: PromptRatio,
        metrics: Metrics, loop: asyncio.AbstractEventLoop,
    ) -> None:  # fmt: skip
        self.config, self.pool, self.dispatcher, self.metrics, self.loop = config, pool, dispatcher, metrics, loop
        self._ratio = ratio
        self.connections: set[ClientConnection] = set()
        self.self_test: str | None = None
        """Why predictions cannot be made here (then ready says no); ``None``: they can, or the policy needs none."""
        self.members = members
        self.admin = Admin(self, own_port=config.admin_port is not None)
        self.workers: Workers | None = None
        """The other processes of this gateway, where there are some."""
        self.tasks: set[asyncio.Task[None]] = set()
        self._keys = Keys(config.all_keys())
        self.cors = Cors(config.cors_allowed_origins)
        self._id_headers = _names(config.request_id_headers)
        self._reads_text = bool(getattr(dispatcher.decider.estimator, "reads_text", False))
        self._pass = config.passthrough

    def configure(self, config: GatewayConfig) -> None:
        """Limits and keys after a reload."""
        self._keys = Keys(config.all_keys())
        self.cors = Cors(config.cors_allowed_origins)
        self._id_headers = _names(config.request_id_headers)
        self.config = config

    # Connections

    def opened(self, client: ClientConnection) -> bool:
        """Take a connection; False when there are too many. A crowd at the front must not lock the other doors."""
        if len(self.connections) >= self.config.connections_max and client.surface is Surface.PUBLIC:
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
            self.refuse(client, http, error)
        except Exception:  # the outermost place: a bug here costs this request and no other
            log.exception("bug while handling %s %s", http.method.decode("latin-1"), http.path)
            if client.exchange is not None:
                client.exchange.client_gone()
            client.answer_error(
                ClientError(500, "The gateway made a mistake.", kind="server_error", code="internal_error"),
                self._id_line(http),
            )

    def _route(self, client: ClientConnection, http: HttpRequest) -> None:
        path = _without_slash(http)
        surface = client.surface
        if surface is not Surface.PUBLIC and not (
            path in GETTING if surface is Surface.METRICS else path.startswith(OWN)
        ):
            raise ClientError(404, f"There is no {path} on this port.", code="not_found")
        if http.method == b"OPTIONS" and self._answer_options(client, http, path):
            return
        if path in GENERATING:
            key_name = self._keys.name_of(http)
            if http.method != b"POST":
                raise _method_not_allowed(http, path)
            _check_encoding(http)
            self._proxy(client, http, read_body(http.body), key_name, generating=True)
        elif path == WHAT_IF and client.surface is Surface.PUBLIC:
            if http.method != b"POST":
                raise _method_not_allowed(http, path)
            self._what_if(client, http)
        elif _allowed_methods(path) is not None:
            self._own(client, http, path)
        elif path.startswith(ADMIN) or path in WORKER_ROUTES:
            self.admin.handle(client, http)
        elif path.startswith(self._pass) and path not in NEVER_PASSED and not _UNSAFE_PATH.search(path):
            key_name = self._keys.name_of(http)
            self._proxy(client, http, _lenient_body(http.body), key_name, generating=False)
        else:
            raise ClientError(404, f"There is no {path} here.", code="not_found")

    def _own(self, client: ClientConnection, http: HttpRequest, path: str) -> None:
        """What the gateway answers itself."""
        looks_up = path not in GETTING
        if looks_up and client.surface is Surface.PUBLIC:
            self._keys.name_of(http)
        elif looks_up:
            self.admin.check_allowed(client, http)
        if http.method not in (b"GET", b"HEAD"):
            raise _method_not_allowed(http, path)
        if looks_up:
            self._look_up(client, http, path)
        else:
            self._tell(client, http, path)

    def _answer_options(self, client: ClientConnection, http: HttpRequest, path: str) -> bool:
        """What may be done here, and by pages of other origins. Other routes of an engine answer for themselves."""
        lines = self.cors.preflight(http) if client.surface is Surface.PUBLIC else None
        allowed = _allowed_methods(path)
        if lines is None and allowed is None and path.startswith(self._pass):
            return False
        client.answer_nothing(b"allow: %b\r\n%b" % (allowed or b"GET, HEAD, POST, OPTIONS", lines or b""))
        return True

    def _tell(self, client: ClientConnection, http: HttpRequest, path: str) -> None:
        if path in LIVE:
            client.answer(200, b'{"status":"ok"}')
        elif path in READY:
            status, body = self._readiness()
            client.answer(status, body)
        elif path == "/openapi.json":
            client.answer(200, openapi_document())
        else:
            self._tell_metrics(client, http)

    def _tell_metrics(self, client: ClientConnection, http: HttpRequest) -> None:
        read_gauges(self)
        if client.surface is Surface.WORKER:
            client.answer(200, families_of(self.metrics.registry), b"application/msgpack")
        elif self.workers is not None:
            self.answer_later(client, http, self.workers.metrics(families_of(self.metrics.registry)))
        else:
            client.answer(200, self.metrics.render(), CONTENT_TYPE_LATEST.encode())

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

    def _look_up(self, client: ClientConnection, http: HttpRequest, path: str) -> None:
        if path.startswith("/v1/decisions/"):
            request_id = unquote(path.removeprefix("/v1/decisions/"))
            self.dispatcher.books.settle()
            found = self.dispatcher.decisions.explain(request_id)
            missing = ClientError(404, f"No decision about {request_id[:256]!r} is kept.", code="decision_not_found")
            if found is not None:
                client.answer(200, found)
            elif self.workers is not None and client.surface is not Surface.WORKER:
                self.answer_later(client, http, self.workers.find(path, missing))
            else:
                raise missing
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

    def _proxy(
        self, client: ClientConnection, http: HttpRequest, body: Body, key_name: str | None, *, generating: bool
    ) -> None:  # fmt: skip
        dispatcher = self.dispatcher
        client.exchange = exchange = self._exchange(client, http, body, key_name, generating=generating)
        if dispatcher.config.continue_streams and exchange.stream and generating:
            exchange.tape = tape_of(http.target, http.body, exchange.request)
        if dispatcher.tracing is not None:
            dispatcher.tracing.begin(exchange)
        dispatcher.start(exchange)

    def _what_if(self, client: ClientConnection, http: HttpRequest) -> None:
        """Where a request would go now and what would become of it; nothing is sent."""
        exchange = self._exchange(client, http, read_body(http.body), self._keys.name_of(http), generating=True)
        extra = b"x-request-id: %b\r\n" % exchange.request.id.encode()
        client.answer(200, self.dispatcher.would(exchange), extra=extra)

    def _exchange(
        self, client: ClientConnection, http: HttpRequest, body: Body, key_name: str | None, *, generating: bool
    ) -> Exchange:  # fmt: skip
        model = body.model or ""
        if not self.pool.knows(model):
            raise _no_such_model(model)
        request_id = self._id_of(http)
        dispatcher, only, strategy = self.dispatcher, None, None
        if not PEERS_READ.isdisjoint(http.fields):
            only, strategy = self._asked_for(http)
        if only is None and (body.previous_response_id is not None or not generating):
            owner = dispatcher.owners.of(http.path, body.previous_response_id)
            only = frozenset((owner,)) if owner in self.pool.instances else None
        arrived_s = monotonic()
        request, prompt_bytes = as_request(
            http, body, request_id=request_id, arrived_s=time.time(), ratio=self._ratio,
            reads_text=generating and self._reads_text, objectives=self.config.objectives, key_name=key_name,
            reads_prefix=generating and (strategy or dispatcher.decider.policy).rank.prefix,
        )  # fmt: skip
        exchange = Exchange(
            dispatcher, client, http, request,
            stream=bool(body.stream), generating=generating, prompt_bytes=prompt_bytes, arrived_s=arrived_s,
        )  # fmt: skip
        exchange.asked = Asked(only, strategy, body.length_hint)
        return exchange

    def _asked_for(self, http: HttpRequest) -> tuple[frozenset[InstanceId] | None, Policy | None]:
        """Where the request's own headers let it go, and the policy they name."""
        name = http.header(STRATEGY)
        strategy = None if name is None else self.dispatcher.decider.strategy(name)
        return instances_asked_for(http, self.pool.instances), strategy

    def _id_of(self, http: HttpRequest) -> str:
        """The request's id, as the client gave it or made here.

        Raises:
            ClientError: 400, it could not stand in a header again.
        """
        for name in self._id_headers:
            given = http.header(name)
            if given is None:
                continue
            if not _REQUEST_ID.fullmatch(given):
                header = name.decode("latin-1")
                raise ClientError(400, f"The header {header} must be 1-256 visible ASCII characters.", param=header)
            return given
        return os.urandom(16).hex()

    def _id_line(self, http: HttpRequest) -> bytes:
        """The same as a header line of an answer, whatever the client gave."""
        try:
            return b"x-request-id: %b\r\n" % self._id_of(http).encode()
        except ClientError:
            return b"x-request-id: %b\r\n" % os.urandom(16).hex().encode()

    # Answers that others have a part in

    def answer_later(self, client: ClientConnection, http: HttpRequest, made: Coroutine[Any, Any, Whole]) -> None:
        """Answer with what is still to be asked of the other workers."""
        task = self.loop.create_task(self._answer_later(client, http, made))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _answer_later(
        self, client: ClientConnection, http: HttpRequest, made: Coroutine[Any, Any, Whole]
    ) -> None:  # fmt: skip
        try:
            status, body, content_type = await made
        except ClientError as error:
            if client.awaits(http):
                self.refuse(client, http, error)
            return
        if client.awaits(http):
            client.answer(status, body, content_type)

    def refuse(self, client: ClientConnection, http: HttpRequest, error: ClientError) -> None:
        """An error as the answer to a request that got no further than here."""
        self.metrics.errors.labels(error.code or str(error.status)).inc()
        extra = self._id_line(http)
        if error.status == 405:
            extra += b"allow: %b\r\n" % (_allowed_methods(http.path) or b"GET, HEAD, POST, OPTIONS")
        client.answer_error(error, extra)


def _names(headers: Sequence[str]) -> tuple[bytes, ...]:
    return tuple(name.lower().encode() for name in headers)


def _allowed_methods(path: str) -> bytes | None:
    """Of the gateway's own routes; ``None``: it is none of them."""
    if path in GENERATING or path == WHAT_IF:
        return b"POST, OPTIONS"
    if path in GETTING or path == "/v1/models" or path.startswith(("/v1/models/", "/v1/decisions/")):
        return b"GET, HEAD, OPTIONS"
    return None


def _without_slash(http: HttpRequest) -> str:
    """The request's path; a slash behind one of the gateway's own is taken off."""
    path = http.path
    if not path.endswith("/") or path[:-1] not in WITHOUT_SLASH:
        return path
    path = path[:-1]
    http.target = path.encode() + http.target[len(path) + 1 :]
    return path


def _check_encoding(http: HttpRequest) -> None:
    coding = http.fields.get(b"content-encoding")
    if coding is not None and coding.lower() != b"identity":
        raise ClientError(
            415, f"Request bodies in {coding.decode('latin-1')} are not taken: send it plain.",
            param="content-encoding", code="unsupported_content_encoding",
        )  # fmt: skip


def _lenient_body(body: bytes) -> Body:
    """The fields of a body that need not be JSON (other routes of the engine)."""
    try:
        return read_body(body)
    except ClientError:
        return Body()


def _no_such_model(name: str) -> ClientError:
    return ClientError(404, f"The model {name[:256]!r} does not exist here.", code="model_not_found", param="model")


def _method_not_allowed(http: HttpRequest, path: str) -> ClientError:
    return ClientError(405, f"{http.method.decode('latin-1')} is not allowed on {path}.", code="method_not_allowed")
