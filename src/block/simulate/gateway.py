"""A simulated gateway: the evidence it has when a request comes, and the same policy code as online."""

from collections import deque
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np

from block.core import Candidate, Decision, InstanceId, Load, Prediction, Request
from block.engine.ask import ask_all
from block.engine.kernel import FastEngine
from block.length.distribution import DistributionBank, Estimate
from block.metrics.row import Row
from block.policy import Evidence, Policy, RecentDispatches, decide
from block.policy.hold import HeldQueue
from block.policy.learned import LearnedLatency, train
from block.policy.prefix import PrefixIndex
from block.simulate.config import GatewayModel
from block.simulate.instance import Instance, View, renew_beliefs


class Dispatched:
    """One request on its way to, or in, an instance, as its gateway remembers it."""

    __slots__ = ("arrives_s", "estimate", "hit_tokens", "label", "most_tokens", "request")

    def __init__(
        self, request: Request, most_tokens: int, estimate: Estimate, arrives_s: float, label: int, hit_tokens: int = 0
    ) -> None:
        self.request, self.most_tokens, self.estimate = request, most_tokens, estimate
        self.arrives_s, self.label, self.hit_tokens = arrives_s, label, hit_tokens


class Gateway:
    """Owns its policy object, its ledger of recent dispatches and its views of the instances.

    With fresh snapshots its views are the instances themselves; otherwise each is a copy made of the newest snapshot that
    has reached this gateway, with what the gateway dispatched after that snapshot was taken added.
    """

    def __init__(
        self, model: GatewayModel, policy: Policy, instances: Sequence[Instance], bank: DistributionBank, rng: Random
    ) -> None:
        self.policy = policy
        self.free_s = 0.0
        """When it is done with the requests that came before."""
        self.held: HeldQueue[int] | None = None if policy.hold is None else HeldQueue(policy.hold)
        """Numbers of the requests that it keeps for now."""
        self._model = model
        self._instances = {instance.id: instance for instance in instances}
        self._bank = bank
        self._rng = rng
        self._recent = RecentDispatches()
        self._fresh = model.snapshot_interval_s == 0
        self._copies: dict[InstanceId, View] = {}
        self._unseen: dict[InstanceId, deque[Dispatched]] = {instance.id: deque() for instance in instances}
        first = instances[0]
        self._scratch: Any = FastEngine(first.limits, first.curve, 0.0, 256)
        self._throughput = {instance.id: instance.prefill_tokens_per_s() for instance in instances}
        self._indexes = _indexes(instances, fresh=self._fresh)
        self._answers = np.empty((len(instances), 6))

    def decide(self, request: Request, estimate: Estimate, healthy: Sequence[InstanceId], now_s: float) -> Decision:
        """Choose one of ``healthy`` (at least one) with the evidence that this gateway has now."""
        rank = self.policy.rank
        listed = self.policy.shortlist.choose(healthy, self._rng)
        if rank.needs is Evidence.NOTHING:
            return decide(self.policy, request, [Candidate(instance) for instance in listed], self._rng)
        hits = self._hits(request, listed)
        views = [self._view(instance) for instance in listed]
        if rank.needs is Evidence.LOAD:
            candidates = [
                Candidate(instance, self._load(instance, view, now_s), None, hit)
                for instance, view, hit in zip(listed, views, hits, strict=True)
            ]
        else:
            predictions = self._predict(request, estimate, listed, views, hits, now_s)
            candidates = [
                Candidate(instance, None, prediction, hit)
                for instance, prediction, hit in zip(listed, predictions, hits, strict=True)
            ]
        return decide(self.policy, request, candidates, self._rng)

    def note(self, instance: InstanceId, dispatched: Dispatched, now_s: float) -> None:
        """A request was sent to the instance."""
        self._recent.note(instance, now_s)
        blocks = dispatched.request.blocks
        if blocks is not None and self._indexes:
            self._indexes[instance].note(blocks)
        if self._fresh or not self._model.in_flight_accounting:
            return
        self._unseen[instance].append(dispatched)
        copy = self._copies.get(instance)
        if copy is not None:
            _add(copy, dispatched)

    def learn(self, request: Request, candidate: Candidate, row: Row, decided_s: float) -> None:
        """Tell a policy that learns what came of a request."""
        rank = self.policy.rank
        if isinstance(rank, LearnedLatency) and row.first_token_s is not None:
            rank.observe(request, candidate, row.first_token_s - decided_s, row.tpot_s)
            if rank.due:
                rank.adopt(train(*rank.samples()))

    def receive(self, instance: InstanceId, snapshot: View) -> None:
        """A newer snapshot of the instance has come."""
        copy = self._copies.get(instance)
        if copy is None:
            copy = self._copies[instance] = View(self._instances[instance].limits, self._instances[instance].curve)
        copy.copy_from(snapshot, snapshot.taken_s)
        unseen = self._unseen[instance]
        while unseen and unseen[0].arrives_s <= snapshot.taken_s:
            unseen.popleft()
        for dispatched in unseen:
            _add(copy, dispatched)

    def forget(self, instance: InstanceId) -> None:
        """The instance died: what was known of it holds no more."""
        self._copies.pop(instance, None)
        self._unseen[instance].clear()
        if self._indexes:
            self._indexes[instance].clear()

    def hit_tokens(self, request: Request, instance: InstanceId) -> int:
        """Prompt tokens that the request will find in the instance's prefix cache, as far as this gateway knows."""
        if request.blocks is None:
            return 0
        if self._fresh:
            cache = self._instances[instance].cache
            return 0 if cache is None else cache.match_tokens(request.blocks.keys, request.prompt_tokens)
        return self._indexes[instance].match_tokens(request.blocks, request.prompt_tokens) if self._indexes else 0

    def _hits(self, request: Request, listed: Sequence[InstanceId]) -> list[int]:
        if request.blocks is None:
            return [0] * len(listed)
        return [self.hit_tokens(request, instance) for instance in listed]

    def _view(self, instance: InstanceId) -> View:
        if self._fresh:
            return self._instances[instance].view
        copy = self._copies.get(instance)
        if copy is None:  # no snapshot has come yet: it is as good as empty
            copy = self._copies[instance] = View(self._instances[instance].limits, self._instances[instance].curve)
        return copy

    def _load(self, instance: InstanceId, view: View, now_s: float) -> Load:
        running, waiting, waiting_tokens, free = view.engine.load()
        limits = self._instances[instance].limits
        return Load(
            running, waiting, running + waiting, waiting_tokens, view.engine.unprocessed_tokens(),
            self._recent.count(instance, now_s), free, limits.blocks_usable, limits.block_size,
            0.0 if self._fresh else now_s - view.taken_s, self._throughput[instance],
        )  # fmt: skip

    def _predict(
        self, request: Request, estimate: Estimate, listed: Sequence[InstanceId], views: list[View], hits: list[int],
        now_s: float,
    ) -> list[Prediction]:  # fmt: skip
        # The published rule looks everything up at every decision; a policy that has a belief of its own keeps it a while.
        kept_s = None if self.policy.belief is None else now_s
        renew_beliefs(views, self._bank, self.policy.belief, kept_s)
        harm = self.policy.rank.harm
        total = round(estimate.expected_total(0))
        most = min(self._instances[i].most_tokens(request.prompt_tokens, request.max_tokens) for i in listed)
        answers = self._answers[: len(views)]
        first = self._instances[listed[0]]
        ask_all(
            [view.engine for view in views], self._scratch, request.prompt_tokens, max(most, 1), np.array([total], np.int32),
            np.array(hits, np.int32), request.priority, now_s + self._model.network_s + first.input_s, self._model.horizon_s,
            True, harm, answers,
        )  # fmt: skip
        way_s = self._model.network_s + first.input_s
        return [
            _prediction(row, way_s, self._instances[i].output_s, total, harm)
            for row, i in zip(answers.tolist(), listed, strict=True)
        ]


def _add(view: View, dispatched: Dispatched) -> None:
    # A gateway does not know when a request will stop: in its view it stops as estimated.
    d = dispatched
    view.add(d.request, d.most_tokens, d.most_tokens, d.estimate, d.arrives_s, d.label, d.hit_tokens)


def _indexes(instances: Sequence[Instance], *, fresh: bool) -> dict[InstanceId, PrefixIndex]:
    """What a gateway that does not see the engines' caches remembers instead; empty where there is nothing to remember."""
    if fresh or not any(instance.cache_tokens for instance in instances):
        return {}
    return {
        one.id: PrefixIndex(one.limits.blocks_usable * one.limits.block_size // max(one.cache_tokens, 1))
        for one in instances
    }


def _prediction(row: list[float], way_s: float, output_s: float, total: int, harm: bool) -> Prediction:
    delay_s, ttft_s, e2e_s, preemptions, truncated, harm_s = row
    tpot_s = (e2e_s - ttft_s) / (total - 1) if total > 1 else None
    return Prediction(
        way_s + ttft_s + output_s, way_s + e2e_s + output_s, tpot_s, way_s + delay_s, round(preemptions),
        harm_s if harm else None, truncated > 0,
    )  # fmt: skip
