"""One subscriber of the snapshot stream: frames when the engine's state changes, never more than one on its way."""

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Final

HEARTBEAT_S: Final = 0.5
_SEND_BUFFER: Final = 64 * 1024  # what the kernel may queue for one subscriber: stale frames help nobody


class Subscriber:
    """Writes HTTP chunks, one a frame, to a transport. A slow reader skips to the newest; nothing queues up here.

    ``frame`` gives the newest frame (u32 length, snapshot), or ``None`` while there is no engine. Without a change it
    is sent again every ``HEARTBEAT_S``: silence means that the engine is gone, or the predictor.
    """

    def __init__(self, transport: asyncio.Transport, frame: Callable[[], bytes | None], min_interval_s: float) -> None:
        self._transport, self._frame, self._min_interval_s = transport, frame, min_interval_s
        self._loop = asyncio.get_running_loop()
        self._sent_s = -HEARTBEAT_S
        self._timer: asyncio.TimerHandle | None = None
        self._changed = True
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self._send_if_due()

    def frame_came(self) -> None:
        """There is a newer frame."""
        if not self._changed:
            self._changed = True
            self._send_if_due()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _send_if_due(self) -> None:
        now_s = time.monotonic()
        due_s = self._sent_s + (self._min_interval_s if self._changed else HEARTBEAT_S)
        if now_s >= due_s and not self._transport.get_write_buffer_size() and (frame := self._frame()) is not None:
            self._transport.write(b"%x\r\n%b\r\n" % (len(frame), frame))
            self._sent_s, self._changed = now_s, False
            due_s = now_s + HEARTBEAT_S
        self.close()
        self._timer = self._loop.call_later(max(due_s - now_s, self._min_interval_s, 0.001), self._send_if_due)
