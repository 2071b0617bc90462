"""Which instance? Gathers the evidence that the policy's rank needs and lets `block.policy.choose.decide` compare.

Nothing here compares candidates: a candidate whose evidence is missing goes in without it, and the policy's rules of
combination say what then happens to all of them.
"""

import math
import time
from collections.abc import Sequence
from random import Random
from time import monotonic
from typing import Any, Final

import msgspec
import numpy as np

from block.core import Candidate, Decision, InstanceId, Load, Prediction, Request
from block.errors import BlockError, ClientError, UserError
from block.gateway.config import GatewayConfig
from block.gateway.deciding.blackbox import BlackBox
from block.gateway.deciding.drift import SNAPSHOTS, Drift
from block.gateway.deciding.evidence import Evidence
from block.gateway.deciding.expectations import Expectations
from block.gateway.deciding.lengths import HeaderLengths
from block.gateway.deciding.prefixes import Prefixes
from block.gateway.deciding.remote import RemotePredictors
from block.gateway.exchange import Exchange
from block.gateway.members.pool import Instance, Pool
from block.gateway.peers import policy_called
from block.gateway.records.metrics import Metrics
from block.length.distribution import EXACT, Estimate
from block.policy.choose import decide
from block.policy.rank import Evidence as Needs
from block.policy.table import Policy, make_policy
from block.predict.whatif import Mirror, Oracle

DEFAULT_MAX_TOKENS: Final = 4096
MODEL_ERRORS: Final = (BlockError, ValueError, ArithmeticError, LookupError, TypeError, MemoryError)
"""What the engine model may raise on a snapshot that no engine can be in."""


class Decider:
    """Owns the evidence of all instances and the expectations of all requests in flight."""

    def __init__(
        self, config: GatewayConfig, pool: Pool, policy: Policy, estimator: Any, metrics: Metrics, rng: Random
    ) -> None:
        self.estimator = estimator
        self.remote: RemotePredictors | None = None
        self.expectations = Expectations(estimator)
        self.policy = policy
        self.evidence: dict[InstanceId, Evidence] = {}
        self.boxes: dict[InstanceId, BlackBox] = {}
        """The modelled engines of instances without a predictor."""
        self._config, self._pool, self._metrics, self._rng = config, pool, metrics, rng
        self.drift = Drift(config.drift_factor)
        self._fewest = make_policy("least-outstanding")
        self.prefixes = Prefixes()
        self._oracle = Oracle()
        self._bare: dict[InstanceId, Candidate] = {}
        self._strategies: dict[str, Policy] = {}

    @property
    def policy(self) -> Policy:
        """The policy in force; what it believes of running requests is looked up with it."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._policy = policy
        self.expectations.belief = policy.belief

    def policy_for(self, exchange: Exchange) -> Policy:
        """What generates nothing (embeddings, tokenize) needs no prediction."""
        if not exchange.generating:
            return self._fewest
        return exchange.asked.strategy or self._policy

    def strategy(self, name: str) -> Policy:
        """The policy that a request asks for by its name alone.

        Raises:
            ClientError: 400, there is none of that name.
        """
        name = policy_called(name)
        found = self._strategies.get(name)
        if found is None:
            try:
                found = self._strategies[name] = make_policy(name[:64])
            except UserError as error:
                raise ClientError(400, f"That is no routing strategy. {error}", param="routing-strategy") from None
        return found

    def asks_remotely(self, policy: Policy) -> bool:
        """Whether ``decide_remotely`` is to be used."""
        return self.remote is not None and policy.rank.needs is Needs.PREDICTION

    def decide(self, exchange: Exchange, policy: Policy, ids: Sequence[InstanceId]) -> Decision:
        """Choose among ``ids`` (at least one)."""
        started_s = time.perf_counter()
        shortlist = policy.shortlist.choose(ids, self._rng)
        candidates = self.candidates(exchange, policy, shortlist)
        if self.drift.wrong and policy.rank.needs is Needs.PREDICTION:
            candidates = self._with_load(candidates)
        return self._decided(exchange, self._ranked(exchange, policy, candidates), started_s)

    async def decide_remotely(self, exchange: Exchange, policy: Policy, ids: Sequence[InstanceId]) -> Decision | None:
        """The same, with the predictions of the predictors themselves; ``None``: nobody is left after waiting."""
        assert self.remote is not None
        started_s = time.perf_counter()
        self.estimate(exchange)
        shortlist = policy.shortlist.choose(ids, self._rng)
        predictions = await self.remote.ask(shortlist, exchange.request, exchange.expected_total)
        now_s = time.time()
        candidates: list[Candidate] = []
        for instance_id, prediction in zip(shortlist, predictions, strict=True):
            if instance_id in self._pool.instances:
                candidates.append(Candidate(instance_id, self._load(instance_id, now_s), prediction))
                if prediction is None:
                    self._metrics.evidence_missing.labels(instance_id).inc()
        if not candidates:
            return None
        return self._decided(exchange, self._ranked(exchange, policy, candidates), started_s)

    def _ranked(self, exchange: Exchange, policy: Policy, candidates: list[Candidate]) -> Decision:
        """By the policy, or by counters where a candidate's predictions are known to be wrong."""
        used, why = self.drift.instead_of(policy, [candidate.instance for candidate in candidates])
        decision = decide(used, exchange.request, candidates, self._rng)
        return decision if why is None else msgspec.structs.replace(decision, policy=policy.name, fallback=why)

    def _with_load(self, candidates: list[Candidate]) -> list[Candidate]:
        """The counters beside the predictions. Those of an instance whose snapshots are wrong are the gateway's own books."""
        now_s = time.time()
        books = SNAPSHOTS in self.drift.wrong.values()
        return [
            msgspec.structs.replace(c, load=self._books(c.instance) if books else self._load(c.instance, now_s))
            for c in candidates
        ]

    def _books(self, instance_id: InstanceId) -> Load:
        instance = self._pool.instances[instance_id]
        in_flight = instance.in_flight
        return Load(in_flight, 0, in_flight, 0, float(instance.in_flight_tokens), instance.sent.advance(monotonic()))

    def _decided(self, exchange: Exchange, decision: Decision, started_s: float) -> Decision:
        exchange.deciding_s = time.perf_counter() - started_s
        if decision.fallback is not None:
            self._metrics.fallbacks.labels(decision.fallback).inc()
        return decision

    # Evidence

    def candidates(self, exchange: Exchange, policy: Policy, ids: Sequence[InstanceId]) -> list[Candidate]:
        """The shortlist with what the policy's rank needs to know of it."""
        needs = policy.rank.needs
        if needs is Needs.NOTHING:
            return [self._bare.get(i) or self._bare.setdefault(i, Candidate(i)) for i in ids]
        self.estimate(exchange)
        now_s = time.time()
        hits, predictions = self.prefixes.hits(exchange.request, ids, self.evidence), None
        if needs is Needs.PREDICTION:
            predictions = self._predict(exchange, ids, hits, now_s, harm=policy.rank.harm)
        if predictions is None:  # counters for all: a prediction is never compared with a counter
            return [Candidate(i, self._load(i, now_s), None, hit) for i, hit in zip(ids, hits, strict=True)]
        return [Candidate(i, None, p, hit) for i, p, hit in zip(ids, predictions, hits, strict=True)]

    def estimate(self, exchange: Exchange) -> None:
        """What it will probably generate, asked once in its life."""
        if exchange.estimate is not None:
            return
        if isinstance(self.estimator, HeaderLengths):
            self.estimator.listen(exchange.request, exchange.http)
        if exchange.asked.tokens is None:
            estimate = self.estimator.estimate(exchange.request)
        else:
            hinted = Estimate(self.estimator.bank, EXACT, exchange.asked.tokens, "hint")
            estimate = hinted.capped(exchange.request.max_tokens)
        exchange.estimate = estimate
        exchange.expected_total = max(1, round(estimate.expected_total(0)))

    def _load(self, instance_id: InstanceId, now_s: float) -> Load:
        instance = self._pool.instances[instance_id]
        recent = instance.sent.advance(monotonic())
        return self.evidence[instance_id].load(instance.in_flight, recent, instance.in_flight_tokens, now_s)

    def _predict(
        self, exchange: Exchange, ids: Sequence[InstanceId], hits: list[int], now_s: float, *, harm: bool
    ) -> list[Prediction] | None:
        """A what-if on every candidate in one call; ``None`` where one of them has no usable evidence."""
        started_s = time.perf_counter()
        mirrors = [mirror for i in ids if (mirror := self._mirror(i, now_s)) is not None]
        if len(mirrors) < len(ids):
            return None
        predictions = self._ask(exchange, ids, mirrors, hits, now_s, harm=harm)
        self._metrics.predict_time.observe(time.perf_counter() - started_s)
        return predictions

    def _mirror(self, instance_id: InstanceId, now_s: float) -> Mirror | None:
        evidence = self.evidence[instance_id]
        try:
            mirror = evidence.mirror(now_s)
        except MODEL_ERRORS as error:
            evidence.spoiled(f"the engine model cannot work with its snapshot: {error!r}")
            mirror = None
        if mirror is None:
            self._metrics.evidence_missing.labels(instance_id).inc()
        return mirror

    def _ask(
        self, exchange: Exchange, ids: Sequence[InstanceId], mirrors: list[Mirror], hits: list[int], now_s: float, *,
        harm: bool,
    ) -> list[Prediction] | None:  # fmt: skip
        request = exchange.request
        question: dict[str, Any] = {
            "prompt_tokens": request.prompt_tokens, "max_tokens": self.max_tokens(request, ids[0]),
            "output_tokens": exchange.expected_total, "now_s": now_s, "horizon_s": self._config.horizon_s, "harm": harm,
            "priority": request.priority,
        }  # fmt: skip
        found = np.array(hits, np.int32) if any(hits) else None
        try:
            predictions = self._oracle.predict_all(mirrors, **question, hits=found)
        except MODEL_ERRORS:
            for instance_id, mirror in zip(ids, mirrors, strict=True):  # whose fault was it?
                try:
                    self._oracle.predict_all([mirror], **question)
                except MODEL_ERRORS as error:
                    self.evidence[instance_id].spoiled(f"the engine model cannot work with its snapshot: {error!r}")
            return None
        for instance_id, prediction in zip(ids, predictions, strict=True):
            if (
                not 0 <= prediction.ttft_s <= prediction.e2e_s < math.inf
            ):  # NaN included: it would win or lose every comparison
                self.evidence[instance_id].spoiled(f"the engine model predicts {prediction.e2e_s} s from its snapshot")
                return None
        return predictions

    def max_tokens(self, request: Request, instance_id: InstanceId) -> int:
        """The most that a request can generate there: its own limit, or what its prompt leaves of the context."""
        if request.max_tokens is not None:
            return request.max_tokens
        snapshot = self.evidence[instance_id].snapshot
        return DEFAULT_MAX_TOKENS if snapshot is None else max(1, snapshot.limits.max_model_len - request.prompt_tokens)

    # The ledger

    def sent(self, exchange: Exchange, instance: Instance) -> None:
        """A request goes to an instance: it counts there until a snapshot shows it (if the policy estimated it)."""
        self._book(exchange, instance)
        self.prefixes.sent(exchange.request, instance.id, self.evidence.get(instance.id))

    def _book(self, exchange: Exchange, instance: Instance) -> None:
        box = self.boxes.get(instance.id) if exchange.generating else None
        if exchange.expected_total and (instance.config.predictor is not None or box is not None):
            request = exchange.request
            limit = self.max_tokens(request, instance.id)
            believed = self.expectations.believed(exchange.estimate, exchange.expected_total)
            evidence = self.evidence[instance.id]
            hit_tokens = self.prefixes.hit_tokens(request, instance.id, evidence)
            exchange.key = evidence.sent(request, limit, believed, time.time(), hit_tokens)
            self.expectations.expect(exchange.key, exchange.estimate)
            if box is not None:
                box.sent(exchange.key, request.prompt_tokens, limit, exchange, exact=request.exact_output)

    def over(self, exchange: Exchange, instance: Instance) -> None:
        """It is over there, whatever its end."""
        if exchange.key:
            evidence = self.evidence.get(instance.id)
            if evidence is not None:
                evidence.ended(exchange.key)
            box = self.boxes.get(instance.id)
            if box is not None:
                box.ended(exchange.key)
            self.expectations.forget(exchange.key)
            exchange.key = 0

    def forget(self, instance_id: InstanceId) -> None:
        """An instance left."""
        self.evidence.pop(instance_id, None)
        self.drift.forget(instance_id)
        self.boxes.pop(instance_id, None)
        self.prefixes.forget(instance_id)
        self._bare.pop(instance_id, None)
