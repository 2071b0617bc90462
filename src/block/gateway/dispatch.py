"""Where a request goes: a request's life from its last byte in to its last byte out.

Theory of operation. A request arrives whole. It is *admitted*, or queues (bounded, with a deadline), or is refused with
429. Then it is *decided*:

    estimate    the length estimator says what it will probably generate
    shortlist   the policy says whom to consider among the instances that are eligible for its model
    evidence    for those, what the policy's rank needs: nothing, counters, or a what-if on every mirror in one call
    rank        `block.policy.choose.decide` costs them and applies the fallback rules; nothing here compares candidates

and *sent*, on an idle connection where there is one. The ledger of the chosen instance counts it from that moment.
Until a byte of an answer has gone to the client it can be sent elsewhere: after a refused or broken connection, or an
answer of 429 or 5xx, as long as there is an instance that it has not tried, ``retries`` is not used up and the budget
allows it (a share of recent requests, so that a failing cluster does not drown in repetitions; a refused connection costs
the instance nothing and needs no budget). After that byte it is the client's: it ends whole, or with an error event.

Everything here runs in callbacks of one event loop, without tasks, except for opening a connection and asking remote
predictors. A predictor can change which instance is chosen and never whether one is: whatever it does ends as missing
evidence, the policy falls back, and the fallback is counted.
"""

import asyncio
import math
from collections import deque
from collections.abc import Coroutine, Sequence
from time import monotonic
from typing import Any, Final

from block.core import Decision, InstanceId
from block.errors import BlockError, ClientError, InstanceUnreachableError
from block.gateway.config import GatewayConfig
from block.gateway.decider import Decider
from block.gateway.decisions import Decisions
from block.gateway.exchange import Exchange
from block.gateway.lessons import Lessons
from block.gateway.metrics import Metrics
from block.gateway.pool import Instance, Pool
from block.policy.table import Policy


class Dispatcher:
    """Owns the requests in flight, the queue and the retry budget. One per gateway process."""

    def __init__(
        self, config: GatewayConfig, pool: Pool, decider: Decider, lessons: Lessons, metrics: Metrics,
        loop: asyncio.AbstractEventLoop,
    ) -> None:  # fmt: skip
        self.config, self.pool, self.decider, self.lessons, self.metrics = config, pool, decider, lessons, metrics
        self.decisions = Decisions(config.decisions_kept)
        self.decision_headers = config.decision_headers
        self.draining = False
        self.active: set[Exchange] = set()
        self.queue: deque[Exchange] = deque()
        self.budget = RetryBudget(config.retry_budget_fraction)
        self._loop = loop
        self._tasks: set[asyncio.Task[None]] = set()
        self._finished = deque[float](maxlen=256)
        self._over = asyncio.Event()

    # Admission

    def start(self, exchange: Exchange) -> None:
        """Take a request in."""
        self.metrics.model(exchange.request.model).requests.inc()
        self.budget.deposit()
        if len(self.active) >= self.config.max_concurrent_requests:
            self._enqueue(exchange)
            return
        self.active.add(exchange)
        self._dispatch(exchange)

    def _enqueue(self, exchange: Exchange) -> None:
        if len(self.queue) >= self.config.queue_size:
            self._shed(exchange, "queue_full", "The gateway is at its limit and its queue is full; try again later.")
            return
        self.active.discard(exchange)
        exchange.queued_s = exchange.queued_s or monotonic()
        self.queue.append(exchange)

    def _shed(self, exchange: Exchange, reason: str, message: str) -> None:
        self.metrics.rejected.labels(reason).inc()
        extra = b"retry-after: %d\r\nx-llm-d-request-dropped-reason: rejected-%b\r\n" % (
            self.expected_wait_s(),
            reason.replace("_", "-").encode(),
        )
        exchange.refuse(ClientError(429, message, kind="rate_limit_error", code=reason), extra)

    def expected_wait_s(self) -> int:
        """Whole seconds until a slot is free for one more, at the pace of the last finished requests; 1-60."""
        finished = self._finished
        if len(finished) < 2 or monotonic() <= finished[0]:
            return 1
        pace = len(finished) / (monotonic() - finished[0])
        return max(1, min(60, math.ceil((len(self.queue) + 1) / pace)))

    def _pull(self) -> None:
        """A slot is free: the next in the queue goes."""
        while self.queue and len(self.active) < self.config.max_concurrent_requests:
            exchange = self.queue.popleft()
            if exchange.over:
                continue
            if not self._eligible(exchange) and self.pool.full(exchange.request.model):
                self.queue.appendleft(exchange)
                return
            self.metrics.queue_time.observe(monotonic() - exchange.queued_s)
            self.active.add(exchange)
            self._dispatch(exchange)

    # Decision and sending

    def _eligible(self, exchange: Exchange) -> Sequence[InstanceId]:
        ids = self.pool.eligible(exchange.request.model)
        return [i for i in ids if i not in exchange.tried] if exchange.tried else ids

    def _dispatch(self, exchange: Exchange) -> None:
        ids = self._eligible(exchange)
        if not ids:
            self._nobody(exchange)
            return
        policy = self.decider.policy_for(exchange)
        if self.decider.asks_remotely(policy):
            self._spawn(self._dispatch_remotely(exchange, policy, ids))
        else:
            self._send(exchange, self.decider.decide(exchange, policy, ids))

    async def _dispatch_remotely(self, exchange: Exchange, policy: Policy, ids: Sequence[InstanceId]) -> None:
        decision = await self.decider.decide_remotely(exchange, policy, ids)
        if exchange.over:
            return
        if decision is None:
            self._nobody(exchange)
        else:
            self._send(exchange, decision)

    def _nobody(self, exchange: Exchange) -> None:
        """There is no instance for it: all failed it, all are full, or none is ready."""
        why = self.pool.why_none()
        if exchange.tried:
            message = f"No instance could answer: {why}."
            exchange.refuse(ClientError(502, message, kind="server_error", code="instances_failed"))
        elif self.pool.full(exchange.request.model):
            self._enqueue(exchange)
        else:
            error = ClientError(503, f"No instance is ready: {why}.", kind="server_error", code="no_ready_endpoint")
            exchange.refuse(error, b"retry-after: 1\r\n")

    def _send(self, exchange: Exchange, decision: Decision) -> None:
        instance = self.pool.instances[decision.instance]
        exchange.decision, exchange.instance = decision, instance
        exchange.attempts += 1
        exchange.prediction = decision.candidates[_place(decision)].prediction
        self.decisions.note(exchange)
        exchange.tokens = exchange.request.prompt_tokens + exchange.expected_total
        self.pool.started(instance, exchange.tokens, monotonic())
        self.decider.sent(exchange, instance)
        self.metrics.sent_to(instance.id).inc()
        connection = instance.connections.take()
        if connection is not None:
            exchange.send_on(connection, instance)
        else:
            exchange.connecting = self._spawn(self._connect(exchange, instance))

    def _unbook(self, exchange: Exchange) -> None:
        """Its instance is rid of it, for now or for good."""
        instance, exchange.instance = exchange.instance, None
        if instance is None:
            return
        self.pool.ended(instance, exchange.tokens)
        if exchange.sse:
            instance.streaming -= 1
        self.decider.over(exchange, instance)

    async def _connect(self, exchange: Exchange, instance: Instance) -> None:
        try:
            connection = await instance.connections.connect()
        except InstanceUnreachableError as error:
            exchange.connecting = None
            if not exchange.over:
                self.failed_unanswered(exchange, error, stale_connection=False, refused=True)
            return
        exchange.connecting = None
        if exchange.over:
            instance.connections.give_back(connection)
        else:
            exchange.send_on(connection, instance)

    # Retrying

    def declines(self, exchange: Exchange, status: int) -> bool:
        """An instance answered with a status that another might not: whether the request goes elsewhere instead."""
        instance = exchange.instance
        assert instance is not None
        if status != 429:
            self.pool.failed(instance, f"answered {status}", monotonic(), refused=False)
        if not self._may_retry(exchange):
            return False
        assert exchange.connection is not None
        exchange.connection.abandon()
        exchange.connection = None
        self._again(exchange, f"status_{status}")
        return True

    def failed_unanswered(
        self, exchange: Exchange, error: BlockError, *, stale_connection: bool, refused: bool = False
    ) -> None:
        """Not a byte went to the client yet."""
        instance = exchange.instance
        assert instance is not None
        if stale_connection:  # it closed an idle connection just as we used it: nobody's fault
            exchange.resent = True
            exchange.connecting = self._spawn(self._connect(exchange, instance))
            return
        self.pool.failed(instance, str(error), monotonic(), refused=refused)
        if refused or self._may_retry(exchange):
            self._again(exchange, "refused" if refused else "broken")
            return
        exchange.refuse(
            ClientError(
                502, f"The instance {instance.id} failed: {error}.", kind="server_error", code="instance_failed"
            )
        )

    def _may_retry(self, exchange: Exchange) -> bool:
        """There is somebody else, it has not been tried too often, and the budget (which this takes from) allows it."""
        assert exchange.instance is not None
        others = any(i != exchange.instance.id for i in self._eligible(exchange))
        return others and exchange.attempts <= self.config.retries and self.budget.withdraw()

    def _again(self, exchange: Exchange, reason: str) -> None:
        assert exchange.instance is not None
        exchange.tried.add(exchange.instance.id)
        exchange.resent = False
        self.metrics.retries.labels(reason).inc()
        self._unbook(exchange)
        self._dispatch(exchange)

    # The end

    def ended(self, exchange: Exchange, error: BlockError | None) -> None:
        """Whole, refused, broken or timed out: settle the accounts, learn from it."""
        if exchange.over:
            return
        exchange.over = True
        self.active.discard(exchange)
        instance = exchange.instance
        if error is not None:
            self.metrics.errors.labels(_code(error)).inc()
            if instance is not None and exchange.head_sent and not isinstance(error, ClientError):
                self.metrics.broken.labels(instance.id).inc()
                self.pool.failed(instance, str(error), monotonic(), refused=False)
        elif instance is not None:
            if exchange.status < 500 and exchange.status != 429:
                self.pool.succeeded(instance)
            if exchange.status >= 400:
                self.metrics.errors.labels(str(exchange.status)).inc()
            else:
                self.lessons.take(exchange)
        self.decisions.finish(exchange, error)
        self._unbook(exchange)
        self._over.set()
        self._finished.append(monotonic())
        if self.queue:
            self._loop.call_soon(self._pull)

    def abandoned(self, exchange: Exchange) -> None:
        """The client left."""
        if not exchange.over:
            exchange.over = True
            self.active.discard(exchange)
            self.metrics.disconnects.inc()
            self.decisions.finish(exchange, None)
            self._unbook(exchange)
            self._over.set()
            if self.queue:
                self._loop.call_soon(self._pull)

    def sweep(self) -> None:
        """End what is overdue. Called a few times a second."""
        now_s = monotonic()
        timeout_s, stall_s = self.config.request_timeout_s, self.config.body_timeout_s
        for exchange in [x for x in self.active if now_s - x.arrived_s > timeout_s]:
            exchange.timed_out()
        for exchange in [x for x in self.active if x.paused_s and now_s - x.paused_s > stall_s]:
            exchange.client.abort()
        while self.queue and (self.queue[0].over or now_s - self.queue[0].queued_s > self.config.queue_timeout_s):
            exchange = self.queue.popleft()
            if not exchange.over:
                self._shed(
                    exchange, "queue_timeout", "The request waited in the gateway's queue for as long as it may."
                )
        self._pull()

    async def idle(self) -> None:
        """Until no request is in flight or queued."""
        while self.active or self.queue:
            self._over.clear()
            await self._over.wait()

    def tasks(self) -> list[asyncio.Task[None]]:
        """Connections being opened and predictors being asked."""
        return list(self._tasks)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task: asyncio.Task[None] = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class RetryBudget:
    """A bucket of retries: filled by a share of the requests, emptied by retries. Starts with ``START``."""

    START: Final = 100.0
    MOST: Final = 1000.0

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction
        self.left = self.START

    def deposit(self) -> None:
        self.left = min(self.left + self._fraction, self.MOST)

    def withdraw(self) -> bool:
        if self.left < 1:
            return False
        self.left -= 1
        return True


def _place(decision: Decision) -> int:
    candidates = decision.candidates
    if len(candidates) == 1:
        return 0
    return next(n for n, candidate in enumerate(candidates) if candidate.instance == decision.instance)


def _code(error: BlockError) -> str:
    if isinstance(error, ClientError):
        return error.code or str(error.status)
    return "stream_broken"
