"""How long a start takes, measured: from the order to the first gateway that can predict and use the instance."""

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from block.autoscale.terms import Kind, Member, Phase

WEIGHT: Final = 0.3
"""Of the newest start in the exponential average."""


class ColdStarts:
    """Hears of members and keeps an average for each kind."""

    def __init__(self) -> None:
        self.measured_s: dict[str, float] = {}
        self.count: dict[str, int] = {}
        self._starting_s: dict[str, float] = {}
        self._measured: set[str] = set()

    def hear(
        self, members: Sequence[Member], ordered_s: Mapping[str, float], ready_s: Mapping[str, float]
    ) -> list[tuple[str, float]]:
        """Members now, when each was ordered where its actuator knows (else since when it was seen starting), and when the
        gateways first found it ready. Returns the starts that ended since: (kind, seconds)."""
        ended: list[tuple[str, float]] = []
        for member in members:
            if member.phase is Phase.STARTING:
                self._starting_s[member.id] = min(member.since_s, self._starting_s.get(member.id, member.since_s))
            elif member.phase is Phase.READY and member.id not in self._measured:
                self._measured.add(member.id)
                from_s = ordered_s.get(member.id, self._starting_s.pop(member.id, None))
                if from_s is not None and (took_s := ready_s.get(member.id, member.since_s) - from_s) > 0:
                    ended.append((member.kind, took_s))
        there = {member.id for member in members}
        self._starting_s = {name: at_s for name, at_s in self._starting_s.items() if name in there}
        self._measured &= there
        for kind, took_s in ended:
            before_s = self.measured_s.get(kind, took_s)
            self.measured_s[kind] = before_s + WEIGHT * (took_s - before_s)
            self.count[kind] = self.count.get(kind, 0) + 1
        return ended

    def applied(self, kinds: Sequence[Kind]) -> list[Kind]:
        """The kinds with the measured times in place of the configured ones."""
        return [
            msgspec.structs.replace(kind, cold_start_s=round(self.measured_s[kind.name], 2))
            if kind.name in self.measured_s
            else kind
            for kind in kinds
        ]
