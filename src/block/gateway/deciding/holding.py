"""Late binding online: requests that the policy would rather keep for now, tried again on a timer of the event loop.

The queue is `block.policy.hold.HeldQueue`, the one that the simulator uses (law L8); this module brings it time, metrics and
the gateway's circumstances. There is one queue a model, since requests for different models need not wait for each other.
A held request counts as active: its deadline runs, its TTFT includes the wait, and its client may leave. Nothing is held
while the gateway drains, nor what an instance has failed before, nor without predictions.
"""

import asyncio
from time import monotonic
from typing import TYPE_CHECKING

from block.gateway.exchange import Exchange
from block.policy.hold import HeldQueue, Hold, holds

if TYPE_CHECKING:
    from block.gateway.dispatch import Dispatcher


class Holding:
    """Owns the held requests of one gateway process and the timer of their next try."""

    def __init__(self, dispatcher: "Dispatcher", loop: asyncio.AbstractEventLoop) -> None:
        self._dispatcher, self._loop = dispatcher, loop
        self._queues: dict[str, HeldQueue[Exchange]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.ended = 0
        """Requests that have ended so far."""

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def oldest_s(self) -> float:
        """For how long the oldest has been held; 0 when there is none."""
        now_s = monotonic()
        return max((queue.oldest_s(now_s) for queue in self._queues.values()), default=0.0)

    def offer(self, exchange: Exchange, hold: Hold) -> None:
        """Send a request, or keep it."""
        model = exchange.request.model
        queue = self._queues.get(model)
        if queue is None:
            if self._attempt(exchange, 0.0, may_hold=True):  # the usual case: nothing is held
                return
            queue = self._queues[model] = HeldQueue(hold)
            queue.hold_on(exchange, exchange.request, _size(exchange), monotonic())
        else:
            queue.hold = hold
            self._dispatcher.decider.estimate(exchange)
            queue.offer(exchange, exchange.request, _size(exchange), monotonic(), self._try)
        self._wind(hold.tick_s)

    def release(self) -> None:
        """Send all that is held: the gateway drains, or its policy does not hold any more."""
        queues, self._queues = self._queues, {}
        for queue in queues.values():
            queue.release(self._try, monotonic())

    def close(self) -> None:
        """No more tries."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wind(self, tick_s: float) -> None:
        if self._timer is None and self._queues:
            self._timer = self._loop.call_later(tick_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        hold = self._dispatcher.decider.policy.hold
        if hold is None or self._dispatcher.draining:
            self.release()
            return
        for model, queue in list(self._queues.items()):
            queue.hold = hold
            queue.tick(monotonic(), self._try, self.ended)
            if not len(queue):
                del self._queues[model]
        self._wind(hold.tick_s)

    def _try(self, exchange: Exchange, held_s: float, may_hold: bool) -> bool:
        if not self._attempt(exchange, held_s, may_hold=may_hold):
            return False
        if held_s > 0:
            self._dispatcher.metrics.held_time.observe(held_s)
        return True

    def _attempt(self, exchange: Exchange, held_s: float, *, may_hold: bool) -> bool:
        """Decide, and send unless the decision says to hold; whether the request is off our hands."""
        dispatcher = self._dispatcher
        if exchange.over:  # its client left, or its time is up
            return True
        ids = dispatcher.eligible(exchange)
        if not ids:
            dispatcher.nobody(exchange)
            return True
        policy = dispatcher.decider.policy_for(exchange)
        decision = dispatcher.decider.decide(exchange, policy, ids)
        if exchange.request.slo is not None and dispatcher.hopeless(exchange, decision):
            return True  # said now, not after a wait
        hold = policy.hold
        trusted = decision.fallback is None  # a prediction that is known to be wrong keeps nobody waiting
        if may_hold and trusted and hold is not None and not dispatcher.draining and holds(hold, decision, held_s):
            return False
        dispatcher.send(exchange, decision)
        return True


def _size(exchange: Exchange) -> int:
    return exchange.request.prompt_tokens + exchange.expected_total
