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
import logging
import time
from collections import deque
from collections.abc import Coroutine, Mapping, Sequence
from time import monotonic
from typing import Any, Final

from block.core import Decision, InstanceId, Prediction
from block.errors import BlockError, ClientError, InstanceUnreachableError
from block.gateway.config import GatewayConfig
from block.gateway.deciding.admission import Waits, retry_lines, shortfall_s
from block.gateway.deciding.decider import Decider
from block.gateway.deciding.holding import Holding
from block.gateway.deciding.learning import Learning
from block.gateway.deciding.lessons import Lessons
from block.gateway.deciding.queue import Queue, RetryBudget
from block.gateway.deciding.residuals import Interval
from block.gateway.exchange import Exchange
from block.gateway.members.pool import Instance, Pool
from block.gateway.records.books import Books
from block.gateway.records.decisions import Decisions
from block.gateway.records.metrics import Metrics
from block.gateway.records.owners import Owners
from block.gateway.records.recent import Recent
from block.gateway.records.tracing import Tracing
from block.policy.table import Policy

AGAIN_S: Final = 0.1
log = logging.getLogger("block.gateway")


class Dispatcher:
    """Owns the requests in flight, the queue and the retry budget. One per gateway process."""

    def __init__(
        self, config: GatewayConfig, pool: Pool, decider: Decider, lessons: Lessons, metrics: Metrics,
        loop: asyncio.AbstractEventLoop,
    ) -> None:  # fmt: skip
        self.config, self.pool, self.decider, self.lessons, self.metrics = config, pool, decider, lessons, metrics
        self.decisions = Decisions(config.decisions_kept)
        self.recent = Recent(config.recent_kept)
        self.books = Books(loop)
        self.owners = Owners()
        self.decision_headers = config.decision_headers
        self.draining = False
        self.active: set[Exchange] = set()
        self.queue = Queue()
        self.budget = RetryBudget(config.retry_budget_fraction)
        self._loop = loop
        self._tasks: set[asyncio.Task[None]] = set()
        self._finished = deque[float](maxlen=256)
        self.tracing: Tracing | None = None
        self._waits = Waits()
        self._over = asyncio.Event()
        self.holding = Holding(self, loop)
        self.learning = Learning()

    # Admission

    def start(self, exchange: Exchange) -> None:
        """Take a request in."""
        self.books.later(lambda: self._arrived(exchange))
        self.budget.deposit()
        if len(self.active) >= self.config.max_concurrent_requests:
            self._enqueue(exchange)
            return
        self.active.add(exchange)
        self._dispatch(exchange)

    def _arrived(self, exchange: Exchange) -> None:
        self.metrics.model(exchange.request.model).requests.inc()
        self.recent.arrived(exchange)

    def _enqueue(self, exchange: Exchange) -> None:
        """The more important first, then the earlier; a full queue loses its least important."""
        self.active.discard(exchange)
        exchange.queued_s = exchange.queued_s or monotonic()
        self.queue.add(exchange)
        if len(self.queue) > self.config.queue_size:
            last = self.queue.drop_last()
            reason = "queue_full" if last is exchange else "evicted"
            self._shed(last, reason, "The gateway is at its limit and its queue is full; try again later.")

    def _shed(self, exchange: Exchange, reason: str, message: str) -> None:
        self.metrics.rejected.labels(reason).inc()
        wait_s = self._waits.expected_s(self.active, len(self.queue), self._finished)
        exchange.refuse(ClientError(429, message, kind="rate_limit_error", code=reason), retry_lines(wait_s, reason))

    def hopeless(self, exchange: Exchange, decision: Decision) -> bool:
        """Refuse a request whose targets no instance is expected to meet, where that is asked for."""
        slo = exchange.request.slo
        if slo is None or self.config.admission != "deadline" or exchange.attempts:
            return False
        residuals, confidence = self.lessons.residuals, self.config.admission_confidence
        short_s = shortfall_s(slo, decision, residuals, confidence, monotonic() - exchange.arrived_s)
        if short_s is None:
            return False
        reason = "slo_infeasible"
        self.metrics.rejected.labels(reason).inc()
        message = f"No instance is expected to meet the request's targets now; it may in {short_s:.1f} s."
        exchange.refuse(ClientError(429, message, kind="rate_limit_error", code=reason), retry_lines(short_s, reason))
        return True

    def _pull(self) -> None:
        """A slot is free: the next in the queue that has somewhere to go goes."""
        self.queue.admit(
            lambda: len(self.active) < self.config.max_concurrent_requests,
            lambda exchange: not self.eligible(exchange) and self._full(exchange),
            self._admit,
        )

    def _admit(self, exchange: Exchange) -> None:
        self.metrics.queue_time.observe(monotonic() - exchange.queued_s)
        self.active.add(exchange)
        self._dispatch(exchange)

    # Decision and sending

    def eligible(self, exchange: Exchange) -> Sequence[InstanceId]:
        """Instances that may get it, those that failed it, and those that its client did not ask for, left out."""
        ids = self.pool.eligible(exchange.request.model)
        if exchange.asked.only is not None:
            ids = tuple(i for i in ids if i in exchange.asked.only)
        return [i for i in ids if i not in exchange.tried] if exchange.tried else ids

    def _dispatch(self, exchange: Exchange) -> None:
        ids = self.eligible(exchange)
        if not ids:
            self.nobody(exchange)
            return
        policy = self.decider.policy_for(exchange)
        if self.decider.asks_remotely(policy):
            self._spawn(self._dispatch_remotely(exchange, policy, ids))
        elif policy.hold is None or exchange.tried:
            self.send(exchange, self.decider.decide(exchange, policy, ids))
        else:
            self.holding.offer(exchange, policy.hold)

    def would(self, exchange: Exchange) -> bytes:
        """Where a request would go if it came now, explained as a decision that was made is.

        Raises:
            ClientError: 503, there is no instance for it; 400, the predictors are asked remotely.
        """
        ids = self.eligible(exchange)
        if not ids:
            message = f"No instance is ready: {self._why_nobody(exchange)}."
            raise ClientError(503, message, kind="server_error", code="no_ready_endpoint")
        policy = self.decider.policy_for(exchange)
        if self.decider.asks_remotely(policy):
            raise ClientError(400, "Questions need predict = 'local'.", code="not_local")
        exchange.decision = decision = self.decider.decide(exchange, policy, ids)
        exchange.decided_s, exchange.prediction = monotonic(), decision.candidates[_place(decision)].prediction
        self.interval_of(exchange)
        return self.decisions.described(exchange, self.pool.left_out(exchange.request.model))

    async def _dispatch_remotely(self, exchange: Exchange, policy: Policy, ids: Sequence[InstanceId]) -> None:
        decision = await self.decider.decide_remotely(exchange, policy, ids)
        if exchange.over:
            return
        if decision is None:
            self.nobody(exchange)
        else:
            self.send(exchange, decision)

    def nobody(self, exchange: Exchange) -> None:
        """There is no instance for it: all failed it, all are full, or none is ready."""
        if self._wait_for_somebody(exchange):
            return
        why = self._why_nobody(exchange)
        if exchange.tried:
            message = f"No instance could answer: {why}."
            exchange.refuse(ClientError(502, message, kind="server_error", code="instances_failed"))
        elif self._full(exchange):
            self._enqueue(exchange)
        else:
            error = ClientError(503, f"No instance is ready: {why}.", kind="server_error", code="no_ready_endpoint")
            exchange.refuse(error, b"retry-after: 1\r\n")

    def _why_nobody(self, exchange: Exchange) -> str:
        if exchange.asked.only is None:
            return self.pool.why_none()
        states = [f"{i}: {self.pool.instances[i].reason}" for i in exchange.asked.only if i in self.pool.instances]
        return "; ".join(states[:8]) or "none of those that the request asks for is here"

    def _full(self, exchange: Exchange) -> bool:
        """Instances for it are ready, all at their limit."""
        return self.pool.full(exchange.request.model, exchange.asked.only)

    def send(self, exchange: Exchange, decision: Decision) -> None:
        """Send it where the decision says."""
        if exchange.request.slo is not None and self.hopeless(exchange, decision):
            return
        instance = self.pool.instances[decision.instance]
        exchange.decision, exchange.instance = decision, instance
        exchange.attempts += 1
        exchange.prediction = prediction = decision.candidates[_place(decision)].prediction
        exchange.decided_s = now_s = monotonic()
        exchange.interval = None
        wall_s, left_out = time.time(), self.pool.left_out(exchange.request.model)
        deciding_s = exchange.deciding_s
        self.books.later(lambda: self._sent(exchange, decision, left_out, prediction, wall_s, deciding_s))
        exchange.tokens = exchange.request.prompt_tokens + exchange.expected_total
        self.pool.started(instance, exchange.tokens, now_s)
        self.decider.sent(exchange, instance)
        connection = instance.connections.take()
        if connection is not None:
            exchange.send_on(connection, instance)
        else:
            exchange.connecting = self._spawn(self._connect(exchange, instance))

    def _sent(
        self, exchange: Exchange, decision: Decision, left_out: Mapping[InstanceId, str], prediction: Prediction | None,
        wall_s: float, deciding_s: float,
    ) -> None:  # fmt: skip
        """Write a decision down, with what was so when it was made."""
        self.interval_of(exchange)
        self.decisions.note(exchange, left_out)
        self.recent.decided(exchange, prediction, wall_s)
        self.metrics.sent_to(decision.instance).inc()
        self.metrics.decision_time.observe(deciding_s)

    def interval_of(self, exchange: Exchange) -> Interval | None:
        """Around its prediction, found out when it is first asked for; ``None``: there is no prediction."""
        decision, prediction = exchange.decision, exchange.prediction
        if exchange.interval is None and decision is not None and prediction is not None:
            exchange.interval = self.lessons.residuals.interval(
                decision.instance, prediction, exchange.estimate, exchange.expected_total, exchange.decided_s
            )
        return exchange.interval

    def _unbook(self, exchange: Exchange) -> None:
        """Its instance is rid of it, for now or for good."""
        instance, exchange.instance = exchange.instance, None
        if instance is None:
            return
        self.pool.ended(instance, exchange.tokens)
        if exchange.streaming:
            instance.streaming -= 1
            exchange.streaming = False
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
        if refused or instance.suspect is None:
            self.pool.failed(instance, str(error), monotonic(), refused=refused)
        if instance.failures_in_row == 1:  # its first: if it died, all that it had in flight wants to be sent again
            self.budget.credit(instance.in_flight - 1)
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
        others = any(i != exchange.instance.id for i in self.eligible(exchange))
        return others and exchange.attempts <= self.config.retries and self.budget.withdraw()

    def _again(self, exchange: Exchange, reason: str) -> None:
        assert exchange.instance is not None
        exchange.tried.add(exchange.instance.id)
        exchange.resent = False
        self.metrics.retries.labels(reason).inc()
        self._unbook(exchange)
        self._dispatch(exchange)

    # Going on in mid-stream

    def continues(self, exchange: Exchange, error: BlockError) -> bool:
        """The answer of an instance broke off after it had begun: whether the client gets the rest from another one."""
        tape, instance = exchange.tape, exchange.instance
        assert tape is not None
        assert instance is not None
        if not tape.can_continue or tape.attempts >= self.config.continue_streams:
            return False
        if instance.suspect is None:  # a suspect one gets nothing as it is, and is back as soon as it moves
            self.pool.failed(instance, str(error), monotonic(), refused=False)
        self.metrics.continued.labels(instance.id).inc()
        self._unbook(exchange)
        if tape.complete:
            exchange.complete()
            return True
        log.info("a stream goes on after %d tokens: %s %s", tape.count, instance.id, error)
        exchange.tried, exchange.attempts, exchange.resent = {instance.id}, 0, False
        exchange.request = tape.again(monotonic())
        self._dispatch(exchange)
        return True

    def _wait_for_somebody(self, exchange: Exchange) -> bool:
        """Nobody can take the rest of a stream now: look again in a moment, for as long as requests may queue."""
        tape = exchange.tape
        if tape is None or not tape.attempts or monotonic() - tape.broke_s > self.config.queue_timeout_s:
            return False
        exchange.tried.clear()
        self._loop.call_later(AGAIN_S, lambda: None if exchange.over else self._dispatch(exchange))
        return True

    def move_from_the_silent(self, now_s: float) -> None:
        """What waits at an instance that has been silent for too long is asked of another one: requests that have no byte
        of their answer yet, and streams that can go on."""
        after_s = self.config.continue_silent_s
        instances = self.pool.instances.values()
        silent = [i for i in instances if after_s and i.suspect and i.in_flight and i.silent_s > after_s]
        if not silent:
            return
        for exchange in [x for x in self.active if x.instance in silent and now_s - x.sent_s > after_s]:
            if exchange.head_sent:
                movable = exchange.tape is not None and exchange.tape.can_continue
            else:
                movable = exchange.attempts <= self.config.retries and self.budget.left >= 1
            if movable and self._somebody_moves(exchange):
                exchange.lose(f"was silent for {after_s:g} s")

    def _somebody_moves(self, exchange: Exchange) -> bool:
        """Another instance may have it that is not suspected itself."""
        instances = self.pool.instances
        return any(instances[i] is not exchange.instance and not instances[i].suspect for i in self.eligible(exchange))

    # The end

    def ended(self, exchange: Exchange, error: BlockError | None) -> None:
        """Whole, refused, broken or timed out: settle the accounts, learn from it."""
        if exchange.over:
            return
        exchange.over = True
        self.active.discard(exchange)
        instance = exchange.instance
        if exchange.tape is not None and exchange.tape.attempts:  # what was decided last is not what was asked first
            exchange.request, exchange.prediction = exchange.tape.request, None
        broken = error is not None and exchange.head_sent and not isinstance(error, ClientError)
        if instance is not None and broken:
            self.pool.failed(instance, str(error), monotonic(), refused=False)
        elif instance is not None and error is None and exchange.status < 500 and exchange.status != 429:
            self.pool.succeeded(instance)
        self._unbook(exchange)
        wall_s = time.time()
        self.books.later(lambda: self._ended(exchange, error, instance, wall_s, broken=broken))
        if self.tracing is not None:  # a span's end has its time from the clock
            self.books.settle()
        self._over.set()
        self._finished.append(monotonic())
        self.holding.ended += 1
        if self.queue:
            self._loop.call_soon(self._pull)

    def _ended(
        self, exchange: Exchange, error: BlockError | None, instance: Instance | None, wall_s: float, *, broken: bool
    ) -> None:  # fmt: skip
        """Write an end down, and learn from it."""
        exchange.instance = instance  # whose answer it was
        self._note_overhead(exchange)
        if error is not None:
            self.metrics.errors.labels(_code(error)).inc()
            if instance is not None and broken:
                self.metrics.broken.labels(instance.id).inc()
        elif instance is not None and exchange.status >= 400:
            self.metrics.errors.labels(str(exchange.status)).inc()
        elif instance is not None:
            self.lessons.take(exchange)
            self.learning.take(self.decider.policy, exchange)
            self.decider.drift.take(exchange)
        self.decisions.finish(exchange, error)
        self.recent.ended(exchange, error, wall_s)
        if self.tracing is not None:
            self.tracing.end(exchange, error)

    def abandoned(self, exchange: Exchange) -> None:
        """The client left."""
        if not exchange.over:
            exchange.over = True
            self.active.discard(exchange)
            self._unbook(exchange)
            self.books.later(lambda: self._abandoned(exchange))
            if self.tracing is not None:
                self.books.settle()
            self._over.set()
            if self.queue:
                self._loop.call_soon(self._pull)

    def _note_overhead(self, exchange: Exchange) -> None:
        if exchange.overhead_s:
            self.metrics.overhead.observe(exchange.overhead_s)

    def _abandoned(self, exchange: Exchange) -> None:
        self._note_overhead(exchange)
        self.metrics.disconnects.inc()
        self.decisions.finish(exchange, None)
        if self.tracing is not None:
            self.tracing.end(exchange, None)

    def sweep(self) -> None:
        """End what is overdue. Called a few times a second."""
        self.books.settle()
        now_s = monotonic()
        timeout_s, stall_s = self.config.request_timeout_s, self.config.body_timeout_s
        for exchange in [x for x in self.active if now_s - x.arrived_s > timeout_s]:
            exchange.timed_out()
        for exchange in [x for x in self.active if x.paused_s and now_s - x.paused_s > stall_s]:
            exchange.client.abort()
        if keep_s := self.config.sse_keep_alive_s:
            for exchange in [x for x in self.active if x.sse and now_s - x.heard_s > keep_s]:
                exchange.keep_client(now_s)
        self.decider.drift.look(now_s, self.decider.evidence)
        self.move_from_the_silent(now_s)
        for exchange in self.queue.drop_late(now_s - self.config.queue_timeout_s):
            self._shed(exchange, "queue_timeout", "The request waited in the gateway's queue for as long as it may.")
        if self.queue:
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


def _place(decision: Decision) -> int:
    candidates = decision.candidates
    if len(candidates) == 1:
        return 0
    return next(n for n, candidate in enumerate(candidates) if candidate.instance == decision.instance)


def _code(error: BlockError) -> str:
    if isinstance(error, ClientError):
        return error.code or str(error.status)
    return "stream_broken"
