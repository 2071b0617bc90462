"""The middle of a stream: one event comes in, the same bytes go out, and it is noted that they did.

A stream is this a hundred times and everything else once, and between two of its events others have the CPU and its caches:
what an event costs is how much code and data it touches. Therefore this is compiled (types in ``relay.pxd``); the same
file runs uncompiled.
"""

from collections.abc import Callable
from time import monotonic


class Heard:
    """Somebody who sends bytes. ``last_byte_s``: loop time of the last one of any answer, or of a request sent to it when it
    had none."""

    __slots__ = ("last_byte_s",)

    def __init__(self) -> None:
        self.last_byte_s = 0.0


class Relay:
    """One answer on its way to one client. ``write``: the client's transport's; ``source``: the instance."""

    __slots__ = ("before_last", "events", "heard_s", "last", "plain", "source", "write")

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self.write = write
        self.plain = False
        """Bytes go through as they come, and those before them did."""
        self.source: Heard | None = None
        self.heard_s = 0.0
        """When the client last got something of its stream."""
        self.events = 0
        self.before_last = b""
        self.last = b""
        """The last two reads of the answer, for the usage in them."""

    def body_received(self, data: bytes) -> None:
        """Bytes of the answer's body that need a look."""
        raise NotImplementedError

    def pass_on(self, data: bytes) -> None:
        """One whole chunk."""
        if not self.plain:
            self.body_received(data)
            return
        self.write(data)
        now_s = monotonic()
        self.heard_s = now_s
        if self.source is not None:
            self.source.last_byte_s = now_s
        self.events += data.count(b"data:")
        self.before_last = self.last
        self.last = data


class Inlet:
    """Where an instance's bytes come in. ``relay``: who gets a read that is exactly one chunk; ``None`` except in the middle of a
    chunked answer, between two chunks. All else is for ``received``."""

    __slots__ = ("relay",)

    def __init__(self) -> None:
        self.relay: Relay | None = None

    def data_received(self, data: bytes) -> None:
        """The transport's callback."""
        relay = self.relay
        if relay is not None and is_one_chunk(data):
            relay.pass_on(data)
        else:
            self.received(data)

    def received(self, data: bytes) -> None:
        """Bytes whose framing needs a look."""
        raise NotImplementedError


def is_one_chunk(data: bytes) -> bool:
    """Whether this is exactly one chunk, not the last, its size written as plainly as can be (else: let llhttp see)."""
    size, at, told = len(data), 0, 0
    while at < 8 and at < size:
        digit = data[at]
        if 48 <= digit <= 57:
            told = told * 16 + digit - 48
        elif 97 <= digit <= 102:
            told = told * 16 + digit - 87
        else:
            break
        if not told:
            return False  # a leading zero, or the last chunk
        at += 1
    return (
        at > 0
        and size == at + told + 4
        and data[at] == 13
        and data[at + 1] == 10
        and data[size - 2] == 13
        and data[size - 1] == 10
    )
