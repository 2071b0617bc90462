"""What does each candidate cost? A rank turns one candidate's evidence into one number, lower is better.

Formulas of the published baselines, with f free KV blocks, r running requests, w the waiting queue, bs the block size:
INFaaS++ f / max(r, 1); Llumnix without migration (f - sum over w of prompt / bs) / max(r, 1); NoSim the unprocessed
tokens. They are highest-first there, so they are negated here.
"""

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
    """Costs one candidate. ``harm``: whether the predictions must tell ``harm_s``."""

    needs: ClassVar[Evidence]
    harm: ClassVar[bool]

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        """Lower is better; ``None``: the candidate lacks the evidence."""
        ...


class Indifferent:
    """Costs nothing, so that the tie-break decides: random."""

    needs: ClassVar = Evidence.NOTHING
    harm: ClassVar = False

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        return 0.0


class LeastOutstanding:
    """Requests in flight on the instance."""

    needs: ClassVar = Evidence.LOAD
    harm: ClassVar = False

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        return None if candidate.load is None else float(candidate.load.in_flight)


class LeastDispatched:
    """Requests dispatched to the instance in the last minute (LiteLLM's lowest usage)."""

    needs: ClassVar = Evidence.LOAD
    harm: ClassVar = False

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        return None if candidate.load is None else float(candidate.load.dispatched_last_minute)


class MostFreeBlocks:
    """INFaaS++: free KV blocks per running request, the most first."""

    needs: ClassVar = Evidence.LOAD
    harm: ClassVar = False

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        load = candidate.load
        if load is None or load.kv_blocks_free is None:
            return None
        return -load.kv_blocks_free / max(load.running, 1)


class MostFreeBlocksAfterQueue:
    """Llumnix's dispatch without migration: as INFaaS++, the waiting prompts' blocks counted as taken."""

    needs: ClassVar = Evidence.LOAD
    harm: ClassVar = False

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        load = candidate.load
        if load is None or load.kv_blocks_free is None:
            return None
        return -(load.kv_blocks_free - load.waiting_tokens / load.block_size) / max(load.running, 1)


class LeastUnprocessedTokens:
    """NoSim: tokens still to compute (prompt + expected output - computed) over all requests there."""

    needs: ClassVar = Evidence.LOAD
    harm: ClassVar = False

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        return None if candidate.load is None else candidate.load.unprocessed_tokens


class PrefillTimesBatch:
    """LMetric (arXiv 2603.15202): prompt tokens to compute, the new request's included, times the batch with it."""

    needs: ClassVar = Evidence.LOAD
    harm: ClassVar = False

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        load = candidate.load
        if load is None:
            return None
        return float(load.waiting_tokens + request.prompt_tokens) * (load.running + load.waiting + 1)


class LeastTokensPresent:
    """Token load (llm-d's default of 2026, uncalibrated): prompt tokens to compute and context in the cache."""

    needs: ClassVar = Evidence.LOAD
    harm: ClassVar = False

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        load = candidate.load
        if load is None or load.kv_blocks_free is None or load.kv_blocks_total is None:
            return None
        return float(load.waiting_tokens + (load.kv_blocks_total - load.kv_blocks_free) * load.block_size)


class PredictedE2e:
    """Predicted end-to-end latency of the new request: the published rule of Block."""

    needs: ClassVar = Evidence.PREDICTION
    harm: ClassVar = False

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        return None if candidate.prediction is None else candidate.prediction.e2e_s


class PredictedTtft:
    """Predicted time to first token of the new request."""

    needs: ClassVar = Evidence.PREDICTION
    harm: ClassVar = False

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        return None if candidate.prediction is None else candidate.prediction.ttft_s


class PredictedE2eAndPreemptions:
    """Predicted E2E plus a price in seconds for every preemption that the what-if foresees on the instance."""

    needs: ClassVar = Evidence.PREDICTION
    harm: ClassVar = False

    def __init__(self, preemption_s: float) -> None:
        if preemption_s < 0:
            raise ConfigError(f"preemption_s must not be negative, not {preemption_s}.")
        self.preemption_s = preemption_s

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        prediction = candidate.prediction
        if prediction is None:
            return None
        return prediction.e2e_s + self.preemption_s * prediction.preemptions


class PredictedE2eGuarded:
    """Predicted E2E, with a price on what spoils a cluster near saturation.

    ``late_weight`` seconds for each second of predicted TTFT beyond ``ttft_s`` (alone, E2E crowds fast instances), and
    ``preemption_s`` for each preemption foreseen (recomputation is lost throughput).
    """

    needs: ClassVar = Evidence.PREDICTION
    harm: ClassVar = False

    def __init__(self, ttft_s: float, late_weight: float, preemption_s: float) -> None:
        if min(ttft_s, late_weight, preemption_s) < 0:
            raise ConfigError("ttft_s, late_weight and preemption_s must not be negative.")
        self.ttft_s, self.late_weight, self.preemption_s = ttft_s, late_weight, preemption_s

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        prediction = candidate.prediction
        if prediction is None:
            return None
        late_s = max(0.0, prediction.ttft_s - self.ttft_s)
        return prediction.e2e_s + self.late_weight * late_s + self.preemption_s * prediction.preemptions


class PredictedHarm:
    """Predicted E2E of the new request plus ``weight`` times the latency that it adds to the others (both seconds)."""

    needs: ClassVar = Evidence.PREDICTION
    harm: ClassVar = True

    def __init__(self, weight: float) -> None:
        if weight < 0:
            raise ConfigError(f"weight must not be negative, not {weight}.")
        self.weight = weight

    def cost(self, request: Request, candidate: Candidate) -> float | None:
        prediction = candidate.prediction
        if prediction is None or prediction.harm_s is None:
            return None
        return prediction.e2e_s + self.weight * prediction.harm_s
