"""One request and its answer: the client on one side, an instance's connection on the other, bytes going through.

    waiting ──send──> sent ──head──> answering ──last byte──> over
       ^                │                │
       └── retry ───────┘                └── broken: an SSE error event, or the connection is cut

Nothing of an answer is kept except its last bytes (for the usage). The dispatcher decides; this carries.
"""

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from block.core import Decision, Prediction, Request
from block.errors import ClientError, InstanceUnreachableError, StreamBrokenError
from block.gateway.answers import AnswerHead
from block.gateway.http1 import LAST_CHUNK, HttpRequest, answer_head, chunk, request_head
from block.gateway.openai import error_object
from block.gateway.pool import Instance
from block.gateway.upstream import UpstreamConnection
from block.gateway.usage import UsageStrip, asking_for_usage

if TYPE_CHECKING:
    from block.gateway.dispatch import Dispatcher
    from block.gateway.proxy import ClientConnection

RETRYABLE: Final = frozenset({429, 500, 502, 503, 504})


class Exchange:
    """Written by the dispatcher (where it goes) and by the two connections' callbacks (what came)."""

    __slots__ = (
        "answered_s",
        "arrived_s",
        "asked_usage",
        "attempts",
        "before_last",
        "chunked",
        "client",
        "connecting",
        "connection",
        "decision",
        "dispatcher",
        "estimate",
        "events",
        "expected_total",
        "first_byte_s",
        "generating",
        "head_sent",
        "http",
        "instance",
        "keep_alive",
        "key",
        "last",
        "over",
        "overhead_s",
        "paused_s",
        "prediction",
        "prompt_bytes",
        "queued_s",
        "request",
        "resent",
        "sent_s",
        "sse",
        "status",
        "stream",
        "strip",
        "tokens",
        "tried",
    )  # fmt: skip

    def __init__(
        self, dispatcher: "Dispatcher", client: "ClientConnection", http: HttpRequest, request: Request, *,
        stream: bool, generating: bool, prompt_bytes: int, arrived_s: float,
    ) -> None:  # fmt: skip
        self.dispatcher, self.client, self.http, self.request = dispatcher, client, http, request
        self.stream, self.generating, self.prompt_bytes = stream, generating, prompt_bytes
        self.arrived_s = arrived_s  # monotonic, as all times here
        self.keep_alive = http.keep_alive
        self.instance: Instance | None = None
        self.connection: UpstreamConnection | None = None
        self.connecting: asyncio.Task[None] | None = None
        self.decision: Decision | None = None
        self.prediction: Prediction | None = None
        self.tried: set[str] = set()
        self.attempts = 0
        self.resent = False
        self.key = 0
        self.tokens = 0
        self.expected_total = 0
        self.estimate: Any = None
        self.status = 0
        self.head_sent = self.sse = self.chunked = self.over = False
        self.events = 0
        self.asked_usage = False
        """The instance is asked for usage that the client did not ask for."""
        self.strip: UsageStrip | None = None
        self.before_last = self.last = b""
        """The last two reads of the answer, for the usage in them."""
        self.queued_s = self.sent_s = self.first_byte_s = self.answered_s = self.paused_s = self.overhead_s = 0.0

    # Towards the instance

    def send_on(self, connection: UpstreamConnection, instance: Instance) -> None:
        """Write the request to an instance's connection."""
        self.connection = connection
        extra = (
            b"" if b"x-request-id" in self.http.fields else b"x-request-id: %b\r\n" % self.request.id.encode("latin-1")
        )
        self.sent_s = monotonic()
        if not self.overhead_s:
            self.overhead_s = self.sent_s - self.arrived_s
            self.dispatcher.metrics.overhead.observe(self.overhead_s)
        body = asking_for_usage(self.http.target, self.http.body) if instance.counts_usage and self.generating else None
        self.asked_usage = body is not None
        body = self.http.body if body is None else body
        connection.send(self, request_head(self.http, instance.host_header, extra, instance.prefix, body), body)

    @property
    def tokens_seen(self) -> int | None:
        """Output tokens of the answer so far; ``None``: it is not streamed."""
        if not self.stream:
            return None
        if self.strip is not None and self.strip.tokens is not None:
            return self.strip.tokens
        return max(0, self.events - (b"/chat/" in self.http.target))  # a chat opens with the role alone

    @property
    def prompt_seen(self) -> int | None:
        """Prompt tokens, if the instance has told them by now."""
        return None if self.strip is None else self.strip.prompt_tokens

    # From the instance (upstream.Receiver)

    def head_received(self, head: AnswerHead) -> None:
        instance, dispatcher = self.instance, self.dispatcher
        assert instance is not None
        instance.last_byte_s = monotonic()
        self.status = head.status
        if head.status in RETRYABLE and dispatcher.declines(self, head.status):
            return
        if self.http.version == "1.0" and head.chunked:
            self._drop_connection()
            self.refuse(ClientError(505, "A streamed answer needs HTTP/1.1."))
            return
        self.sse = head.fields.get(b"content-type", b"").startswith(b"text/event-stream")
        self.chunked = head.chunked
        if head.length is None and not head.chunked:
            self.keep_alive = False
        self.keep_alive = self.keep_alive and not dispatcher.draining
        if self.sse:
            instance.streaming += 1
            if self.asked_usage and head.length is None and b"content-encoding" not in head.fields:
                self.strip = UsageStrip(chunked=head.chunked)
        self.head_sent = True
        self.client.transport.write(answer_head(head.status, self._answer_lines(head, instance)))

    def _answer_lines(self, head: AnswerHead, instance: Instance) -> bytes:
        lines = b"%bx-request-id: %b\r\n%b" % (
            b"".join(head.lines),
            self.request.id.encode("latin-1"),
            instance.header_lines,
        )
        if self.dispatcher.decision_headers:
            lines += b"x-block-overhead-ms: %.3f\r\n" % (self.overhead_s * 1e3)
            if self.prediction is not None:
                lines += b"x-predicted-ttft-ms: %.1f\r\nx-predicted-e2e-ms: %.1f\r\n" % (
                    self.prediction.ttft_s * 1e3, self.prediction.e2e_s * 1e3,
                )  # fmt: skip
        if self.sse:
            lines += b"x-accel-buffering: no\r\n"
            if b"cache-control" not in head.fields:
                lines += b"cache-control: no-cache\r\n"
        return lines if self.keep_alive else lines + b"connection: close\r\n"

    def body_received(self, data: bytes) -> None:
        self.client.transport.write(data if self.strip is None else self.strip.feed(data))
        self.instance.last_byte_s = now_s = monotonic()  # type: ignore[union-attr]
        if not self.first_byte_s:
            self.first_byte_s = now_s
        if self.sse:
            self.events += data.count(b"data:")
        self.before_last, self.last = self.last, data

    def answer_ended(self) -> None:
        self.connection = None
        if self.strip is not None and not self.strip.chunked:
            self.client.transport.write(self.strip.rest())
        self.answered_s = monotonic()
        self.dispatcher.ended(self, None)
        self.client.exchange_ended(keep_alive=self.keep_alive)

    def answer_failed(self, error: InstanceUnreachableError | StreamBrokenError) -> None:
        connection, self.connection = self.connection, None
        stale = connection is not None and connection.reused and not connection.answered and not self.resent
        if not self.head_sent:
            self.dispatcher.failed_unanswered(self, error, stale_connection=stale)
            return
        self.break_off(
            f"The instance broke off its answer: {error}.",
            "instance_failed",
            aligned=connection is None or connection.aligned,
        )
        self.dispatcher.ended(self, error)

    # Towards the client

    def refuse(self, error: ClientError, extra: bytes = b"") -> None:
        """Answer with an error instead of an instance's answer, and end."""
        self.dispatcher.ended(self, error)
        self.client.answer_error(error, extra + b"x-request-id: %b\r\n" % self.request.id.encode("latin-1"))

    def break_off(self, message: str, code: str, *, aligned: bool) -> None:
        """The answer has begun and cannot go on: an error event where the framing allows one, else cut the connection."""
        if self.sse and self.chunked and aligned:
            event = b"" if self.last.endswith(b"\n\n\r\n") or not self.last else b"\n\n"
            event += b"data: " + error_object(message, "server_error", code, None) + b"\n\n"
            self.client.transport.write(chunk(event) + LAST_CHUNK)
            self.client.exchange_ended(keep_alive=self.keep_alive)
        else:
            self.client.exchange_ended(keep_alive=False)

    def timed_out(self) -> None:
        """The request's deadline passed."""
        aligned = self.connection is None or self.connection.aligned
        self._drop_connection()
        error = ClientError(
            504, "The request took longer than this gateway allows.", kind="timeout_error", code="timeout"
        )
        if self.head_sent:
            self.dispatcher.ended(self, error)
            self.break_off(error.message, "timeout", aligned=aligned)
        else:
            self.refuse(error)

    # From the client

    def client_gone(self) -> None:
        """The client left: the engine shall stop working for it."""
        self._drop_connection()
        self.dispatcher.abandoned(self)

    def client_paused(self) -> None:
        self.paused_s = monotonic()
        if self.connection is not None:
            self.connection.pause()

    def client_resumed(self) -> None:
        self.paused_s = 0.0
        if self.connection is not None:
            self.connection.resume()

    def _drop_connection(self) -> None:
        if self.connecting is not None:
            self.connecting.cancel()
            self.connecting = None
        if self.connection is not None:
            self.connection.abandon()
            self.connection = None
