"""What is to be counted, noted and learned of requests, put off and then done for several at a time.

Between two requests others have the CPU and its caches, and most of what a first entry costs is to bring the code and the tables
in that it needs; the next ones find them there. Nor is a request on its way to an instance kept waiting by it. An entry is
late by a quarter of a second at most; who reads the records settles the books first and sees no difference.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

OPEN_MAX: Final = 48
"""Entries that wait, three a request; to settle so many takes half a millisecond."""
log = logging.getLogger("block.gateway")


class Books:
    """Entries, in order. ``settle`` is to be called a few times a second."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._entries: list[Callable[[], None]] = []

    def later(self, entry: Callable[[], None]) -> None:
        """Do it with the others, in this order. What it needs of the clock must have been read."""
        self._entries.append(entry)
        if len(self._entries) == OPEN_MAX:
            self._loop.call_soon(self.settle)

    def settle(self) -> None:
        """Do now what was put off."""
        entries, self._entries = self._entries, []
        for entry in entries:
            try:
                entry()
            except Exception:  # the outermost place: a bug here costs this entry and no other
                log.exception("bug while keeping the books")
