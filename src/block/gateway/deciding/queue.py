"""Who waits to be admitted, and how many retries there may be."""

from bisect import insort
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from block.gateway.exchange import Exchange


class Queue:
    """Requests in the order in which they will be admitted: the more important first, then the earlier."""

    def __init__(self) -> None:
        self._waiting: list[Exchange] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator["Exchange"]:
        return iter(self._waiting)

    def add(self, exchange: "Exchange") -> None:
        insort(self._waiting, exchange, key=_rank)

    def drop_last(self) -> "Exchange":
        """The least important leaves."""
        return self._waiting.pop()

    def drop_late(self, before_s: float) -> "list[Exchange]":
        """Who has waited since before then leaves, and who has gone."""
        late = [x for x in self._waiting if x.queued_s < before_s and not x.over]
        self._waiting = [x for x in self._waiting if x.queued_s >= before_s and not x.over]
        return late

    def admit(
        self,
        has_room: Callable[[], bool],
        blocked: "Callable[[Exchange], bool]",
        go: "Callable[[Exchange], None]",
    ) -> None:
        """``go`` with those at the front, while there is room; who waits for instances that are full does not hold up others."""
        waiting, self._waiting = self._waiting, []
        full: set[str] = set()
        for at, exchange in enumerate(waiting):
            if not has_room():
                self._waiting += waiting[at:]
                return
            if exchange.over:
                continue
            model, picky = exchange.request.model, exchange.asked.only is not None
            if (model in full and not picky) or blocked(exchange):
                self._waiting.append(exchange)
                if not picky:
                    full.add(model)
            else:
                go(exchange)


def _rank(exchange: "Exchange") -> tuple[int, float]:
    return exchange.request.priority, exchange.queued_s


class RetryBudget:
    """A bucket of retries: filled by a share of the requests, emptied by retries. Starts with ``START``."""

    START: Final = 100.0
    MOST: Final = 1000.0

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction
        self.left = self.START

    def deposit(self) -> None:
        self.left = min(self.left + self._fraction, self.MOST)

    def credit(self, retries: int) -> None:
        """So many may be needed now, whatever the share of the requests."""
        self.left = min(self.left + retries, max(self.left, self.MOST))

    def withdraw(self) -> bool:
        if self.left < 1:
            return False
        self.left -= 1
        return True
