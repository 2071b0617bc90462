"""What an autoscaler sees and says: the nouns of provisioning. Pure.

Data flow: an observer makes an `Observation` every interval; a `Controller` turns the window of them into a `Plan`; the
keeper (the loop around both) bounds the plan and hands it to an `Actuator`, whose `members` come back in the next observation.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Protocol

import msgspec

from block.engine.limits import EngineLimits


class Kind(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One sort of instance that can be had: what it costs an hour, how it performs, how long it takes to start.

    ``cold_start_s``: from the order to the first request served; a measured one replaces it. ``most``: as many as there can be.
    """

    name: str = "default"
    price: float = 1.0
    profile: str = "h200-llama3.1-8b"
    limits: EngineLimits = EngineLimits()
    cold_start_s: float = 60.0
    least: int = 0
    most: int = 64


class Phase(StrEnum):
    """Where an instance is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DOWN = "down"


class Member(msgspec.Struct, frozen=True):
    """One instance as its actuator or gateway reports it; ``since_s`` is when it entered the phase."""

    id: str
    kind: str
    phase: Phase
    since_s: float


class Arrival(msgspec.Struct, frozen=True):
    """One request that came: output tokens are the true ones where it has finished, else those estimated."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


class Served(msgspec.Struct, frozen=True):
    """One request that was finished (or failed: ``ttft_s`` is None) since the last observation. Latencies in seconds."""

    at_s: float
    ttft_s: float | None
    e2e_s: float | None


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen in one interval that ended at ``at_s``; ``None`` means that nobody could tell.

    ``predicted_e2e_s``: the largest, over the interval's decisions, of the chosen (best) instance's predicted E2E.
    ``predicted_ttft_s``: likewise. ``queued``: waiting in engines and gateways now. ``kv_used``: mean fraction in [0, 1].
    ``blind``: names of the sources that did not answer. ``arrived``: how many requests came, where ``arrivals`` is only a
    sample of them or was dropped (`controllers.window.Window`); ``None``: as many as ``arrivals``. ``tokens``: the prompt and
    the output tokens of all that came, where ``arrivals`` was dropped. ``slow_e2e_s``: the largest predicted E2Es of the
    interval's decisions, at most 64, for the rule that counts requests.
    """

    at_s: float
    members: tuple[Member, ...] = ()
    arrivals: tuple[Arrival, ...] = ()
    served: tuple[Served, ...] = ()
    predicted_ttft_s: float | None = None
    predicted_e2e_s: float | None = None
    in_flight: int | None = None
    queued: int | None = None
    kv_used: float | None = None
    blind: tuple[str, ...] = ()
    arrived: int | None = None
    tokens: tuple[int, int] | None = None
    slow_e2e_s: tuple[float, ...] = ()

    @property
    def count(self) -> int:
        """Requests that came."""
        return len(self.arrivals) if self.arrived is None else self.arrived


class Plan(msgspec.Struct, frozen=True):
    """How many instances of every kind there should be, and why: one sentence and the numbers behind it."""

    want: dict[str, int]
    reason: str
    evidence: dict[str, float] = {}


class Controller(Protocol):
    """Decides. A pure function of its configuration and the window, so that two of them agree.

    ``history_s``: how far back it looks. Its plans go through `controllers.guard.bounded` before anybody acts.
    """

    name: str
    history_s: float

    def decide(self, window: Sequence[Observation]) -> Plan:
        """The newest observation is last; there is at least one."""
        ...


class Actuator(Protocol):
    """Makes it so. Idempotent; returns before instances are ready; may raise `ActuatorError`, be slow, or lie."""

    async def scale_to(self, want: Mapping[str, int]) -> None:
        """Start or stop instances until there are so many of each kind; those removed drain first."""
        ...

    async def members(self) -> Sequence[Member]:
        """All instances that it keeps."""
        ...

    async def close(self) -> None:
        """Let go of connections; instances stay unless they are this process's children."""
        ...
