"""Ranks that send a prompt to where its beginning is, or was: they compare the candidates with each other.

Prefix affinity with a load threshold follows what cache-aware routers do (sglang's ``cache_aware``, llm-d's prefix scorer):
the longest match wins unless it is short or its instance is too busy compared with the others. Consistent hashing with
bounded loads is Mirrokni, Thorup and Zadimoghaddam's (2018): walk the ring from the key, take the first instance that has
less than ``bound`` times the mean load.
"""

from bisect import bisect_left
from collections.abc import Sequence
from hashlib import blake2b
from math import ceil
from typing import ClassVar

from block.core import Candidate, InstanceId, Request
from block.errors import ConfigError
from block.policy.rank import Evidence, JointRank


class PrefixAffinity(JointRank):
    """The longest cached beginning, if it is at least ``match_fraction`` of the prompt and the instance is not overloaded:
    requests in flight at most ``load_ratio`` times the fewest, or at most ``load_slack`` more. Else the fewest in flight."""

    needs: ClassVar = Evidence.LOAD
    prefix: ClassVar = True

    def __init__(self, match_fraction: float, load_ratio: float, load_slack: int) -> None:
        if not 0 <= match_fraction <= 1 or load_ratio < 1 or load_slack < 0:
            raise ConfigError("match_fraction must be in [0, 1], load_ratio at least 1 and load_slack not negative.")
        self.match_fraction, self.load_ratio, self.load_slack = match_fraction, load_ratio, load_slack

    def costs(self, request: Request, candidates: Sequence[Candidate]) -> list[float | None]:
        loads = [None if c.load is None else c.load.in_flight for c in candidates]
        known = [load for load in loads if load is not None]
        if len(known) < len(loads):
            return [None] * len(loads)
        fewest, enough = min(known), max(self.match_fraction * request.prompt_tokens, 1.0)
        most = max(fewest * self.load_ratio, fewest + self.load_slack)
        longest = max((c.hit_tokens for c, n in zip(candidates, known, strict=True) if n <= most), default=0)
        if longest < enough:
            return [float(n) for n in known]
        # Those with the longest match first, among them the least busy; costs stay below any other's load.
        far = float(max(known) + 1)
        return [
            float(n) - far if c.hit_tokens == longest and n <= most else float(n)
            for c, n in zip(candidates, known, strict=True)
        ]


class BoundedHash(JointRank):
    """Consistent hashing with bounded loads, on the session where there is one, else on the prompt's first ``chunks`` keys.

    Costs are places on the walk around the ring; an instance at its bound costs a whole round more. A request with neither
    session nor keys goes to the fewest in flight.
    """

    needs: ClassVar = Evidence.LOAD
    prefix: ClassVar = True
    POINTS: ClassVar = 64

    def __init__(self, bound: float, chunks: int) -> None:
        if bound < 1 or chunks < 1:
            raise ConfigError("bound and chunks must be at least 1.")
        self.bound, self.chunks = bound, chunks
        self._members: tuple[InstanceId, ...] = ()
        self._ring: list[tuple[int, InstanceId]] = []

    def costs(self, request: Request, candidates: Sequence[Candidate]) -> list[float | None]:
        loads = [c.load.in_flight for c in candidates if c.load is not None]
        if len(loads) < len(candidates):
            return [None] * len(candidates)
        key = self._key(request)
        if key is None:
            return [float(n) for n in loads]
        places = self._walk(key, tuple(sorted(c.instance for c in candidates)))
        most, round_ = ceil(self.bound * (sum(loads) + 1) / len(loads)), len(loads)
        return [
            places[c.instance] + (0 if n < most else round_) + (n if n >= most else 0)
            for c, n in zip(candidates, loads, strict=True)
        ]

    def _key(self, request: Request) -> str | None:
        if request.session is not None:
            return f"session {request.session}"
        if request.blocks is None or not request.blocks.keys:
            return None
        keys = request.blocks.keys
        return f"prefix {keys[min(self.chunks, len(keys)) - 1]}"

    def _walk(self, key: str, members: tuple[InstanceId, ...]) -> dict[InstanceId, float]:
        """The place of every instance on the walk from ``key``."""
        if members != self._members:
            points = [(_point(f"{member} {n}"), member) for member in members for n in range(self.POINTS)]
            self._ring, self._members = sorted(points), members
        ring, places = self._ring, dict[InstanceId, float]()
        start = bisect_left(ring, (_point(key), ""))
        for n in range(len(ring)):
            member = ring[(start + n) % len(ring)][1]
            if member not in places:
                places[member] = float(len(places))
                if len(places) == len(members):
                    break
        return places


def _point(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
