"""A TCP link to one instance that can be cut, clogged or blackholed, and that notes when requests go through it."""

import asyncio
import contextlib
import time
from typing import Final, Literal

Mode = Literal["open", "closed", "refuse", "drip", "blackhole"]
DRIP_BYTES_PER_S: Final = 40


class Link:
    """Listens on ``port`` and forwards to ``to_port``. ``requests``: monotonic times of POSTs that came in.

    open: as a cable. closed: nobody listens, connections are cut (a killed process). refuse: nobody listens, connections
    stay. drip: answers come at ``DRIP_BYTES_PER_S``. blackhole: connections are taken and nothing goes through, ever
    again for those open (a half-open peer).
    """

    def __init__(self, port: int, to_port: int) -> None:
        self.port, self._to_port = port, to_port
        self.mode: Mode = "open"
        self.requests: list[float] = []
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def set(self, mode: Mode) -> None:
        self.mode = mode
        listens = mode not in ("closed", "refuse")
        if listens and self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=1024)
        elif not listens and self._server is not None:
            self._server.close()
            self._server = None
        if mode == "closed":
            self.cut()

    def cut(self) -> None:
        """All connections break."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def close(self) -> None:
        await self.set("closed")
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            if self.mode == "blackhole":
                await self._swallow(reader)
                return
            back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self._to_port)
            self._writers.add(back_writer)
            try:
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._requests(reader, back_writer))
                    both.create_task(self._answers(back_reader, writer))
            finally:
                self._writers.discard(back_writer)
                back_writer.transport.abort()
        except (OSError, ExceptionGroup, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.transport.abort()

    async def _swallow(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(65536):
            self._note(data)

    def _note(self, data: bytes) -> None:
        self.requests += [time.monotonic()] * data.count(b"POST /v1/")

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            self._note(data)
            if self.mode == "blackhole":
                continue
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if self.mode == "blackhole":
                await asyncio.Event().wait()
            while self.mode == "drip" and data:
                writer.write(data[: DRIP_BYTES_PER_S // 10])
                data = data[DRIP_BYTES_PER_S // 10 :]
                await asyncio.sleep(0.1)
            writer.write(data)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
        raise ConnectionResetError
