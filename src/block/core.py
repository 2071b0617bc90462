"""The nouns that every part of Block shares: what came in, what is known, what was decided.

All are frozen. Times are seconds, lengths are tokens, fractions are 0-1; unknown is ``None``.
"""

from collections.abc import Sequence
from typing import NewType, Protocol

import msgspec

InstanceId = NewType("InstanceId", str)


class Slo(msgspec.Struct, frozen=True):
    """Latency targets in seconds; ``None`` is no target. A request meets it when it meets all."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None


class PromptBlocks(msgspec.Struct, frozen=True):
    """Identity of a prompt's content in blocks of ``tokens``: equal as far as two prompts agree.

    Each key stands for its block and all before it, so that equal keys mean equal beginnings.
    """

    tokens: int
    keys: tuple[int, ...]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What a client sent, and nothing that only the future knows (law L7).

    ``prompt_tokens`` is exact where the client sent token ids and an estimate from the text otherwise.
    ``exact_output``: the client itself fixed the output at ``max_tokens`` (``ignore_eos``).
    """

    id: str
    arrived_s: float
    prompt_tokens: int
    max_tokens: int | None = None
    exact_output: bool = False
    model: str = ""
    priority: int = 0
    slo: Slo | None = None
    session: str | None = None
    client: str | None = None  # the application that sent it, where known: an API key's name or the user field
    prompt: str | None = None  # for the length estimator; never logged
    blocks: PromptBlocks | None = None  # what its prompt shares with others; ``None``: nothing, or not looked at


class LengthEstimate(Protocol):
    """A distribution over a request's total output tokens."""

    def expected_total(self, generated: int) -> float:
        """Expected total output tokens given that ``generated`` came already and it goes on (> generated)."""
        ...

    def quantile(self, q: float, generated: int = 0) -> float:
        """The q-quantile (0-1) of the total output tokens given that it outlived ``generated``."""
        ...


class Load(msgspec.Struct, frozen=True):
    """The cheap counters of one instance, the gateway's own unseen dispatches included.

    ``waiting_tokens`` sums the prompt tokens of waiting requests; ``unprocessed_tokens`` sums prompt + expected
    output - computed over all requests present; ``dispatched_last_minute`` counts what this gateway sent.
    KV blocks are ``None`` where the source does not know them (which is not zero). ``prefill_tokens_per_s``: of full steps of
    prompts, by the instance's step times, where they are known.
    """

    running: int
    waiting: int
    in_flight: int
    waiting_tokens: int = 0
    unprocessed_tokens: float = 0.0
    dispatched_last_minute: int = 0
    kv_blocks_free: int | None = None
    kv_blocks_total: int | None = None
    block_size: int = 16
    age_s: float = 0.0
    prefill_tokens_per_s: float | None = None


class Prediction(msgspec.Struct, frozen=True):
    """What happens to a request on one instance, says the engine model. Seconds from the request's arrival.

    ``harm_s`` is the latency it adds to those already there (sum), ``None`` when it was not asked for.
    ``truncated``: the horizon ended before the request did; times are then lower bounds.
    """

    ttft_s: float
    e2e_s: float
    tpot_s: float | None
    queue_delay_s: float
    preemptions: int
    harm_s: float | None = None
    truncated: bool = False
    snapshot_age_s: float = 0.0


class Candidate(msgspec.Struct, frozen=True):
    """One instance as a policy sees it. ``hit_tokens``: of the prompt, found in the instance's prefix cache, as far as known."""

    instance: InstanceId
    load: Load | None = None
    prediction: Prediction | None = None
    hit_tokens: int = 0


class Decision(msgspec.Struct, frozen=True):
    """Where a request goes and why. ``costs`` aligns with ``candidates``; ``None``: could not be costed.

    ``evidence`` is what the ranking really used ("prediction", "load", "nothing"), coarser than the policy's
    need when a fallback happened; ``fallback`` then names the reason.
    """

    instance: InstanceId
    policy: str
    candidates: Sequence[Candidate]
    costs: Sequence[float | None]
    evidence: str
    fallback: str | None = None
