"""Listening to one predictor: its snapshot stream and its step times, for as long as the gateway runs.

The stream is ``GET /snapshots``: an endless chunked body of frames, each a little-endian u32 length and a snapshot. Only
the newest frame of what a read brought is passed on. The step times are ``GET /profile``, asked at connect and every few
seconds since calibration moves it.
"""

import asyncio
import logging
import time
from itertools import pairwise
from random import Random
from time import monotonic
from typing import Any, Final, cast
from urllib.parse import urlsplit

import aiohttp
import httptools
import msgspec

from block.gateway.deciding.evidence import Evidence
from block.gateway.wire.tls import UpstreamTls
from block.gateway.wire.upstream import set_nodelay
from block.steptime.profile import StepTimeProfile

FRAME_BYTES_MAX: Final = 4 << 20
PROFILE_EVERY_S: Final = 5.0
KNOTS_MAX: Final = 4096
TOKENS_MAX: Final = 1 << 20
STEP_MAX_S: Final = 100.0
RETRY_FIRST_S: Final = 0.1
RETRY_LAST_S: Final = 2.0

log = logging.getLogger("block.gateway")


class SnapshotStream(asyncio.Protocol):
    """The client side of ``GET /snapshots``. ``closed`` is done, with a reason, when the stream is over."""

    def __init__(self, evidence: Evidence, host: str, path: str, silent_after_s: float) -> None:
        self._evidence, self._host, self._path, self._silent_after_s = evidence, host, path, silent_after_s
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._buffer = bytearray()
        self._watch: asyncio.TimerHandle | None = None
        self._heard_s = monotonic()
        self.closed: asyncio.Future[str] = self._loop.create_future()
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        set_nodelay(transport)
        self.transport.write(
            f"GET {self._path} HTTP/1.1\r\nhost: {self._host}\r\naccept: application/octet-stream\r\n\r\n".encode()
        )
        self._look()

    def _look(self) -> None:
        if monotonic() - self._heard_s > self._silent_after_s:
            self._end("said nothing")
            return
        self._watch = self._loop.call_later(self._silent_after_s, self._look)

    def data_received(self, data: bytes) -> None:
        self._heard_s = monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"answered /snapshots with something that is not HTTP ({error})")
            return
        self._take_newest()

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status != 200:
            self._end(f"answered /snapshots with status {status}")

    def on_body(self, body: bytes) -> None:
        self._buffer += body

    def on_message_complete(self) -> None:
        self._end("ended its snapshot stream")

    def _take_newest(self) -> None:
        buffer, at, newest = self._buffer, 0, None
        while len(buffer) - at >= 4:
            size = int.from_bytes(buffer[at : at + 4], "little")
            if size > FRAME_BYTES_MAX:
                self._end(f"announced a snapshot of {size} bytes")
                return
            if len(buffer) - at - 4 < size:
                break
            newest, at = (at + 4, at + 4 + size), at + 4 + size
        if newest is not None:
            self._evidence.take_frame(bytes(buffer[newest[0] : newest[1]]), time.time())
        if at:
            del buffer[:at]

    def _end(self, reason: str) -> None:
        if not self.closed.done():
            self.closed.set_result(reason)
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watch is not None:
            self._watch.cancel()
        if not self.closed.done():
            self.closed.set_result(str(exc) if exc else "closed the connection")


class Subscription:
    """Keeps one predictor's stream open and its step times current; says nothing when all is well, once when it is not."""

    def __init__(
        self, url: str, evidence: Evidence, session: aiohttp.ClientSession, rng: Random, tls: UpstreamTls
    ) -> None:  # fmt: skip
        self._tls = tls
        self._url, self._evidence, self._session, self._rng = url.rstrip("/"), evidence, session, rng
        self._profile_bytes = b""
        self._said: str | None = None

    async def run(self) -> None:
        """Until cancelled."""
        profiles = asyncio.create_task(self._follow_profile())
        delay_s = RETRY_FIRST_S
        try:
            while True:
                frames = self._evidence.frames
                reason = await self._listen()
                self._evidence.lost(f"its predictor {reason}")
                if reason != self._said:
                    log.warning("predictor of %s at %s: %s", self._evidence.instance, self._url, reason)
                    self._said = reason
                delay_s = RETRY_FIRST_S if self._evidence.frames > frames else min(2 * delay_s, RETRY_LAST_S)
                await asyncio.sleep(delay_s * (0.5 + self._rng.random()))
        finally:
            profiles.cancel()
            await asyncio.gather(profiles, return_exceptions=True)

    async def _listen(self) -> str:
        parts = urlsplit(self._url)
        loop = asyncio.get_running_loop()
        tls = self._tls.context_for(self._url)
        silent_after_s = max(2 * self._evidence.stale_after_s, 1.0)
        try:
            async with asyncio.timeout(2.0):
                _, stream = await loop.create_connection(
                    lambda: SnapshotStream(self._evidence, parts.netloc, f"{parts.path}/snapshots", silent_after_s),
                    str(parts.hostname), parts.port or (80 if tls is None else 443), ssl=tls,
                )  # fmt: skip
        except (OSError, TimeoutError) as error:
            return f"cannot be reached ({getattr(error, 'strerror', None) or 'timed out'})"
        try:
            return await stream.closed
        finally:
            stream.transport.abort()

    async def _follow_profile(self) -> None:
        while True:
            delay_s = PROFILE_EVERY_S if await self._fetch_profile() else 0.5
            await asyncio.sleep(delay_s)

    async def _fetch_profile(self) -> bool:
        try:
            async with self._session.get(
                f"{self._url}/profile", timeout=aiohttp.ClientTimeout(total=2.0), allow_redirects=False
            ) as answer:
                body = await answer.content.read(1 << 20)
                if answer.status != 200:
                    return False
            if body == self._profile_bytes:
                return True
            self._evidence.take_profile(*profile_of(body))
            self._profile_bytes = body
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False
        except (msgspec.MsgspecError, ValueError) as error:
            self._evidence.lost(f"its predictor's profile makes no sense: {error}")
            return False
        return True


def profile_of(body: bytes) -> tuple[StepTimeProfile, float]:
    """The step times of a ``/profile`` answer and their scale.

    Raises:
        ValueError, MsgspecError: it is none, or no engine can be like that (it could send the engine model astray).
    """
    fields = msgspec.json.decode(body, type=dict[str, Any])
    scale = fields.pop("scale", 1.0)
    if not isinstance(scale, int | float) or not 0.01 < scale < 100:
        raise ValueError(f"a scale of {scale!r}")
    profile = msgspec.convert(fields, StepTimeProfile)
    for knots in (profile.decode_knots, profile.mixed_knots):
        rising = all(a[0] < b[0] for a, b in pairwise(knots))
        if (
            not 0 < len(knots) <= KNOTS_MAX
            or not rising
            or not all(0 <= x <= TOKENS_MAX and 0 < y < STEP_MAX_S for x, y in knots)
        ):
            raise ValueError("knots out of range")
    seconds = [
        value for name, value in msgspec.structs.asdict(profile).items() if name.endswith("_s") and value is not None
    ]
    if not all(0 <= value < STEP_MAX_S for value in seconds):
        raise ValueError("seconds out of range")
    return profile, float(scale)
