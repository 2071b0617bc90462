"""What came and what became of it lately, for those who provision: ``GET /admin/recent?after=CURSOR``.

Three bounded rings, of arrivals, decisions and ends, read with one cursor. No prompt, no client, no name is in them.
"""

import os
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from block.core import Prediction
from block.errors import BlockError, ClientError

if TYPE_CHECKING:
    from block.gateway.dispatch import Dispatcher
    from block.gateway.exchange import Exchange
    from block.gateway.members.pool import Pool


Row = TypeVar("Row")


class Arrived(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """One request that came."""

    number: int
    at_s: float
    prompt_tokens: int


class Sent(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """Arrival ``number`` went to an instance, for the first or another time; it may have been held for a while before.

    ``output_tokens`` is what was expected of it then; predictions are the chosen instance's, in seconds from the arrival.
    """

    number: int
    at_s: float
    output_tokens: int | None
    predicted_ttft_s: float | None
    predicted_e2e_s: float | None


class Ended(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """The end of arrival ``number``. Failed: ``ttft_s`` is ``None``. An answer that is not streamed has its E2E as TTFT."""

    number: int
    at_s: float
    ttft_s: float | None
    e2e_s: float | None
    output_tokens: int | None


class Seen(msgspec.Struct, kw_only=True):
    """One instance as this gateway sees it; what no fresh snapshot tells is ``None``."""

    name: str
    url: str
    predictor: str | None
    state: str
    reason: str
    in_flight: int
    fresh: bool
    running: int | None = None
    waiting: int | None = None
    kv_blocks_free: int | None = None
    kv_blocks_total: int | None = None


class RecentAnswer(msgspec.Struct, kw_only=True):
    """``at_s`` is this gateway's wall clock now; ``missed`` counts the arrivals that were lost before they were asked for."""

    at_s: float
    cursor: str
    missed: int
    arrivals: list[Arrived]
    sent: list[Sent]
    ends: list[Ended]
    in_flight: int
    queued: int
    instances: list[Seen]


class Ring(Generic[Row]):
    """The last ``kept`` rows, and how many there have been."""

    def __init__(self, kept: int) -> None:
        self._rows = deque[Row](maxlen=kept)
        self.count = 0

    def append(self, row: Row) -> None:
        self._rows.append(row)
        self.count += 1

    def after(self, count: int) -> list[Row]:
        """Those since there had been ``count``, as far as they are kept."""
        new = min(max(self.count - count, 0), len(self._rows))
        return list(self._rows)[len(self._rows) - new :]


class Recent:
    """The rings. ``kept`` 0: nothing is kept."""

    def __init__(self, kept: int) -> None:
        self._boot = os.urandom(4).hex()
        self._arrivals, self._sent, self._ends = Ring[Arrived](kept), Ring[Sent](kept), Ring[Ended](kept)

    def arrived(self, exchange: "Exchange") -> None:
        """A request was taken in."""
        if exchange.generating:
            exchange.arrival = self._arrivals.count + 1
            request = exchange.request
            self._arrivals.append(Arrived(exchange.arrival, request.arrived_s, request.prompt_tokens))

    def decided(self, exchange: "Exchange", prediction: Prediction | None, now_s: float) -> None:
        """It went to an instance at ``now_s`` (wall clock), for the first or another time."""
        number = exchange.arrival
        if number is None:
            return
        held_s, ttft_s, e2e_s = max(now_s - exchange.request.arrived_s, 0.0), None, None
        if prediction is not None:
            ttft_s, e2e_s = held_s + prediction.ttft_s, held_s + prediction.e2e_s
        self._sent.append(Sent(number, now_s, exchange.expected_total or None, ttft_s, e2e_s))

    def ended(self, exchange: "Exchange", error: BlockError | None, now_s: float) -> None:
        """It was over at ``now_s`` (wall clock). What its client did wrong is no end worth counting."""
        number = exchange.arrival
        if number is None or (isinstance(error, ClientError) and error.status < 429):
            return
        if error is None and 400 <= exchange.status < 500 and exchange.status != 429:
            return
        failed = error is not None or exchange.status >= 400
        ttft_s = None if failed else exchange.first_byte_s - exchange.arrived_s
        e2e_s = None if failed else exchange.answered_s - exchange.arrived_s
        self._ends.append(Ended(number, now_s, ttft_s, e2e_s, exchange.output_tokens))

    def after(self, cursor: str, dispatcher: "Dispatcher", pool: "Pool") -> RecentAnswer:
        """All that came after a cursor (``""``: all that is kept); a cursor of another process counts as none.

        Raises:
            ClientError: 400, it is no cursor.
        """
        boot, arrived, sent, ended = _parsed(cursor)
        dispatcher.books.settle()
        if boot != self._boot:
            arrived = sent = ended = 0
        arrivals = self._arrivals.after(arrived)
        missed = max(0, self._arrivals.count - arrived - len(arrivals))
        now = f"{self._boot}.{self._arrivals.count}.{self._sent.count}.{self._ends.count}"
        return RecentAnswer(
            at_s=time.time(), cursor=now, missed=missed, arrivals=arrivals, sent=self._sent.after(sent),
            ends=self._ends.after(ended), in_flight=len(dispatcher.active), queued=len(dispatcher.queue),
            instances=[_seen(instance, dispatcher) for instance in pool.instances.values()],
        )  # fmt: skip


def _parsed(cursor: str) -> tuple[str, int, int, int]:
    if not cursor:
        return "", 0, 0, 0
    boot, *numbers = cursor.split(".")
    if len(numbers) != 3 or not all(n.isascii() and n.isdigit() and len(n) < 19 for n in numbers):
        raise ClientError(400, "after must be the cursor of an earlier answer.", param="after")
    return boot, int(numbers[0]), int(numbers[1]), int(numbers[2])


def _seen(instance: Any, dispatcher: "Dispatcher") -> Seen:
    evidence, now_s = dispatcher.decider.evidence.get(instance.id), time.time()
    seen = Seen(
        name=instance.id, url=instance.config.url, predictor=instance.config.predictor, state=str(instance.state),
        reason=instance.reason, in_flight=instance.in_flight, fresh=evidence is not None and evidence.fresh(now_s),
    )  # fmt: skip
    if evidence is not None and seen.fresh:
        load = evidence.load(instance.in_flight, 0, instance.in_flight_tokens, now_s)
        seen.running, seen.waiting = load.running, load.waiting
        seen.kv_blocks_free, seen.kv_blocks_total = load.kv_blocks_free, load.kv_blocks_total
    return seen
