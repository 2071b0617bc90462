"""The life of instances that come and go: ordered, cold-starting, ready, draining, gone; and what they cost.

A fixed row of slots, ``Kind.most`` of each kind. An instance is paid for from the order until its last request has
ended. Pure bookkeeping: whoever drives it says what time it is and which slots are busy.
"""

from collections.abc import Callable, Mapping, Sequence

from block.autoscale.terms import Kind, Member, Phase

NEVER_S = float("inf")


class Slot:
    """One place for an instance; the fleet alone writes it. ``ready_s`` is known from the order on."""

    __slots__ = ("id", "kind", "ordered_s", "phase", "ready_s", "since_s")

    def __init__(self, id: str, kind: Kind) -> None:  # noqa: A002
        self.id, self.kind = id, kind
        self.phase = Phase.DOWN
        self.since_s = self.ordered_s = 0.0
        self.ready_s = NEVER_S


class Fleet:
    """All slots. ``actions`` counts the orders that changed something."""

    def __init__(self, kinds: Sequence[Kind], start: Mapping[str, int]) -> None:
        self.slots = [Slot(f"{kind.name}-{number:02d}", kind) for kind in kinds for number in range(kind.most)]
        self.actions = 0
        self._paid_s = dict.fromkeys((kind.name for kind in kinds), 0.0)
        for name, count in start.items():
            for slot in [slot for slot in self.slots if slot.kind.name == name][:count]:
                slot.phase, slot.ready_s = Phase.READY, 0.0

    def members(self) -> tuple[Member, ...]:
        """All instances that there are."""
        return tuple(
            Member(slot.id, slot.kind.name, slot.phase, slot.since_s)
            for slot in self.slots
            if slot.phase is not Phase.DOWN
        )

    def numbers(self, *phases: Phase) -> list[int]:
        """Numbers of the slots in one of ``phases``."""
        return [number for number, slot in enumerate(self.slots) if slot.phase in phases]

    def settle(self, now_s: float, empty_since_s: Callable[[int], float | None]) -> list[int]:
        """Those started become ready, those drained are gone; returns the numbers of the latter.

        ``empty_since_s(number)``: when a slot's last request ended, ``None``: it still has some.
        """
        gone: list[int] = []
        for number, slot in enumerate(self.slots):
            if slot.phase is Phase.STARTING and slot.ready_s <= now_s:
                slot.phase, slot.since_s = Phase.READY, slot.ready_s
            elif slot.phase is Phase.DRAINING:
                empty_s = empty_since_s(number)
                if empty_s is not None:
                    self._end(slot, max(empty_s, slot.since_s))
                    gone.append(number)
        return gone

    def order(self, want: Mapping[str, int], now_s: float, load: Callable[[int], int]) -> bool:
        """Start and stop towards the counts wanted; whether anything was done. Stops the newest that are still starting
        (and hold nothing) first, then the ready ones with the least ``load(number)``, which drain."""
        done = False
        for name, count in want.items():
            mine = [number for number, slot in enumerate(self.slots) if slot.kind.name == name]
            have = [number for number in mine if self.slots[number].phase in (Phase.STARTING, Phase.READY)]
            free = [number for number in mine if self.slots[number].phase is Phase.DOWN]
            for number in free[: max(count - len(have), 0)]:
                self._start(self.slots[number], now_s)
                done = True
            have.sort(key=lambda number: self._dispensable(number, load))
            for number in have[: max(len(have) - count, 0)]:
                self._stop(self.slots[number], now_s)
                done = True
        self.actions += done
        return done

    def paid_s(self, now_s: float) -> dict[str, float]:
        """Instance seconds paid up to now, by kind."""
        paid = dict(self._paid_s)
        for slot in self.slots:
            if slot.phase is not Phase.DOWN:
                paid[slot.kind.name] += now_s - slot.ordered_s
        return paid

    def _dispensable(self, number: int, load: Callable[[int], int]) -> tuple[bool, int, float]:
        slot, busy = self.slots[number], load(number)
        return slot.phase is Phase.READY or busy > 0, busy, -slot.since_s

    def _start(self, slot: Slot, now_s: float) -> None:
        slot.phase, slot.since_s, slot.ordered_s = Phase.STARTING, now_s, now_s
        slot.ready_s = now_s + slot.kind.cold_start_s
        if slot.kind.cold_start_s == 0:
            slot.phase = Phase.READY

    def _stop(self, slot: Slot, now_s: float) -> None:
        slot.phase, slot.since_s = Phase.DRAINING, now_s

    def _end(self, slot: Slot, at_s: float) -> None:
        self._paid_s[slot.kind.name] += at_s - slot.ordered_s
        slot.phase, slot.since_s, slot.ready_s = Phase.DOWN, at_s, NEVER_S
