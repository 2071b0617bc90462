"""Policies that learn, online: what came of each request is told to them, and they train in a thread beside the event loop."""

import asyncio
import logging

from block.gateway.exchange import Exchange
from block.policy.learned import LearnedLatency, Models, train
from block.policy.table import Policy

log = logging.getLogger("block.gateway")


class Learning:
    """One training at a time; one that fails changes nothing."""

    def __init__(self) -> None:
        self._training: asyncio.Future[None] | None = None

    def take(self, policy: Policy, exchange: Exchange) -> None:
        """A whole answer came; only streamed ones tell when the first token did."""
        rank, decision, tokens = policy.rank, exchange.decision, exchange.output_tokens
        if type(rank) is not LearnedLatency:  # isinstance of what is a Protocol takes microseconds
            return
        if decision is None or not exchange.sse or not tokens or tokens < 2:
            return
        candidate = next(c for c in decision.candidates if c.instance == decision.instance)
        ttft_s = exchange.first_byte_s - exchange.decided_s
        tpot_s = (exchange.answered_s - exchange.first_byte_s) / (tokens - 1)
        rank.observe(exchange.request, candidate, ttft_s, tpot_s)
        if rank.due and (self._training is None or self._training.done()):
            self._training = asyncio.ensure_future(self._train(rank))

    async def _train(self, rank: LearnedLatency) -> None:
        rows, logs = rank.samples()
        try:
            models: Models = await asyncio.to_thread(train, rows, logs)
        except (ValueError, RuntimeError, MemoryError) as error:
            log.error("the policy could not learn: %s", error)
            return
        rank.adopt(models)

    def close(self) -> None:
        """No more training."""
        if self._training is not None:
            self._training.cancel()
