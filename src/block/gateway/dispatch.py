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
import math
import time
from collections import deque
from collections.abc import Sequence
from random import Random
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from block.core import Candidate, Decision, InstanceId, Request
from block.errors import BlockError, ClientError, InstanceUnreachableError
from block.gateway.config import GatewayConfig
from block.gateway.decisions import Decisions
from block.gateway.evidence import Evidence as InstanceEvidence
from block.gateway.expectations import Expectations
from block.gateway.exchange import Exchange
from block.gateway.lengths import HeaderLengths
from block.gateway.metrics import Metrics
from block.gateway.openai import PromptRatio, usage_of
from block.gateway.pool import Instance, Pool
from block.policy.choose import decide
from block.policy.rank import Evidence
from block.policy.table import Policy, make_policy
from block.predict.whatif import Oracle

if TYPE_CHECKING:
    from block.gateway.remote import RemotePredictors

log = logging.getLogger("block.gateway")
DEFAULT_MAX_TOKENS: Final = 4096


class Dispatcher:
    """Owns the requests in flight, the queue and the retry budget. One per gateway process."""

    def __init__(
        self,
        config: GatewayConfig,
        pool: Pool,
        policy: Policy,
        estimator: Any,
        metrics: Metrics,
        rng: Random,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.config, self.pool, self.policy, self.estimator, self.metrics = config, pool, policy, estimator, metrics
        self.rng, self.loop = rng, loop
        self.expectations = Expectations(estimator)
        self.evidence: dict[InstanceId, InstanceEvidence] = {}
        self.ratio = PromptRatio()
        self.decisions = Decisions(config.decisions_kept)
        self.decision_headers = config.decision_headers
        self.remote: RemotePredictors | None = None
        self.draining = False
        self.active: set[Exchange] = set()
        self.queue: deque[Exchange] = deque()
        self.budget = RetryBudget(config.retry_budget_fraction)
        self._fewest = make_policy("least-outstanding")
        self._oracle = Oracle()
        self._lessons = Lessons()
        self._bare: dict[InstanceId, Candidate] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._finished = deque[float](maxlen=256)

    @staticmethod
    def wall_s() -> float:
        """Wall-clock seconds, as in snapshots."""
        return time.time()

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

    # Decision

    def _eligible(self, exchange: Exchange) -> Sequence[InstanceId]:
        ids = self.pool.eligible(exchange.request.model)
        return [i for i in ids if i not in exchange.tried] if exchange.tried else ids

    def _dispatch(self, exchange: Exchange) -> None:
        ids = self._eligible(exchange)
        if not ids:
            self._nobody(exchange)
            return
        policy = self.policy if exchange.generating else self._fewest
        if self.remote is not None and policy.rank.needs is Evidence.PREDICTION:
            self._spawn(self._dispatch_remotely(exchange, policy, ids, self.remote))
            return
        started_s = time.perf_counter()
        candidates = self._candidates(exchange, policy, policy.shortlist.choose(ids, self.rng))
        self._send(exchange, decide(policy, exchange.request, candidates, self.rng), started_s)

    def _nobody(self, exchange: Exchange) -> None:
        model = exchange.request.model
        if exchange.tried:
            exchange.refuse(
                ClientError(
                    502,
                    f"No instance could answer: {self.pool.why_none()}.",
                    kind="server_error",
                    code="instances_failed",
                )
            )
        elif self.pool.full(model):
            self._enqueue(exchange)
        else:
            exchange.refuse(
                ClientError(
                    503, f"No instance is ready: {self.pool.why_none()}.", kind="server_error", code="no_ready_endpoint"
                ),
                b"retry-after: 1\r\n",
            )

    def _candidates(self, exchange: Exchange, policy: Policy, ids: Sequence[InstanceId]) -> list[Candidate]:
        needs = policy.rank.needs
        if needs is Evidence.NOTHING:
            return [self._bare.get(i) or self._bare.setdefault(i, Candidate(i)) for i in ids]
        self._estimate(exchange)
        now_s = time.time()
        if needs is Evidence.LOAD:
            return [Candidate(i, self._load(i, now_s)) for i in ids]
        return self._predicted(exchange, ids, now_s, harm=policy.rank.harm)

    def _estimate(self, exchange: Exchange) -> None:
        if isinstance(self.estimator, HeaderLengths):
            self.estimator.listen(exchange.request, exchange.http)
        estimate = self.estimator.estimate(exchange.request)
        exchange.expected_total = max(1, round(estimate.expected_total(0)))
        exchange.estimate = estimate

    def _load(self, instance_id: InstanceId, now_s: float) -> Any:
        instance = self.pool.instances[instance_id]
        recent = instance.sent.advance(monotonic())
        return self.evidence[instance_id].load(instance.in_flight, recent, instance.in_flight_tokens, now_s)

    def _predicted(self, exchange: Exchange, ids: Sequence[InstanceId], now_s: float, *, harm: bool) -> list[Candidate]:
        """A what-if for every candidate that has evidence; where one lacks it, counters for all (they will be needed)."""
        started_s = time.perf_counter()
        mirrors = [self._mirror(i, now_s) for i in ids]
        known = [i for i, mirror in zip(ids, mirrors, strict=True) if mirror is not None]
        if len(known) < len(ids):
            for i in set(ids).difference(known):
                self.metrics.evidence_missing.labels(i).inc()
            return [Candidate(i, self._load(i, now_s)) for i in ids]
        predictions = self._ask(exchange, ids, mirrors, now_s, harm=harm)
        self.metrics.predict_time.observe(time.perf_counter() - started_s)
        if predictions is None:
            return [Candidate(i, self._load(i, now_s)) for i in ids]
        return [Candidate(i, None, prediction) for i, prediction in zip(ids, predictions, strict=True)]

    def _mirror(self, instance_id: InstanceId, now_s: float) -> Any:
        evidence = self.evidence[instance_id]
        try:
            return evidence.mirror(now_s)
        except MODEL_ERRORS as error:
            evidence.spoiled(f"the engine model cannot work with its snapshot: {error!r}")
            return None

    def _ask(
        self, exchange: Exchange, ids: Sequence[InstanceId], mirrors: list[Any], now_s: float, *, harm: bool
    ) -> Any:
        request = exchange.request
        question: dict[str, Any] = {
            "prompt_tokens": request.prompt_tokens, "max_tokens": self._max_tokens(request, ids[0]),
            "output_tokens": exchange.expected_total, "now_s": now_s, "horizon_s": self.config.horizon_s, "harm": harm,
        }  # fmt: skip
        try:
            return self._oracle.predict_all(mirrors, **question)
        except MODEL_ERRORS:
            for instance_id, mirror in zip(ids, mirrors, strict=True):  # whose fault was it?
                try:
                    self._oracle.predict_all([mirror], **question)
                except MODEL_ERRORS as error:
                    self.evidence[instance_id].spoiled(f"the engine model cannot work with its snapshot: {error!r}")
            return None

    def _max_tokens(self, request: Request, instance_id: InstanceId) -> int:
        if request.max_tokens is not None:
            return request.max_tokens
        snapshot = self.evidence[instance_id].snapshot
        return DEFAULT_MAX_TOKENS if snapshot is None else max(1, snapshot.limits.max_model_len - request.prompt_tokens)

    async def _dispatch_remotely(
        self, exchange: Exchange, policy: Policy, ids: Sequence[InstanceId], remote: "RemotePredictors"
    ) -> None:
        started_s = time.perf_counter()
        shortlist = policy.shortlist.choose(ids, self.rng)
        self._estimate(exchange)
        predictions = await remote.ask(shortlist, exchange.request, exchange.expected_total)
        if exchange.over:
            return
        now_s = time.time()
        candidates = [
            Candidate(i, self._load(i, now_s), p)
            for i, p in zip(shortlist, predictions, strict=True)
            if i in self.pool.instances
        ]
        for candidate in candidates:
            if candidate.prediction is None:
                self.metrics.evidence_missing.labels(candidate.instance).inc()
        if not candidates:
            self._nobody(exchange)
            return
        self._send(exchange, decide(policy, exchange.request, candidates, self.rng), started_s)

    # Sending

    def _send(self, exchange: Exchange, decision: Decision, started_s: float) -> None:
        self.metrics.decision_time.observe(time.perf_counter() - started_s)
        if decision.fallback is not None:
            self.metrics.fallbacks.labels(decision.fallback).inc()
        instance = self.pool.instances[decision.instance]
        exchange.decision, exchange.instance = decision, instance
        exchange.attempts += 1
        exchange.prediction = decision.candidates[_place(decision)].prediction
        self.decisions.note(exchange)
        self._book(exchange, instance)
        connection = instance.connections.take()
        if connection is not None:
            exchange.send_on(connection, instance)
        else:
            exchange.connecting = self._spawn(self._connect(exchange, instance))

    def _book(self, exchange: Exchange, instance: Instance) -> None:
        """Count it on its instance, in the pool and (where the policy looks) in the ledger of unseen requests."""
        request = exchange.request
        exchange.tokens = request.prompt_tokens + exchange.expected_total
        self.pool.started(instance, exchange.tokens, monotonic())
        if exchange.generating and exchange.expected_total and instance.config.predictor is not None:
            evidence = self.evidence[instance.id]
            exchange.key = evidence.sent(
                request, self._max_tokens(request, instance.id), exchange.expected_total, time.time()
            )
            self.expectations.expect(exchange.key, exchange.estimate)

    def _unbook(self, exchange: Exchange) -> None:
        instance = exchange.instance
        if instance is None:
            return
        self.pool.ended(instance, exchange.tokens)
        if exchange.sse:
            instance.streaming -= 1
        if exchange.key:
            evidence = self.evidence.get(instance.id)
            if evidence is not None:
                evidence.ended(exchange.key)
            self.expectations.forget(exchange.key)
            exchange.key = 0
        exchange.instance = None

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
                self._learn(exchange, instance)
        self.decisions.finish(exchange, error)
        self._unbook(exchange)
        self._finished.append(monotonic())
        if self.queue:
            self.loop.call_soon(self._pull)

    def abandoned(self, exchange: Exchange) -> None:
        """The client left."""
        if not exchange.over:
            exchange.over = True
            self.active.discard(exchange)
            self.metrics.disconnects.inc()
            self.decisions.finish(exchange, None)
            self._unbook(exchange)
            if self.queue:
                self.loop.call_soon(self._pull)

    def _learn(self, exchange: Exchange, instance: Instance) -> None:
        request, metrics = exchange.request, self.metrics.model(exchange.request.model)
        duration_s = exchange.answered_s - exchange.arrived_s
        metrics.duration.observe(duration_s)
        if not exchange.generating:
            return
        prompt_tokens, output_tokens = usage_of(exchange.tail)
        if prompt_tokens and exchange.prompt_bytes:
            self.ratio.observe(request.model, exchange.prompt_bytes, prompt_tokens)
        if output_tokens is None and exchange.sse:
            output_tokens = max(1, exchange.events - 1 - request_role_events(exchange))
        metrics.prompt_tokens.inc(prompt_tokens or request.prompt_tokens)
        if output_tokens:
            metrics.output_tokens.inc(output_tokens)
            if self._lessons.allows(exchange.answered_s):
                self.estimator.observe(request, output_tokens)
        ttft_s = exchange.first_byte_s - exchange.arrived_s if exchange.sse else None
        tpot_s = None
        if ttft_s is not None:
            metrics.ttft.observe(ttft_s)
            if output_tokens and output_tokens > 1:
                tpot_s = (duration_s - ttft_s) / (output_tokens - 1)
                metrics.tpot.observe(tpot_s)
            if exchange.prediction is not None and exchange.prediction.ttft_s > 0:
                metrics.predicted_ttft.observe(exchange.prediction.ttft_s)
                metrics.prediction_error.observe(ttft_s / exchange.prediction.ttft_s)
        if request.slo is not None:
            for kind, target, got in (
                ("ttft", request.slo.ttft_s, ttft_s), ("tpot", request.slo.tpot_s, tpot_s), ("e2e", request.slo.e2e_s, duration_s),
            ):  # fmt: skip
                if target is not None and got is not None and got > target:
                    self.metrics.slo_violations.labels(kind).inc()

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

    def tasks(self) -> list[asyncio.Task[None]]:
        """Connections being opened and predictors being asked."""
        return list(self._tasks)

    def forget(self, instance: InstanceId) -> None:
        """An instance left."""
        self.evidence.pop(instance, None)
        self._bare.pop(instance, None)

    def _spawn(self, coroutine: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class Lessons:
    """Lets the estimator learn from ``PER_SECOND`` answers a second: more of the same hour teach nothing and cost time."""

    PER_SECOND: Final = 100

    def __init__(self) -> None:
        self._second, self._given = 0, 0

    def allows(self, now_s: float) -> bool:
        if int(now_s) != self._second:
            self._second, self._given = int(now_s), 0
        self._given += 1
        return self._given <= self.PER_SECOND


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


MODEL_ERRORS: Final = (BlockError, ValueError, ArithmeticError, LookupError, TypeError, MemoryError)
"""What the engine model may raise on a snapshot that no engine can be in."""


def request_role_events(exchange: Exchange) -> int:
    """Chat streams open with an event that names the role and carries no token."""
    return 1 if b"/chat/" in exchange.http.target else 0


def _place(decision: Decision) -> int:
    candidates = decision.candidates
    if len(candidates) == 1:
        return 0
    return next(n for n, candidate in enumerate(candidates) if candidate.instance == decision.instance)


def _code(error: BlockError) -> str:
    if isinstance(error, ClientError):
        return error.code or str(error.status)
    return "stream_broken"
