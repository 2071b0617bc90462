"""A TCP (or TLS) connection that sends what no polite HTTP client would, and reads every answer that comes back."""

import asyncio
import json
from time import monotonic
from typing import Any, Final

import httptools

from block.conformance.check import FailedError

READ_BYTES: Final = 65536
ANSWER_BYTES_MAX: Final = 64 << 20


class Answer:
    """One HTTP answer as read. ``parts``: (when it was read in monotonic seconds, body bytes), in order."""

    __slots__ = ("duplicates", "fields", "parts", "status", "whole")

    def __init__(self) -> None:
        self.status = 0
        self.fields: dict[str, str] = {}
        self.duplicates: set[str] = set()
        self.parts: list[tuple[float, bytes]] = []
        self.whole = False

    @property
    def body(self) -> bytes:
        return b"".join(part for _, part in self.parts)

    @property
    def content_type(self) -> str:
        return self.fields.get("content-type", "").partition(";")[0].strip().lower()

    def json(self) -> Any:
        """The body as JSON.

        Raises:
            FailedError: it is not JSON.
        """
        try:
            return json.loads(self.body)
        except ValueError:
            raise FailedError(f"the body of the {self.status} answer is not JSON: {self.body[:80]!r}") from None


class _Parser:
    """httptools' callbacks: keeps every answer of a connection, interim ones (100) apart."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.interim: list[int] = []
        self._parser = httptools.HttpResponseParser(self)
        self._answer = Answer()
        self._in_head = True

    def feed(self, piece: bytes) -> None:
        self._parser.feed_data(piece)

    def on_message_begin(self) -> None:
        self._answer, self._in_head = Answer(), True

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return
        low, fields = name.decode("latin-1").lower(), self._answer.fields
        if low in fields:
            self._answer.duplicates.add(low)
        fields[low] = value.decode("latin-1").strip()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._answer.status = self._parser.get_status_code()
        if self._answer.status >= 200:
            self.answers.append(self._answer)

    def on_body(self, body: bytes) -> None:
        self._answer.parts.append((monotonic(), body))

    def on_message_complete(self) -> None:
        if self._answer.status < 200:
            self.interim.append(self._answer.status)
        self._answer.whole = True


class Wire:
    """One connection. ``closed``: the other side ended it; ``broken``: what it sent is not HTTP, in a sentence."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, timeout_s: float) -> None:
        self._reader, self._writer, self._timeout_s = reader, writer, timeout_s
        self._parser = _Parser()
        self.closed = False
        self.broken: str | None = None
        self.received = b""
        """The first bytes that came (up to 64 KiB), as they are."""
        self._bytes = 0

    @property
    def answers(self) -> list[Answer]:
        return self._parser.answers

    @property
    def interim(self) -> list[int]:
        return self._parser.interim

    @property
    def statuses(self) -> list[int]:
        return [answer.status for answer in self.answers]

    @property
    def local_address(self) -> str:
        address: tuple[Any, ...] = self._writer.get_extra_info("sockname")
        return str(address[0])

    async def send(self, sent: bytes) -> None:
        """Write bytes; that the other side has closed meanwhile is no error here, ``read`` will see it."""
        try:
            self._writer.write(sent)
            async with asyncio.timeout(self._timeout_s):
                await self._writer.drain()
        except (ConnectionError, TimeoutError):
            pass

    async def read(self, wait_s: float) -> bool:
        """One read of at most ``wait_s`` seconds; False when nothing came or the connection has ended."""
        if self.closed or self.broken:
            return False
        try:
            async with asyncio.timeout(wait_s):
                piece = await self._reader.read(READ_BYTES)
        except TimeoutError:
            return False
        except (ConnectionError, OSError):
            piece = b""
        if not piece:
            self._ended()
            return False
        self._bytes += len(piece)
        if len(self.received) < READ_BYTES:
            self.received += piece
        try:
            self._parser.feed(piece)
        except httptools.HttpParserError as error:
            self.broken = f"what came is not valid HTTP ({error}): {piece[:60]!r}"
        if self._bytes > ANSWER_BYTES_MAX:
            self.broken = "the answer does not end"
        return True

    async def read_answers(self, count: int = 1) -> list[Answer]:
        """Read until ``count`` answers are whole, the connection ends, or the time is over; all answers so far."""
        deadline_s = monotonic() + self._timeout_s
        while sum(answer.whole for answer in self.answers) < count:
            if not await self.read(deadline_s - monotonic()):
                break
        return self.answers

    async def read_until_quiet(self, quiet_s: float) -> list[Answer]:
        """Read until a first answer came (or time is over), then until nothing comes for ``quiet_s``."""
        await self.read_answers(1)
        while await self.read(quiet_s):
            pass
        return self.answers

    async def answer(self) -> Answer:
        """The next answer, whole.

        Raises:
            FailedError: none came, or it broke off.
        """
        wanted = sum(answer.whole for answer in self.answers) + 1
        answers = await self.read_answers(wanted)
        if self.broken:
            raise FailedError(self.broken)
        if len(answers) < wanted or not answers[wanted - 1].whole:
            began = "an answer that did not end" if len(answers) >= wanted else "no answer"
            raise FailedError(f"{began} {'before the connection was closed' if self.closed else 'in time'}")
        return answers[wanted - 1]

    async def ends(self, wait_s: float) -> bool:
        """Whether the other side closes within ``wait_s``."""
        deadline_s = monotonic() + wait_s
        while not self.closed and not self.broken and (left_s := deadline_s - monotonic()) > 0:
            await self.read(left_s)
        return self.closed

    def abort(self) -> None:
        """Leave at once, with a reset where the system allows."""
        self._writer.transport.abort()

    def close(self) -> None:
        self._writer.close()

    def _ended(self) -> None:
        self.closed = True
        if self.answers:  # a body without framing ends with the connection
            last = self.answers[-1]
            if not {"content-length", "transfer-encoding"} & last.fields.keys():
                last.whole = True
