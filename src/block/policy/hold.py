"""When is a request better kept at the gateway? Late binding: the choice is made when there is something to choose.

A request that would only wait, or push others out, binds to one instance for nothing: held, it goes to whichever has
room first. Holding needs predictions; without them nothing is held. The queue of the held is the same code online and in
simulation: pure, bounded, tried on ticks.
"""

from collections.abc import Callable, Iterator
from typing import Final, Generic, NamedTuple, TypeVar

from block.core import Decision, Prediction, Request

Item = TypeVar("Item")

IDLE_S: Final = 0.1
"""For this long nothing is asked again while no request has ended."""


class Hold(NamedTuple):
    """Keep a request, for at most ``most_s`` seconds, while even on the best instance it is predicted to wait for more than
    ``delay_s`` or to push another one out.

    ``ahead``: how many held requests may be tried behind one that does not go yet (0: strictly first come);
    ``tick_s``: how often they are tried; ``queue_max``: beyond that many held, requests are sent at once. ``by_size``: the
    smallest first, until one has waited ``patience_s`` (or half of its own TTFT target): those go before all
    others, in the order in which they came.
    """

    delay_s: float = 0.05
    most_s: float = 10.0
    ahead: int = 0
    tick_s: float = 0.02
    queue_max: int = 1024
    by_size: bool = False
    patience_s: float = 1.0


def holds(hold: Hold, decision: Decision, held_s: float) -> bool:
    """Whether to keep the request after all; ``held_s`` is how long it has been kept already."""
    prediction = prediction_of(decision)
    if prediction is None or held_s >= hold.most_s:
        return False
    return prediction.queue_delay_s > hold.delay_s or prediction.preemptions > 0


def prediction_of(decision: Decision) -> Prediction | None:
    """The chosen candidate's prediction, where there is one."""
    for candidate in decision.candidates:
        if candidate.instance == decision.instance:
            return candidate.prediction
    return None


class _Held(NamedTuple, Generic[Item]):
    number: int
    since_s: float
    patient_until_s: float
    priority: int
    size: int
    item: Item


class HeldQueue(Generic[Item]):
    """The requests that one gateway keeps for now. ``offer`` and ``tick`` are its only changes, besides ``drop``.

    What is due is tried with ``attempt(item, held_s, may_hold)``, which returns whether the item is off the queue's hands
    (sent, or over); with ``may_hold`` False it must be.
    """

    def __init__(self, hold: Hold) -> None:
        self.hold = hold
        self._held: list[_Held[Item]] = []
        self._tried_s, self._ended = 0.0, -1
        self._numbers = 0

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Item]:
        return (one.item for one in self._held)

    def oldest_s(self, now_s: float) -> float:
        """For how long the oldest has been held; 0 when there is none."""
        return max((now_s - one.since_s for one in self._held), default=0.0)

    def offer(
        self, item: Item, request: Request, size: int, now_s: float, attempt: Callable[[Item, float, bool], bool]
    ) -> bool:
        """Try a newcomer, unless as many wait as may be passed over; whether it is off our hands (else it is held).

        ``size``: tokens that it will need, prompt and expected output.
        """
        hold = self.hold
        if len(self._held) >= hold.queue_max:
            return attempt(item, 0.0, False)
        if len(self._held) <= hold.ahead and attempt(item, 0.0, True):
            return True
        self.hold_on(item, request, size, now_s)
        return False

    def hold_on(self, item: Item, request: Request, size: int, now_s: float) -> None:
        """Keep one that was tried already."""
        hold = self.hold
        target_s = request.slo.ttft_s if request.slo is not None else None
        patience_s = hold.patience_s if target_s is None else min(hold.patience_s, 0.5 * target_s)
        self._numbers += 1
        one = _Held(self._numbers, now_s, now_s + patience_s, request.priority, size, item)
        self._held.append(one)

    def tick(self, now_s: float, attempt: Callable[[Item, float, bool], bool], ended: int | None = None) -> None:
        """Try the held requests again, those whose turn it is first; ``ahead`` may go before one that does not.

        ``ended``: how many requests have ended so far. Unless one has, there is no more room than at the last tick, and
        asking again can wait for ``IDLE_S``; ``None``: always ask.
        """
        if ended is not None and ended == self._ended and now_s - self._tried_s < IDLE_S:
            return
        self._tried_s, self._ended = now_s, -1 if ended is None else ended
        most_s, failed, too_big = self.hold.most_s, 0, 1 << 62
        gone: set[int] = set()
        for one in sorted(self._held, key=lambda one: self._turn(one, now_s)):
            held_s = now_s - one.since_s
            if held_s < most_s and (failed > self.hold.ahead or one.size >= too_big):
                continue  # what does not fit now needs no second question about something bigger
            if attempt(one.item, held_s, held_s < most_s):
                gone.add(one.number)
            else:
                failed, too_big = failed + 1, min(too_big, one.size)
        if gone:
            self._held = [one for one in self._held if one.number not in gone]

    def release(self, attempt: Callable[[Item, float, bool], bool], now_s: float) -> None:
        """Send all, the oldest first: nothing is held any more (shutdown)."""
        held, self._held = self._held, []
        for one in held:
            attempt(one.item, now_s - one.since_s, False)

    def _turn(self, one: _Held[Item], now_s: float) -> tuple[int, bool, int, int]:
        """Sorts: more important first (as vLLM: lower numbers), then who has lost patience, then size, then arrival."""
        patient = self.hold.by_size and now_s < one.patient_until_s
        return (one.priority, patient, one.size if patient else 0, one.number)
