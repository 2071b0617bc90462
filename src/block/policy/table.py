"""Every policy by name, with what it is and how to make one.

Other packages may bring policies of their own: entry points in the group ``block.policies``, each a ``PolicySpec`` under its
name. They are loaded when somebody asks for them, and never take the place of one that is here.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, NamedTuple

from block.errors import ConfigError, UnknownNameError
from block.options import check_options, name_and_options
from block.policy import rank as ranks
from block.policy.affinity import BoundedHash, PrefixAffinity
from block.policy.hold import Hold
from block.policy.rank import Rank
from block.policy.shortlist import Everyone, RandomSubset, Rotation, Shortlist


class Policy(NamedTuple):
    """A shortlist and a rank under a name. Make one per gateway: a shortlist may own state (whose turn it is).

    ``hold``: when to keep a request at the gateway instead of sending it now; ``None``: never. ``belief``: what-ifs let
    the requests present end at this quantile (0-1) of what is still possible for each; ``None``: at its mean. ``near``: costs
    within this fraction of the lowest count as equal, and chance decides: gateways that know nothing of each other herd less.
    """

    name: str
    shortlist: Shortlist
    rank: Rank
    hold: Hold | None = None
    belief: float | None = None
    near: float = 0.0


class PolicySpec(NamedTuple):
    """One row of the table; ``make`` takes the policy's options, all with defaults, and leaves the name open."""

    description: str
    make: Callable[..., Policy]


def _power_of_k(k: int = 2) -> Policy:
    return Policy("", RandomSubset(k), ranks.LeastOutstanding())


def _block_k(k: int = 2) -> Policy:
    return Policy("", RandomSubset(k), ranks.PredictedE2e())


def _block_harm(weight: float = 1.0) -> Policy:
    return Policy("", Everyone(), ranks.PredictedHarm(weight))


def _block(
    belief: float = 0.4, ttft_weight: float = 5.0, delay_s: float = 0.05, most_s: float = 10.0, ahead: int = 8,
    blocked_s: float = 60.0, blocked_after_s: float = 1.0, near: float = 0.0,
) -> Policy:  # fmt: skip
    if not 0 < belief < 1 or not 0 <= near < 1:
        raise ConfigError(f"belief must be between 0 and 1, not {belief}, and near from 0 to below 1, not {near}.")
    rank = ranks.PredictedE2eGuarded(ttft_weight, blocked_s, blocked_after_s)
    return Policy("", Everyone(), rank, Hold(delay_s, most_s, ahead), belief, near)


def _block_smallest(ahead: int = 32, patience_s: float = 9.0) -> Policy:
    block = _block(ahead=ahead)
    assert block.hold is not None
    return block._replace(hold=block.hold._replace(by_size=True, patience_s=patience_s))


def _block_slo(miss_s: float = 60.0, margin: float = 0.1) -> Policy:
    block = _block()
    assert isinstance(block.rank, ranks.PredictedE2eGuarded)
    return block._replace(rank=ranks.PredictedSlack(miss_s, margin, block.rank))


def _token_load(penalty_s: float = 10.0, decode_weight: float = 1.0) -> Policy:
    return Policy("", Everyone(), ranks.TokenLoad(penalty_s, decode_weight))


def _learned(output_tokens: float = 256.0) -> Policy:
    from block.policy.learned import LearnedLatency

    return Policy("", Everyone(), LearnedLatency(output_tokens))


def _prefix_affinity(match_fraction: float = 0.5, load_ratio: float = 1.5, load_slack: int = 8) -> Policy:
    return Policy("", Everyone(), PrefixAffinity(match_fraction, load_ratio, load_slack))


def _consistent_hash(bound: float = 1.25, chunks: int = 2) -> Policy:
    return Policy("", Everyone(), BoundedHash(bound, chunks))


def _everyone(rank: Callable[[], Rank]) -> Callable[[], Policy]:
    def make() -> Policy:
        return Policy("", Everyone(), rank())

    return make


POLICIES: dict[str, PolicySpec] = {
    "random": PolicySpec("any instance", _everyone(ranks.Indifferent)),
    "round-robin": PolicySpec("each in turn", lambda: Policy("", Rotation(), ranks.Indifferent())),
    "least-outstanding": PolicySpec("fewest requests in flight", _everyone(ranks.LeastOutstanding)),
    "power-of-two": PolicySpec("fewest requests in flight of k (2) at random", _power_of_k),
    "min-qpm": PolicySpec("fewest requests sent in the last minute (LiteLLM)", _everyone(ranks.LeastDispatched)),
    "infaas++": PolicySpec("most free KV blocks per running request", _everyone(ranks.MostFreeBlocks)),
    "llumnix-minus": PolicySpec(
        "most free KV blocks after the queue's prompts, per running request", _everyone(ranks.MostFreeBlocksAfterQueue)
    ),
    "nosim": PolicySpec("fewest tokens still to compute", _everyone(ranks.LeastUnprocessedTokens)),
    "lmetric": PolicySpec("prompt tokens to compute times batch size (LMetric)", _everyone(ranks.PrefillTimesBatch)),
    "token-load": PolicySpec(
        "least prompt tokens to compute and context in the KV cache, in seconds of the instance (llm-d)", _token_load
    ),
    "prefix-affinity": PolicySpec(
        "the longest cached beginning of the prompt, unless it is short or its instance too busy", _prefix_affinity
    ),
    "consistent-hash": PolicySpec(
        "consistent hashing of the session or the prompt's beginning, with bounded loads", _consistent_hash
    ),
    "learned": PolicySpec(
        "lowest TTFT plus output_tokens (256) times TPOT, learned online by gradient boosting (llm-d)", _learned
    ),
    "block": PolicySpec(
        "lowest predicted E2E and TTFT, guarded against late starts and preemptions; kept at the gateway while all would be so",
        _block,
    ),
    "block-k": PolicySpec("lowest predicted E2E of k (2) instances at random", _block_k),
    "block-oracle": PolicySpec("as block, meant for true output lengths", _block),
    "block-paper": PolicySpec(
        "the published rule: lowest predicted E2E of all instances", _everyone(ranks.PredictedE2e)
    ),
    "block-harm": PolicySpec("predicted E2E plus weight (1) times the latency added to the others", _block_harm),
    "block-smallest": PolicySpec(
        "as block, but of the held the smallest leave first, until they lose patience", _block_smallest
    ),
    "block-slo": PolicySpec("as block, but what each request would miss of its own targets comes first", _block_slo),
}


ENTRY_POINTS: Final = "block.policies"


def policy_names() -> list[str]:
    """Names of all policies, in the table's order, then those that other packages bring."""
    return [*POLICIES, *(name for name in _brought() if name not in POLICIES)]


def policy_spec(name: str) -> PolicySpec:
    """The row of a policy.

    Raises:
        UnknownNameError: no such policy; lists those there are.
        ConfigError: another package brings it, and it cannot be used.
    """
    if name in POLICIES:
        return POLICIES[name]
    point = _brought().get(name)
    if point is None:
        raise UnknownNameError("policy", name, policy_names())
    try:
        spec = point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"The policy {name} cannot be loaded from {point.value}: {error}.") from error
    if not isinstance(spec, PolicySpec):
        raise ConfigError(f"{point.value} is not a PolicySpec, so there is no policy {name}.")
    return spec


@cache
def _brought() -> Mapping[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def make_policy(name: str, **options: Any) -> Policy:
    """A fresh policy object. ``options`` are those of the policy's factory (``k`` of ``block-k``, for example).

    Raises:
        UnknownNameError: no such policy; lists those there are.
        ConfigError: an option that the policy does not have, or a value that it cannot take.
    """
    spec = policy_spec(name)
    known = inspect.signature(spec.make).parameters
    check_options(f"policy {name}", known, options)
    return spec.make(**options)._replace(name=name)


def policy_from(text: str) -> Policy:
    """A policy written as one word: ``block-k`` or, with options, ``block-k:k=4``; that word is its name.

    Raises:
        UnknownNameError, ConfigError: as ``make_policy``.
    """
    name, options = name_and_options(text)
    return make_policy(name, **options)._replace(name=text)
