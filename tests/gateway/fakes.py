"""Engines on real sockets that behave well, badly, or not at all; and a predictor that says what a test tells it."""

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

MODEL = "fake"
USAGE = {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def answer(body: bytes, status: str = "200 OK", content_type: str = "application/json", extra: str = "") -> bytes:
    return (
        f"HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n{extra}\r\n".encode()
        + body
    )


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


def event(text: str, chat: bool = True) -> bytes:
    choice = (
        {"index": 0, "delta": {"content": text}, "finish_reason": None}
        if chat
        else {"index": 0, "text": text, "finish_reason": None}
    )
    kind = "chat.completion.chunk" if chat else "text_completion"
    return b"data: " + encoded({"id": "x", "object": kind, "created": 1, "model": MODEL, "choices": [choice]}) + b"\n\n"


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Heard:
    """One request as an engine heard it."""

    def __init__(self, head: bytes, body: bytes, gone: Callable[[], bool]) -> None:
        self.gone = gone
        line, *rest = head.decode("latin-1").split("\r\n")
        self.method, self.path, _ = line.split(" ", 2)
        self.headers = {name.lower(): value.strip() for name, _, value in (h.partition(":") for h in rest if h)}
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Behave = Callable[["FakeEngine", Heard, asyncio.StreamWriter], Awaitable[None]]


class FakeEngine:
    """An OpenAI server whose answers to POST are ``behave``'s; ``heard`` keeps the POSTs."""

    def __init__(self, behave: Behave | None = None, *, models: tuple[str, ...] = (MODEL,)) -> None:
        self.behave = behave or well
        self.models = models
        self.heard: list[Heard] = []
        self.left = 0
        """Clients that closed before their answer was whole."""
        self.healthy = True
        self.port = 0
        self.tls: ssl.SSLContext | None = None
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    async def start(self, port: int = 0) -> "FakeEngine":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port or self.port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        """As if killed: no more listening, all connections cut."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)

    @property
    def connections(self) -> int:
        return len(self._writers)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                heard = Heard(head[:-4], b"", reader.at_eof)
                heard.body = await reader.readexactly(int(heard.headers.get("content-length", 0)))
                if heard.method == "GET":
                    writer.write(self._own(heard.path))
                else:
                    self.heard.append(heard)
                    await self.behave(self, heard, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    def _own(self, path: str) -> bytes:
        if path == "/v1/models":
            return answer(encoded({"object": "list", "data": [{"id": m, "object": "model"} for m in self.models]}))
        return answer(b"{}", "200 OK" if self.healthy else "503 Service Unavailable")


async def well(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
    """Four tokens, streamed or not."""
    chat = "chat" in heard.path
    if heard.json.get("stream"):
        writer.write(STREAM_HEAD)
        for n in range(4):
            writer.write(chunk(event(f" t{n}", chat)))
            await writer.drain()
            await asyncio.sleep(0)
        writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        return
    words = " t0 t1 t2 t3"
    choice = {"index": 0, "message": {"role": "assistant", "content": words}} if chat else {"index": 0, "text": words}
    body = {
        "id": "x",
        "object": "chat.completion" if chat else "text_completion",
        "created": 1,
        "model": MODEL,
        "usage": USAGE,
    }
    writer.write(answer(encoded(body | {"choices": [choice | {"finish_reason": "stop"}]}), extra="x-engine: yes\r\n"))


async def dies_unanswered(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
    """Takes the request and closes without a byte."""
    writer.transport.abort()


async def dies_in_stream(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
    """Two events, then the connection breaks."""
    writer.write(STREAM_HEAD + chunk(event(" t0")) + chunk(event(" t1")))
    await writer.drain()
    await asyncio.sleep(0.02)
    writer.transport.abort()


async def dies_after_head(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
    """The head at once, as vLLM does, and then the connection breaks before the first token."""
    writer.write(STREAM_HEAD if heard.json.get("stream") else b"")
    await writer.drain()
    await asyncio.sleep(0.02)
    writer.transport.abort()


async def dies_in_chunk(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
    """One event and half of another, then the connection breaks."""
    writer.write(STREAM_HEAD + chunk(event(" t0")) + chunk(event(" t1"))[:30])
    await writer.drain()
    await asyncio.sleep(0.02)
    writer.transport.abort()


async def dies_in_body(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
    """Promises 1000 bytes, sends ten."""
    writer.write(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{"id": "x"')
    await writer.drain()
    await asyncio.sleep(0.02)
    writer.transport.abort()


async def speaks_garbage(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")


async def fails(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
    writer.write(answer(b'{"error":"broken"}', "500 Internal Server Error"))


async def overloaded(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
    writer.write(answer(b'{"error":"busy"}', "429 Too Many Requests", extra="retry-after: 7\r\n"))


async def never_answers(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
    await _until_gone(engine, heard)


async def hangs_in_stream(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD + chunk(event(" t0")))
    await _until_gone(engine, heard)


async def _until_gone(engine: FakeEngine, heard: Heard) -> None:
    while not heard.gone():  # noqa: ASYNC110  a stream reader has no event for it
        await asyncio.sleep(0.01)
    engine.left += 1
    raise ConnectionResetError


def slowly(seconds: float) -> Behave:
    async def behave(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(seconds)
        await well(engine, heard, writer)

    return behave


class FakePredictor:
    """``/snapshots`` streams what ``frame`` returns every few milliseconds (``None``: silence), ``/profile`` is a shipped one,
    ``/predict`` answers what ``prediction`` returns after ``delay_s``."""

    def __init__(self, frame: Callable[[], bytes | None]) -> None:
        self.frame = frame
        self.prediction: Callable[[], Any] = lambda: {}
        self.delay_s = 0.0
        self.profile: bytes = encoded(profile_fields() | {"scale": 1.0})
        self.port = 0
        self.tls: ssl.SSLContext | None = None
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    async def start(self) -> "FakePredictor":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = [
                    int(line.split(":")[1]) for line in head.lower().split("\r\n") if line.startswith("content-length")
                ]
                await reader.readexactly(sum(length))
                if "/snapshots" in head:
                    await self._stream(writer)
                elif "/profile" in head:
                    writer.write(answer(self.profile))
                else:
                    await asyncio.sleep(self.delay_s)
                    writer.write(answer(encoded(self.prediction())))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _stream(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while not writer.is_closing():
            frame = self.frame()
            if frame is not None:
                writer.write(chunk(len(frame).to_bytes(4, "little") + frame))
                await writer.drain()
            await asyncio.sleep(0.005)


def profile_fields() -> dict[str, Any]:
    import msgspec

    from block.steptime.profile import load_profile

    fields: dict[str, Any] = msgspec.to_builtins(load_profile("h200-llama3.1-8b"))
    return fields


def snapshot(
    *,
    running: int = 0,
    waiting: int = 0,
    age_s: float = 0.0,
    ids: tuple[str, ...] = (),
    outputs: int = 5,
    **header: Any,
) -> bytes:
    """A plausible snapshot: ``running`` requests of 100 prompt tokens decoding, ``waiting`` of 1000 waiting; the first
    have the keys of ``ids``. ``header`` overrides fields."""
    import time

    import numpy as np

    from block.engine.limits import EngineLimits
    from block.predict import snapshot as wire

    limits = EngineLimits(num_gpu_blocks=4096)
    count = running + waiting
    rows = np.zeros((wire.FIELDS, count), np.int32)
    rows[wire.PROMPT, :running], rows[wire.PROMPT, running:] = 100, 1000
    rows[wire.MAX_TOKENS] = 400
    rows[wire.OUTPUT, :running], rows[wire.COMPUTED, :running] = outputs, 100 + outputs - 1
    rows[wire.BLOCKS, :running] = 7
    keys = [wire.request_key(i) for i in ids] + list(range(1, count - len(ids) + 1))
    record = wire.header_of(limits)
    record["running"], record["waiting"], record["waiting_total"] = running, waiting, waiting
    record["taken_s"] = time.time() - age_s
    record["kv_blocks_free"] = limits.blocks_usable - 7 * running
    record["sequence"], record["epoch"] = time.monotonic_ns(), 1
    for name, value in header.items():
        record[name] = value
    return wire.encode(record, rows, np.array(keys, np.uint64), np.full(count, time.time() - age_s))
