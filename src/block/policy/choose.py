"""From evidence to a decision: the one place where candidates are compared, online and in simulation."""

from collections.abc import Sequence
from random import Random
from typing import Final

from block.core import Candidate, Decision, Request
from block.policy.rank import Evidence, Indifferent, JointRank, LeastOutstanding, Rank
from block.policy.table import Policy

EVIDENCE_NAMES: Final = {Evidence.NOTHING: "nothing", Evidence.LOAD: "load", Evidence.PREDICTION: "prediction"}
FALLBACK_TO_LOAD: Final = "prediction-missing"
FALLBACK_TO_REQUESTS: Final = "load-incomplete"
FALLBACK_TO_NOTHING: Final = "load-missing"
FALLBACKS: Final = (FALLBACK_TO_LOAD, FALLBACK_TO_REQUESTS, FALLBACK_TO_NOTHING)

_OUTSTANDING: Final = LeastOutstanding()
_INDIFFERENT: Final = Indifferent()


def decide(policy: Policy, request: Request, candidates: Sequence[Candidate], rng: Random) -> Decision:
    """Choose among the shortlisted ``candidates`` (at least one): the lowest cost, ties (and what is ``policy.near``) at random.

    A prediction is never compared with a counter: if one candidate lacks what the policy's rank needs, all are
    costed by the next coarser evidence, requests in flight and then nothing (random), and the decision names the
    fallback: ``prediction-missing``; ``load-incomplete`` (a rank over KV blocks where one source does not know
    them); ``load-missing``.

    Raises:
        ValueError: no candidate.
    """
    if not candidates:
        raise ValueError("a decision needs at least one candidate")
    rank, used, fallback = policy.rank, policy.rank.needs, None
    costs = _costs(rank, request, candidates)
    if None in costs:
        fallback = FALLBACK_TO_LOAD if used is Evidence.PREDICTION else FALLBACK_TO_REQUESTS
        costs, used = _costs(_OUTSTANDING, request, candidates), Evidence.LOAD
    if None in costs:
        costs, used, fallback = _costs(_INDIFFERENT, request, candidates), Evidence.NOTHING, FALLBACK_TO_NOTHING
    chosen = candidates[_lowest(costs, policy.near, rng)]
    return Decision(chosen.instance, policy.name, candidates, costs, EVIDENCE_NAMES[used], fallback)


def _costs(rank: Rank, request: Request, candidates: Sequence[Candidate]) -> list[float | None]:
    joint: JointRank | None = rank if hasattr(rank, "costs") else None  # type: ignore[assignment]  # isinstance of a Protocol: 3 us
    if joint is not None:
        return joint.costs(request, candidates)
    return [rank.cost(request, candidate) for candidate in candidates]


def _lowest(costs: list[float | None], near: float, rng: Random) -> int:
    lowest = min(cost for cost in costs if cost is not None)
    if near > 0:
        most = lowest + near * abs(lowest)
        return rng.choice([i for i, cost in enumerate(costs) if cost is not None and cost <= most])
    if costs.count(lowest) == 1:
        return costs.index(lowest)
    return rng.choice([i for i, cost in enumerate(costs) if cost == lowest])
