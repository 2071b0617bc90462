"""What came and what became of it lately, for those who provision: ``GET /admin/recent?after=CURSOR``.

Two bounded rings, one of arrivals and one of ends, read with a cursor. No prompt, no client, no name is in them.
"""

import os
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec

from block.errors import BlockError, ClientError

if TYPE_CHECKING:
    from block.gateway.dispatch import Dispatcher
    from block.gateway.exchange import Exchange
    from block.gateway.members.pool import Pool


class Arrived(msgspec.Struct, array_like=True, gc=False):
    """One request that came. ``output_tokens`` is what was expected of it; predictions are the chosen instance's."""

    number: int
    at_s: float
    prompt_tokens: int
    output_tokens: int | None = None
    predicted_ttft_s: float | None = None
    predicted_e2e_s: float | None = None


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
    ends: list[Ended]
    in_flight: int
    queued: int
    instances: list[Seen]


class Recent:
    """The rings. ``kept`` 0: nothing is kept."""

    def __init__(self, kept: int) -> None:
        self._boot = os.urandom(4).hex()
        self._arrivals = deque[Arrived](maxlen=kept)
        self._ends = deque[Ended](maxlen=kept)
        self._arrived = self._ended = 0

    def arrived(self, exchange: "Exchange") -> None:
        """A request was taken in."""
        if exchange.generating:
            self._arrived += 1
            exchange.arrival = Arrived(self._arrived, exchange.request.arrived_s, exchange.request.prompt_tokens)
            self._arrivals.append(exchange.arrival)

    @staticmethod
    def decided(exchange: "Exchange") -> None:
        """It goes to an instance, for the first or another time."""
        arrival, prediction = exchange.arrival, exchange.prediction
        if arrival is not None:
            arrival.output_tokens = exchange.expected_total or None
            if prediction is not None:
                arrival.predicted_ttft_s, arrival.predicted_e2e_s = prediction.ttft_s, prediction.e2e_s

    def ended(self, exchange: "Exchange", error: BlockError | None) -> None:
        """It is over. What its client did wrong is no end worth counting."""
        arrival = exchange.arrival
        if arrival is None or (isinstance(error, ClientError) and error.status < 429):
            return
        if error is None and 400 <= exchange.status < 500 and exchange.status != 429:
            return
        failed = error is not None or exchange.status >= 400
        ttft_s = None if failed else exchange.first_byte_s - exchange.arrived_s
        e2e_s = None if failed else exchange.answered_s - exchange.arrived_s
        self._ended += 1
        self._ends.append(Ended(arrival.number, time.time(), ttft_s, e2e_s, exchange.output_tokens))

    def after(self, cursor: str, dispatcher: "Dispatcher", pool: "Pool") -> RecentAnswer:
        """All that came after a cursor (``""``: all that is kept); a cursor of another process counts as none.

        Raises:
            ClientError: 400, it is no cursor.
        """
        boot, arrived, ended = _parsed(cursor)
        if boot != self._boot:
            arrived = ended = 0
        arrivals = [a for a in self._arrivals if a.number > arrived]
        ends = list(self._ends)[-(self._ended - ended) :] if self._ended > ended else []
        missed = max(0, self._arrived - arrived - len(arrivals))
        return RecentAnswer(
            at_s=time.time(), cursor=f"{self._boot}.{self._arrived}.{self._ended}", missed=missed,
            arrivals=arrivals, ends=ends, in_flight=len(dispatcher.active), queued=len(dispatcher.queue),
            instances=[_seen(instance, dispatcher) for instance in pool.instances.values()],
        )  # fmt: skip


def _parsed(cursor: str) -> tuple[str, int, int]:
    if not cursor:
        return "", 0, 0
    boot, *numbers = cursor.split(".")
    if len(numbers) != 2 or not all(n.isascii() and n.isdigit() and len(n) < 19 for n in numbers):
        raise ClientError(400, "after must be the cursor of an earlier answer.", param="after")
    return boot, int(numbers[0]), int(numbers[1])


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
