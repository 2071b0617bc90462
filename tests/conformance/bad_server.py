"""A server that does what no gateway should, in one of several ways."""

import asyncio
import contextlib
import re

_LENGTH = re.compile(rb"\r\ncontent-length: *\+?(\d+)", re.IGNORECASE)
_NAMED = re.compile(rb"(?:\r\nX-Gateway-Destination-Endpoint: |^GET http://)([\d.]+):(\d+)", re.IGNORECASE)
_LAST = b"This is plain text, twice said to be so."


class BadServer:
    """``yes``: 200 and plain text for everything, however it is framed, and goes wherever a client says. ``no``: 500 for
    everything. ``mute``: no word. ``zombie``: streams on and counts on when its clients are gone.
    """

    def __init__(self, vice: str) -> None:
        self.vice, self.in_flight = vice, 0
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def running(self):
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 23)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            while True:
                head = await _read_head(reader)
                await self._answer(head, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _answer(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.vice == "mute":
            return
        if self.vice == "zombie" and head.startswith(b"POST"):
            await self._stream(writer)
        if self.vice == "zombie":
            text = b"# TYPE bad_inflight_requests gauge\nbad_inflight_requests %d\n" % self.in_flight
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(text), text))
            return
        length = _LENGTH.search(head)
        if length is not None and int(length[1]) < 1 << 20:
            await reader.readexactly(int(length[1]))
        if (elsewhere := _NAMED.search(head)) is not None:
            _, second = await asyncio.open_connection(elsewhere[1].decode(), int(elsewhere[2]))
            second.close()
        status = b"200 OK" if self.vice == "yes" else b"500 Internal Server Error"
        lines = (
            b"x-predicted-ttft-ms: soon\r\ncontent-type: text/plain\r\ncontent-type: text/plain\r\ncontent-length: %d\r\n"
            % len(_LAST)
        )
        writer.write(b"HTTP/1.1 %b\r\n%b\r\n%b" % (status, lines, _LAST))

    async def _stream(self, writer: asyncio.StreamWriter) -> None:
        self.in_flight += 1
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        while True:
            if not writer.is_closing():
                writer.write(b"data: {}\n\n")
            await asyncio.sleep(0.005)


async def _read_head(reader: asyncio.StreamReader) -> bytes:
    """Lines up to an empty one, whether they end in CRLF or LF."""
    lines = []
    while True:
        line = await reader.readline()
        if not line:
            raise ConnectionResetError
        lines.append(line)
        if not line.strip():
            return b"".join(lines)
