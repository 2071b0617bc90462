"""One request and its answer: the client on one side, an instance's connection on the other, bytes going through.

    waiting ──send──> sent ──head──> answering ──last byte──> over
       ^                │                │
       └── retry ───────┘                └── broken: an SSE error event, or the connection is cut

Nothing of an answer is kept except its last bytes (for the usage). The dispatcher decides; this carries.
"""

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from block.core import Decision, InstanceId, Prediction, Request
from block.errors import ClientError, InstanceUnreachableError, StreamBrokenError
from block.gateway.deciding.residuals import Interval
from block.gateway.members.pool import Instance
from block.gateway.wire.answers import AnswerHead
from block.gateway.wire.continuation import Tape
from block.gateway.wire.headers import prediction_lines
from block.gateway.wire.http1 import LAST_CHUNK, HttpRequest, Unchunked, answer_head, chunk, request_head
from block.gateway.wire.openai import error_object
from block.gateway.wire.upstream import Receiver, UpstreamConnection
from block.gateway.wire.usage import UsageStrip, asking_for_usage
from block.policy.table import Policy

if TYPE_CHECKING:
    from block.gateway.dispatch import Dispatcher
    from block.gateway.wire.proxy import ClientConnection

KEEP_ALIVE: Final = chunk(b": keep-alive\n\n")
RETRYABLE: Final = frozenset({429, 500, 502, 503, 504})


class Asked(NamedTuple):
    """What the client itself said of where its request shall go: among which instances, by which policy, and how many tokens
    its answer may have. ``None``: nothing."""

    only: frozenset[InstanceId] | None = None
    strategy: Policy | None = None
    tokens: int | None = None


NOTHING: Final = Asked()


class Exchange(Receiver):
    """Written by the dispatcher (where it goes) and by the two connections' callbacks (what came)."""

    __slots__ = (
        "answered_s",
        "arrival",
        "arrived_s",
        "asked",
        "asked_usage",
        "attempts",
        "chunked",
        "client",
        "connecting",
        "connection",
        "decided_s",
        "deciding_s",
        "decision",
        "dispatcher",
        "estimate",
        "expected_total",
        "first_byte_s",
        "generating",
        "head_sent",
        "held_head",
        "http",
        "instance",
        "interval",
        "keep_alive",
        "key",
        "output_tokens",
        "over",
        "overhead_s",
        "paused_s",
        "prediction",
        "prompt_bytes",
        "queued_s",
        "request",
        "resent",
        "sent_s",
        "span",
        "sse",
        "status",
        "stream",
        "streaming",
        "strip",
        "tape",
        "tokens",
        "tried",
    )  # fmt: skip

    def __init__(
        self, dispatcher: "Dispatcher", client: "ClientConnection", http: HttpRequest, request: Request, *,
        stream: bool, generating: bool, prompt_bytes: int, arrived_s: float,
    ) -> None:  # fmt: skip
        self.dispatcher, self.client, self.http, self.request = dispatcher, client, http, request
        self.stream, self.generating, self.prompt_bytes = stream, generating, prompt_bytes
        super().__init__(client.transport.write)
        self.arrived_s = self.heard_s = arrived_s  # monotonic, as all times here
        self.keep_alive = http.keep_alive
        self.instance: Instance | None = None
        self.connection: UpstreamConnection | None = None
        self.connecting: asyncio.Task[None] | None = None
        self.decision: Decision | None = None
        self.prediction: Prediction | None = None
        self.interval: Interval | None = None
        """Around the prediction; both count from ``decided_s``."""
        self.decided_s = arrived_s
        self.deciding_s = 0.0
        """How long the last decision took."""
        self.asked = NOTHING
        self.tried: set[str] = set()
        self.attempts = 0
        self.resent = False
        self.key = 0
        self.tokens = 0
        self.expected_total = 0
        self.estimate: Any = None
        self.arrival: int | None = None
        """Its number among the recent arrivals."""
        self.output_tokens: int | None = None
        """Of a whole answer, as counted at its end."""
        self.status = 0
        self.head_sent = self.sse = self.chunked = self.over = False
        self.held_head = b""
        """A stream's head, until its first byte: engines send it before they have done anything, and may still fail."""
        self.asked_usage = False
        """The instance is asked for usage that the client did not ask for."""
        self.strip: UsageStrip | Tape | None = None
        """What the answer's bytes go through on their way to the client."""
        self.tape: Tape | None = None
        """What of a streamed answer was given, where another instance may go on with it."""
        self.streaming = False
        """It is counted among its instance's streams."""
        self.span: Any = None
        """Of OpenTelemetry, where requests are traced."""
        self.queued_s = self.sent_s = self.first_byte_s = self.answered_s = self.paused_s = self.overhead_s = 0.0

    # Towards the instance

    def send_on(self, connection: UpstreamConnection, instance: Instance) -> None:
        """Write the request to an instance's connection."""
        self.connection = connection
        extra, given = b"", self.http.fields.get(b"x-request-id")
        if given is None or given.strip() != self.request.id.encode("latin-1"):
            if given is not None:  # another header has the id
                self.http.lines = _without_lines(self.http.lines, b"x-request-id:")
            extra = b"x-request-id: %b\r\n" % self.request.id.encode("latin-1")
        self.sent_s = monotonic()
        if not self.overhead_s:
            self.overhead_s = self.sent_s - self.arrived_s
        if self.tape is not None:
            target, body = self.tape.target_and_body(self.http.target)
            if self.tape.count:
                extra += b"x-block-continued-tokens: %d\r\n" % self.tape.count
            head = request_head(self.http, instance.host_header, extra, instance.prefix, body, target)
            connection.send(self, head, body)
            if self.paused_s:
                connection.pause()
            return
        asking = (
            asking_for_usage(self.http.target, self.http.body) if instance.counts_usage and self.generating else None
        )
        self.asked_usage = asking is not None
        body = self.http.body if asking is None else asking
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
        sse = head.fields.get(b"content-type", b"").startswith(b"text/event-stream")
        if self.head_sent:
            self._go_on(head, sse, instance)
            return
        self.sse, self.chunked = sse, head.chunked
        if head.chunked and self.http.version == "1.0":
            self.write = Unchunked(self.client.transport.write)
        self.heard_s = instance.last_byte_s
        if head.length is None and not head.chunked:
            self.keep_alive = False
        self.keep_alive = self.keep_alive and not dispatcher.draining
        if sse:
            instance.streaming += 1
            self.streaming = True
            if self.tape is not None:
                self._use_tape(head)
            elif self.asked_usage and head.length is None and b"content-encoding" not in head.fields:
                self.strip = UsageStrip(chunked=head.chunked)
        lines = answer_head(head.status, self._answer_lines(head, instance))
        if self.sse:
            self.held_head = lines
        else:
            self.head_sent = True
            self.client.transport.write(lines)

    def _answer_lines(self, head: AnswerHead, instance: Instance) -> bytes:
        passed, cors = head.lines, self.client.cors
        if head.chunked and self.http.version == "1.0":
            passed = _without_lines(passed, b"transfer-encoding:")
        if cors:
            passed = [*_without_lines(passed, b"access-control-"), cors.lines(self.http)]
        lines = b"%bx-request-id: %b\r\n%b" % (
            b"".join(passed),
            self.request.id.encode("latin-1"),
            instance.header_lines,
        )
        if self.dispatcher.decision_headers:
            overhead_ms = self.overhead_s * 1e3
            lines += b"x-block-overhead-ms: %.3f\r\nserver-timing: block;dur=%.3f\r\n" % (overhead_ms, overhead_ms)
            if self.prediction is not None:
                lines += prediction_lines(
                    self.prediction, self.dispatcher.interval_of(self), self.decided_s - self.arrived_s
                )
        if self.sse:
            lines += b"x-accel-buffering: no\r\n"
            if b"cache-control" not in head.fields:
                lines += b"cache-control: no-cache\r\n"
        return lines if self.keep_alive else lines + b"connection: close\r\n"

    def body_received(self, data: bytes) -> None:
        out = data if self.strip is None else self.strip.feed(data)
        if self.held_head and out:
            out = self._with_head(out)
        self.write(out)
        self.instance.last_byte_s = self.heard_s = now_s = monotonic()  # type: ignore[union-attr]
        if not self.first_byte_s:
            self.first_byte_s = now_s
            if self.http.target.startswith(b"/v1/responses"):
                self.dispatcher.owners.learn(data, self.instance.id)  # type: ignore[union-attr]
        if self.sse:
            self.events += data.count(b"data:")
            self.plain, self.source = self.head_sent and self.strip is None, self.instance
        self.before_last, self.last = self.last, data
        if self.tape is not None and self.tape.broken:
            self.lose("it gave up")

    def _with_head(self, body: bytes) -> bytes:
        """The body's first bytes, with the head in front where it is one write."""
        head, self.held_head, self.head_sent = self.held_head, b"", True
        if isinstance(self.write, Unchunked):
            self.client.transport.write(head)
            return body
        return head + body

    def answer_ended(self) -> None:
        self.connection = None
        if self.held_head:  # a stream of nothing
            self.client.transport.write(self._with_head(b""))
        if self.strip is not None and not self.strip.chunked:
            self.write(self.strip.rest())
        self.answered_s = monotonic()
        self.dispatcher.ended(self, None)
        self.client.exchange_ended(keep_alive=self.keep_alive)

    def answer_failed(self, error: InstanceUnreachableError | StreamBrokenError) -> None:
        connection, self.connection = self.connection, None
        stale = connection is not None and connection.reused and not connection.answered and not self.resent
        if not self.head_sent:
            self._forget_head()
            self.dispatcher.failed_unanswered(self, error, stale_connection=stale)
            return
        if self.tape is not None:
            if stale:
                self.dispatcher.failed_unanswered(self, error, stale_connection=True)
                return
            if self.dispatcher.continues(self, error):
                return
        self._break_off_by_instance(error, aligned=connection is None or connection.aligned)

    def _break_off_by_instance(self, error: InstanceUnreachableError | StreamBrokenError, *, aligned: bool) -> None:
        self.break_off(f"The instance broke off its answer: {error}.", "instance_failed", aligned=aligned)
        self.dispatcher.ended(self, error)

    def keep_client(self, now_s: float) -> None:
        """A stream is silent: send a comment, so that nobody between here and the client takes it for dead.

        Only where the instance has begun to stream, and between two events.
        """
        if not self.sse or not self.chunked or self.paused_s:
            return
        if self.strip is None:
            between = not self.last or self.last.endswith((b"\n\n\r\n", b"\n\r\n\r\n"))
            if not between or self.connection is None or not self.connection.aligned:
                return
        self.write(self._with_head(KEEP_ALIVE))
        self.heard_s = now_s

    # An answer that another instance goes on with

    def _use_tape(self, head: AnswerHead) -> None:
        if head.chunked and b"content-encoding" not in head.fields:
            self.strip = self.tape
        else:
            self.tape = None  # what comes is not what was asked for

    def _go_on(self, head: AnswerHead, sse: bool, instance: Instance) -> None:
        """The head of the rest; the client has one already."""
        if not sse or head.status != 200 or not head.chunked or b"content-encoding" in head.fields:
            self.lose(f"answered {head.status}")
            return
        instance.streaming += 1
        self.streaming = True

    def complete(self) -> None:
        """All tokens came and what ends a stream did not: say it for the instance that is gone."""
        assert self.tape is not None
        self.write(self.tape.end())
        self.answered_s = monotonic()
        self.dispatcher.ended(self, None)
        self.client.exchange_ended(keep_alive=self.keep_alive)

    def lose(self, why: str) -> None:
        """The instance is of no use to this request any more: go elsewhere."""
        connection = self.connection
        self._drop_connection()
        aligned = self.tape is not None or connection is None or connection.aligned
        error = StreamBrokenError(why)
        if not self.head_sent:
            self._forget_head()
            self.dispatcher.failed_unanswered(self, error, stale_connection=False)
        elif self.tape is None or not self.dispatcher.continues(self, error):
            self._break_off_by_instance(error, aligned=aligned)

    def _forget_head(self) -> None:
        """A stream of which only the head came is as good as none: somebody else may answer."""
        if self.streaming and self.instance is not None:
            self.instance.streaming -= 1
        self.sse, self.streaming, self.held_head, self.strip = False, False, b"", None
        self.write = self.client.transport.write
        if self.tape is not None:
            self.tape.begin()

    # Towards the client

    def refuse(self, error: ClientError, extra: bytes = b"") -> None:
        """Answer with an error instead of an instance's answer, and end."""
        if self.head_sent:  # nobody goes on with it
            self.break_off(error.message, error.code or "instance_failed", aligned=True)
            self.dispatcher.ended(self, error)
            return
        self.dispatcher.ended(self, error)
        self.client.answer_error(error, extra + b"x-request-id: %b\r\n" % self.request.id.encode("latin-1"))

    def break_off(self, message: str, code: str, *, aligned: bool) -> None:
        """The answer has begun and cannot go on: an error event where the framing allows one, else cut the connection."""
        if self.sse and self.chunked and aligned:
            event = b"" if self.last.endswith(b"\n\n\r\n") or not self.last else b"\n\n"
            event += b"data: " + error_object(message, "server_error", code, None) + b"\n\n"
            self.write(chunk(event) + LAST_CHUNK)
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


def _without_lines(lines: list[bytes], beginning: bytes) -> list[bytes]:
    """Header lines but those that begin like this (in lower case)."""
    return [line for line in lines if line[: len(beginning)].lower() != beginning]
