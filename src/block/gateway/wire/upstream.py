"""Connections to the instances: pooled, kept alive, TCP_NODELAY, bytes forwarded as they come, backpressure both ways."""

import asyncio
import socket
import ssl
from collections import deque
from typing import Final, cast

from block.errors import InstanceUnreachableError, StreamBrokenError
from block.gateway.wire.answers import AnswerHead, AnswerReader, end_of_whole_chunks
from block.gateway.wire.relay import Inlet, Relay

IDLE_MAX: Final = 512
HELD_BYTES_MAX: Final = 262_144


class Receiver(Relay):
    """Who waits for an instance's answer. Exactly one of ``answer_ended`` and ``answer_failed`` is the last call."""

    __slots__ = ()

    def head_received(self, head: AnswerHead) -> None:
        raise NotImplementedError

    def answer_ended(self) -> None:
        raise NotImplementedError

    def answer_failed(self, error: InstanceUnreachableError | StreamBrokenError) -> None:
        raise NotImplementedError


class UpstreamConnection(Inlet, asyncio.Protocol):
    """One TCP connection to an instance; carries one exchange at a time."""

    __slots__ = (
        "_held",
        "_home",
        "_paused",
        "_reader",
        "_receiver",
        "aligned",
        "answered",
        "reused",
        "transport",
    )

    def __init__(self, home: "Connections") -> None:
        super().__init__()
        self._home = home
        self._receiver: Receiver | None = None
        self._reader = AnswerReader()
        self._held = b""
        self._paused = False
        self.transport: asyncio.Transport
        self.reused = False
        self.answered = False
        """A byte of the current answer has come."""
        self.aligned = True
        """What the receiver got so far ends where a chunk ends."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        set_nodelay(transport)

    def send(self, receiver: Receiver, head: bytes, body: bytes) -> None:
        """Send one request; its answer goes to ``receiver``."""
        self._receiver, self._reader, self.answered, self.aligned = receiver, AnswerReader(), False, True
        self._reader.bodiless = head.startswith(b"HEAD ")
        self.relay = None
        self.transport.write(head + body if len(body) < 65536 else head)
        if len(body) >= 65536:
            self.transport.write(body)

    def abandon(self) -> None:
        """The receiver wants no more: close, so that the engine stops working for it."""
        self._receiver, self.relay, self._held = None, None, b""
        self.transport.abort()

    def pause(self) -> None:
        """The client does not keep up: read no more for now."""
        if not self._paused and not self.transport.is_closing():
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self._paused and not self.transport.is_closing():
            self._paused = False
            self.transport.resume_reading()

    def received(self, data: bytes) -> None:
        """What is not one chunk in the middle of a stream."""
        receiver, reader = self._receiver, self._reader
        if receiver is None:
            self.transport.abort()  # an answer that nobody asked for
            return
        self.answered = True
        try:
            if reader.head is None:
                rest = reader.feed_head(data)
                if reader.head is None or rest is None:
                    return
                receiver.head_received(reader.head)
                if self._receiver is not receiver:
                    return  # it declined the answer
                if not rest:
                    if reader.whole:
                        self._end(receiver)
                    return
                data = rest
            whole = reader.feed_body(data)
        except ValueError as error:
            self._fail(f"answered something that is not HTTP ({error})")
            return
        if self._held or not reader.aligned:
            data = self._whole_chunks(data, reader, whole)
        else:
            self.aligned = True
        if data:
            receiver.body_received(data)
        if self._receiver is not receiver:
            return
        between = reader.chunked and self.aligned and not self._held and not whole
        self.relay = receiver if between else None
        if whole:
            self._end(receiver)

    def _whole_chunks(self, data: bytes, reader: AnswerReader, whole: bool) -> bytes:
        """Of a body that stops in the middle of a chunk, what can go on now; the rest is held.

        Half a chunk is half an event: of no use to the client, and in the way of an error event. A chunk too large to
        hold goes through as it comes.
        """
        data, self._held = self._held + data, b""
        if whole or reader.aligned:
            self.aligned = True
            return data
        end = end_of_whole_chunks(data) if self.aligned else len(data)
        if len(data) - end > HELD_BYTES_MAX:
            self.aligned = False
            return data
        self._held = data[end:]
        return data[:end]

    def _end(self, receiver: Receiver) -> None:
        self._receiver = None
        head = self._reader.head
        if head is not None and head.keep_alive and not self.transport.is_closing():
            self.resume()
            self._home.give_back(self)
        else:
            self.transport.close()
        receiver.answer_ended()

    def _fail(self, what: str) -> None:
        receiver, self._receiver, self.relay = self._receiver, None, None
        self.transport.abort()
        if receiver is None:
            return
        begun = self._reader.head is not None
        receiver.answer_failed(StreamBrokenError(what) if begun else InstanceUnreachableError(what))

    def connection_lost(self, exc: Exception | None) -> None:
        self._home.lost(self)
        receiver = self._receiver
        if receiver is None:
            return
        head = self._reader.head
        if head is not None and head.length is None and not head.chunked and exc is None:
            self._receiver = self.relay = None
            if self._held:
                receiver.body_received(self._held)
            receiver.answer_ended()  # its end was the connection's
            return
        self._fail(str(exc) if exc else "closed the connection before its answer was whole")


class Connections:
    """The connections to one instance. Bounded by the instance's requests in flight, and ``IDLE_MAX`` idle ones."""

    def __init__(
        self, host: str, port: int, *, connect_timeout_s: float, tls: ssl.SSLContext | None = None
    ) -> None:  # fmt: skip
        self.host, self.port, self._tls = host, port, tls
        self._connect_timeout_s = connect_timeout_s
        self._idle: deque[UpstreamConnection] = deque()
        self._all: set[UpstreamConnection] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._all)

    def take(self) -> UpstreamConnection | None:
        """The idle connection used last, if there is one."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.transport.is_closing():
                connection.reused = True
                return connection
        return None

    async def connect(self) -> UpstreamConnection:
        """A new connection.

        Raises:
            InstanceUnreachableError: refused, timed out, no such host.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: UpstreamConnection(self), self.host, self.port, ssl=self._tls
                )
        except TimeoutError:
            raise InstanceUnreachableError(f"no connection within {self._connect_timeout_s:g} s") from None
        except OSError as error:
            raise InstanceUnreachableError(error.strerror or str(error)) from error
        self._all.add(connection)
        if connection.transport.is_closing():
            self._all.discard(connection)
        return connection

    def give_back(self, connection: UpstreamConnection) -> None:
        if self._closed or len(self._idle) >= IDLE_MAX:
            connection.transport.close()
        else:
            self._idle.append(connection)

    def lost(self, connection: UpstreamConnection) -> None:
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def close_idle(self) -> None:
        """Drop idle connections (the instance went away; they may be half open)."""
        while self._idle:
            self._idle.pop().transport.abort()

    def close(self) -> None:
        self._closed = True
        self.close_idle()
        for connection in list(self._all):
            connection.transport.abort()


def set_nodelay(transport: asyncio.BaseTransport) -> None:
    """Small writes leave at once; Nagle's algorithm with delayed ACKs costs some 40 ms an event otherwise."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
