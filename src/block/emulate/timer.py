"""A wake-up with the resolution of the kernel: event loops count in milliseconds, and a step lasts a few."""

import asyncio
import ctypes
import os
import sys
from collections.abc import Callable
from typing import Protocol

_CLOCK_MONOTONIC, _NONBLOCK, _CLOEXEC, _ABSOLUTE = 1, 0o4000, 0o2000000, 1
_NS = 1_000_000_000


class Timer(Protocol):
    """One pending wake-up at most."""

    def wake_at(self, monotonic_s: float | None) -> None:
        """Call back at that time (``time.monotonic``) and not at any given before; ``None``: not at all."""
        ...

    def close(self) -> None: ...


class LoopTimer:
    """The event loop's own timer, to a millisecond or so."""

    def __init__(self, loop: asyncio.AbstractEventLoop, wake: Callable[[], None], now_s: Callable[[], float]) -> None:
        self._loop, self._wake, self._now_s = loop, wake, now_s
        self._handle: asyncio.TimerHandle | None = None

    def wake_at(self, monotonic_s: float | None) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        if monotonic_s is not None:
            self._handle = self._loop.call_later(max(monotonic_s - self._now_s(), 0.0), self._wake)

    def close(self) -> None:
        self.wake_at(None)


class KernelTimer:
    """Linux's timerfd, watched by the event loop: right to some tens of microseconds."""

    def __init__(self, loop: asyncio.AbstractEventLoop, wake: Callable[[], None]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._settime = libc.timerfd_settime
        self._setting = (ctypes.c_long * 4)()  # struct itimerspec: interval s, ns; value s, ns
        self._fd: int = libc.timerfd_create(_CLOCK_MONOTONIC, _NONBLOCK | _CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self._loop, self._wake = loop, wake
        loop.add_reader(self._fd, self._on_ready)

    def wake_at(self, monotonic_s: float | None) -> None:
        # A time of zero would disarm the timer, so a time that is over is one nanosecond after boot.
        at_ns = 0 if monotonic_s is None else max(int(monotonic_s * _NS), 1)
        self._setting[2], self._setting[3] = divmod(at_ns, _NS)
        self._settime(self._fd, _ABSOLUTE, self._setting, None)

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _on_ready(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return  # set anew between the loop's look and this read
        self._wake()


def best_timer(loop: asyncio.AbstractEventLoop, wake: Callable[[], None], now_s: Callable[[], float]) -> Timer:
    """The finest timer that this system has."""
    if sys.platform == "linux":
        return KernelTimer(loop, wake)
    return LoopTimer(loop, wake, now_s)
