"""What does each candidate cost? A rank turns one candidate's evidence into one number, lower is better.

Formulas of the published baselines, with f free KV blocks, r running requests, w the waiting queue, bs the block size:
INFaaS++ f / max(r, 1); Llumnix without migration (f - sum over w of prompt / bs) / max(r, 1); NoSim the unprocessed
tokens. They are highest-first there, so they are negated here.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import ClassVar, Protocol

from block.core import Candidate, Request
from block.errors import ConfigError


class Evidence(IntEnum):
    """What a rank needs to know of a candidate, coarsest first."""

    NOTHING = 0
    LOAD = 1
    PREDICTION = 2


class Rank(Protocol):
    """Costs one candidate. ``harm``: whether the predictions must tell ``harm_s``; ``prefix``: whether it matters what the
    instances hold of the prompt."""

    needs: ClassVar[Evidence]
    harm: ClassVar[bool] = False
    prefix: ClassVar[bool] = False

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        """Lower is better; ``None``: the candidate lacks the evidence."""
        ...


class JointRank(Rank):
    """A rank that must see all candidates to cost one; `choose.decide` asks it for all costs at once."""

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        return self.costs(request, [candidate])[0]

    def costs(self, request: Request, candidates: Sequence[Candidate]) -> list[float | None]:
        """Aligned with ``candidates``; ``None``: that one lacks the evidence."""
        raise NotImplementedError


class Indifferent(Rank):
    """Costs nothing, so that the tie-break decides: random."""

    needs: ClassVar = Evidence.NOTHING

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        return 0.0


class LeastOutstanding(Rank):
    """Requests in flight on the instance."""

    needs: ClassVar = Evidence.LOAD

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        return None if candidate.load is None else float(candidate.load.in_flight)


class LeastDispatched(Rank):
    """Requests dispatched to the instance in the last minute (LiteLLM's lowest usage)."""

    needs: ClassVar = Evidence.LOAD

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        return None if candidate.load is None else float(candidate.load.dispatched_last_minute)


class MostFreeBlocks(Rank):
    """INFaaS++: free KV blocks per running request, the most first."""

    needs: ClassVar = Evidence.LOAD

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        load = candidate.load
        if load is None or load.kv_blocks_free is None:
            return None
        return -load.kv_blocks_free / max(load.running, 1)


class MostFreeBlocksAfterQueue(Rank):
    """Llumnix's dispatch without migration: as INFaaS++, the waiting prompts' blocks counted as taken."""

    needs: ClassVar = Evidence.LOAD

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        load = candidate.load
        if load is None or load.kv_blocks_free is None:
            return None
        return -(load.kv_blocks_free - load.waiting_tokens / load.block_size) / max(load.running, 1)


class LeastUnprocessedTokens(Rank):
    """NoSim: tokens still to compute (prompt + expected output - computed) over all requests there."""

    needs: ClassVar = Evidence.LOAD

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        return None if candidate.load is None else candidate.load.unprocessed_tokens


class PrefillTimesBatch(Rank):
    """LMetric (arXiv 2603.15202): prompt tokens to compute, the new request's included, times the batch with it."""

    needs: ClassVar = Evidence.LOAD
    prefix: ClassVar = True

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        load = candidate.load
        if load is None:
            return None
        prefill_tokens = load.waiting_tokens + request.prompt_tokens - candidate.hit_tokens
        return float(prefill_tokens) * (load.running + load.waiting + 1)


class TokenLoad(Rank):
    """Token load, calibrated (as llm-d's default of 2026): what is still to compute of prompts, the new one's uncached
    tokens included, at the instance's measured throughput of prompts, and the context being decoded, in seconds.

    The prompts' part, which stands for the TTFT, counts ``penalty_s`` at most: beyond that the instance is late anyway and
    only its tokens differ. A decoded token of context counts ``decode_weight`` of a prompt's. Where no step times are known
    all instances are taken to be equally fast.
    """

    needs: ClassVar = Evidence.LOAD
    prefix: ClassVar = True
    TOKENS_PER_S: ClassVar = 10_000.0

    def __init__(self, penalty_s: float, decode_weight: float) -> None:
        if penalty_s <= 0 or decode_weight < 0:
            raise ConfigError("penalty_s must be above 0 and decode_weight not negative.")
        self.penalty_s, self.decode_weight = penalty_s, decode_weight

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        load = candidate.load
        if load is None or load.kv_blocks_free is None or load.kv_blocks_total is None:
            return None
        pace = load.prefill_tokens_per_s or self.TOKENS_PER_S
        prefill_s = (load.waiting_tokens + request.prompt_tokens - candidate.hit_tokens) / pace
        context_s = (load.kv_blocks_total - load.kv_blocks_free) * load.block_size * self.decode_weight / pace
        return min(prefill_s, self.penalty_s) + context_s


class PredictedE2e(Rank):
    """Predicted end-to-end latency of the new request: the published rule of Block."""

    needs: ClassVar = Evidence.PREDICTION
    prefix: ClassVar = True

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        return None if candidate.prediction is None else candidate.prediction.e2e_s


class PredictedE2eGuarded(Rank):
    """Predicted E2E, with a price on what others pay for it.

    ``ttft_weight`` seconds for each second of predicted TTFT: who waits in a fast instance's queue while a slow one idles gains
    less than those behind it lose, and E2E alone crowds fast instances (selfish routing). ``blocked_s`` where the request could
    not start within ``blocked_after_s`` or would push another out, whose recomputation is lost throughput: a slow instance
    with room comes before a fast one without.
    """

    needs: ClassVar = Evidence.PREDICTION
    prefix: ClassVar = True

    def __init__(self, ttft_weight: float, blocked_s: float, blocked_after_s: float) -> None:
        if min(ttft_weight, blocked_s, blocked_after_s) < 0:
            raise ConfigError("ttft_weight, blocked_s and blocked_after_s must not be negative.")
        self.ttft_weight, self.blocked_s, self.blocked_after_s = ttft_weight, blocked_s, blocked_after_s

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        prediction = candidate.prediction
        if prediction is None:
            return None
        cost = prediction.e2e_s + self.ttft_weight * prediction.ttft_s
        blocked = prediction.preemptions > 0 or prediction.queue_delay_s > self.blocked_after_s
        return cost + self.blocked_s if blocked else cost


class PredictedSlack(Rank):
    """The request's own targets first: what it would miss of its TTFT, TPOT and E2E targets, each as a fraction of the
    target, in multiples of ``miss_s`` seconds; then as ``PredictedE2eGuarded``. Without targets it is just that.

    ``margin``: a prediction this fraction below its target still counts as missing a little, for predictions err.
    """

    needs: ClassVar = Evidence.PREDICTION
    prefix: ClassVar = True
    MISSED_MAX: ClassVar = 10.0
    """Beyond this multiple of its target a request is lost anyway."""

    def __init__(self, miss_s: float, margin: float, otherwise: PredictedE2eGuarded) -> None:
        if miss_s < 0 or not 0 <= margin < 1:
            raise ConfigError("miss_s must not be negative and margin be in [0, 1).")
        self.miss_s, self.margin, self.otherwise = miss_s, margin, otherwise

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        cost, prediction, slo = self.otherwise.cost(request, candidate), candidate.prediction, request.slo
        if cost is None or prediction is None or slo is None:
            return cost
        missed = 0.0
        for target_s, predicted_s in (
            (slo.ttft_s, prediction.ttft_s), (slo.tpot_s, prediction.tpot_s), (slo.e2e_s, prediction.e2e_s)
        ):  # fmt: skip
            if target_s is not None and predicted_s is not None:
                aim_s = max(target_s * (1 - self.margin), 1e-6)
                missed += min(max(predicted_s / aim_s - 1, 0.0), self.MISSED_MAX)
        return cost + self.miss_s * missed


class PredictedHarm(Rank):
    """Predicted E2E of the new request plus ``weight`` times the latency that it adds to the others (both seconds)."""

    needs: ClassVar = Evidence.PREDICTION
    harm: ClassVar = True
    prefix: ClassVar = True

    def __init__(self, weight: float) -> None:
        if weight < 0:
            raise ConfigError(f"weight must not be negative, not {weight}.")
        self.weight = weight

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        prediction = candidate.prediction
        if prediction is None or prediction.harm_s is None:
            return None
        return prediction.e2e_s + self.weight * prediction.harm_s
