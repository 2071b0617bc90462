"""The client's side: one TCP connection, its requests one after the other, answers written as they come."""

import asyncio
from collections import deque
from enum import Enum
from time import monotonic
from typing import TYPE_CHECKING, cast

from block.errors import ClientError
from block.gateway.wire.cors import Cors
from block.gateway.wire.http1 import CONTINUE, HttpRequest, ProtocolError, RequestReader, answer_head, whole_answer
from block.gateway.wire.openai import error_object
from block.gateway.wire.upstream import set_nodelay

if TYPE_CHECKING:
    from block.gateway.app import App
    from block.gateway.exchange import Exchange

JSON = b"application/json"


class Surface(Enum):
    """Which door a client came through: the one for everybody, the admin port, the metrics' port, or the socket between workers."""

    PUBLIC = "public"
    ADMIN = "admin"
    METRICS = "metrics"
    WORKER = "worker"


class ClientConnection(asyncio.Protocol):
    """Reads requests, hands them to the app one at a time, closes when told or when the client is too slow."""

    __slots__ = (
        "_app",
        "_broken",
        "_closing",
        "_waiting",
        "exchange",
        "http",
        "reader",
        "since_s",
        "surface",
        "transport",
    )

    def __init__(self, app: "App", surface: Surface = Surface.PUBLIC) -> None:
        self._app = app
        self.surface = surface
        config = app.config
        self.reader = RequestReader(
            self._on_request, self._on_expect,
            header_bytes_max=config.header_bytes_max, request_bytes_max=config.request_bytes_max,
        )  # fmt: skip
        self._waiting: deque[HttpRequest] = deque()  # pipelined; bounded by PIPELINED_MAX, reading pauses at the first
        self._broken: ProtocolError | None = None
        self._closing = False
        self.exchange: Exchange | None = None
        self.http: HttpRequest | None = None
        """The request being answered."""
        self.since_s = monotonic()
        """When the current state began: idle, or a request coming in."""
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        set_nodelay(transport)
        if not self._app.opened(self):
            self._closing = True
            error = ClientError(
                503,
                "The gateway has as many connections as it takes.",
                kind="server_error",
                code="too_many_connections",
            )
            self.transport.write(error_answer(error, keep_alive=False))
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        if self.reader.between:
            self.since_s = monotonic()
        try:
            self.reader.feed(data)
        except ProtocolError as error:
            self._broken = error
            if self.http is None:
                self._refuse_bytes(error)

    def _on_expect(self) -> None:
        if self.http is None and not self._waiting:
            self.transport.write(CONTINUE)

    def _on_request(self, http: HttpRequest) -> None:
        if self.http is not None:
            self._waiting.append(http)
            self.transport.pause_reading()
            return
        self.http = http
        self._app.handle(self, http)

    def _refuse_bytes(self, error: ProtocolError) -> None:
        self._closing = True
        self._app.metrics.errors.labels(f"http_{error.status}").inc()
        self.transport.write(error_answer(ClientError(error.status, str(error), code="bad_http"), keep_alive=False))
        self.transport.close()

    # Answers

    @property
    def cors(self) -> Cors:
        """What pages of other origins may."""
        return self._app.cors

    def answer(self, status: int, body: bytes, content_type: bytes = JSON, extra: bytes = b"") -> None:
        """A whole answer to the current request."""
        assert self.http is not None
        if self._app.cors:
            extra += self._app.cors.lines(self.http)
        keep_alive = self.http.keep_alive and not self._app.dispatcher.draining
        data = whole_answer(status, body, content_type, extra, keep_alive=keep_alive)
        if self.http.method == b"HEAD":
            data = data[: len(data) - len(body)]
        self.transport.write(data)
        self.exchange_ended(keep_alive=keep_alive)

    def answer_nothing(self, extra: bytes) -> None:
        """204: there is nothing to say but ``extra`` header lines."""
        assert self.http is not None
        keep_alive = self.http.keep_alive and not self._app.dispatcher.draining
        self.transport.write(answer_head(204, extra if keep_alive else extra + b"connection: close\r\n"))
        self.exchange_ended(keep_alive=keep_alive)

    def awaits(self, http: HttpRequest) -> bool:
        """Whether this request is still without an answer and somebody is there to get one."""
        return self.http is http and not self._closing and not self.transport.is_closing()

    def answer_error(self, error: ClientError, extra: bytes = b"") -> None:
        """An OpenAI error object as the answer to the current request."""
        self.answer(error.status, error_object(error.message, error.kind, error.code, error.param), JSON, extra)

    def exchange_ended(self, *, keep_alive: bool) -> None:
        """The current answer is written: the next request, if one waits."""
        self.exchange = self.http = None
        if not keep_alive:
            self._closing = True
            self._waiting.clear()
            self.transport.close()
            return
        self.since_s = monotonic()
        if self._waiting:
            self._app.loop.call_soon(self._next)
        elif self._broken is not None:
            self._refuse_bytes(self._broken)

    def _next(self) -> None:
        if self.http is not None or self._closing or not self._waiting:
            return
        self.http = self._waiting.popleft()
        if not self._waiting:
            self.transport.resume_reading()
        self._app.handle(self, self.http)

    # The transport's callbacks

    def pause_writing(self) -> None:
        if self.exchange is not None:
            self.exchange.client_paused()

    def resume_writing(self) -> None:
        if self.exchange is not None:
            self.exchange.client_resumed()

    def abort(self) -> None:
        """Cut the connection."""
        self._closing = True
        self.transport.abort()

    def close_if_idle(self) -> None:
        """Drain: nothing is being answered, so it can go."""
        if self.http is None and not self.reader.in_head and self.reader.between:
            self._closing = True
            self.transport.close()

    def overdue(self, now_s: float) -> bool:
        """Whether the client is too slow: idle for too long, or its request does not get whole."""
        if self.http is not None:
            return False
        config = self._app.config
        limit_s = (
            config.idle_timeout_s
            if self.reader.between
            else config.header_timeout_s
            if self.reader.in_head
            else config.body_timeout_s
        )
        return now_s - self.since_s > limit_s

    def time_out(self) -> None:
        """Close a slow client's connection, with a word if it was in the middle of a request."""
        if self.reader.between:
            self._closing = True
            self.transport.close()
        else:
            self._refuse_bytes(ProtocolError(408, "The request did not arrive in time."))

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self._waiting.clear()
        self._app.closed(self)
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.client_gone()


def error_answer(error: ClientError, *, keep_alive: bool) -> bytes:
    """A whole answer with OpenAI's error object."""
    return whole_answer(
        error.status, error_object(error.message, error.kind, error.code, error.param), JSON, keep_alive=keep_alive
    )
