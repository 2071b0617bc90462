"""The one place that bounds what any controller asks for: limits, patience, steps, blindness.

A plan passes through `bounded` before anybody acts on it. Increases are let through at once (`up_wait_s` 0) because a late
start costs latency; a decrease only when every plan of the last `settle_s` seconds asked for as little, as the Kubernetes
autoscaler does it, so that the count of a kind turns up after a turn down at most once in `settle_s`. While a source of
observations is blind what is seen is too little, so nothing is removed.
"""

from collections.abc import Mapping, Sequence
from math import inf

import msgspec

from block.autoscale.terms import Kind, Plan
from block.errors import ConfigError

REMEMBERED_MOST = 4096


class Guard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What holds for every controller.

    ``least`` and ``most`` bound the instances of all kinds together (each kind has its own bounds too). ``settle_s``: how long a
    lower count must have been asked for; ``up_wait_s``, ``down_wait_s``: pauses after an increase and after a decrease of
    a kind before the next one of the same direction; ``up_most``, ``down_most``: the most instances of a kind in one step.
    """

    least: int = 1
    most: int = 64
    settle_s: float = 300.0
    up_wait_s: float = 0.0
    down_wait_s: float = 0.0
    up_most: int = 64
    down_most: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most:
            raise ConfigError(f"least must be 0 to most, not {self.least} with most {self.most}.")
        waits = (self.settle_s, self.up_wait_s, self.down_wait_s)
        if not all(0 <= wait_s < inf for wait_s in waits) or min(self.up_most, self.down_most) < 1:
            raise ConfigError(
                "settle_s and the waits must be finite and not negative, up_most and down_most at least 1."
            )


class Memory(msgspec.Struct, frozen=True):
    """What the guard remembers from one plan to the next. ``want``: the last bounded counts."""

    want: dict[str, int] = {}
    asked: tuple[tuple[float, dict[str, int]], ...] = ()
    raised_s: dict[str, float] = {}
    lowered_s: dict[str, float] = {}


def bounded(
    plan: Plan, at_s: float, memory: Memory, kinds: Sequence[Kind], guard: Guard, *, blind: Sequence[str] = ()
) -> tuple[Plan, Memory]:
    """The plan that may be acted on, and what to remember. Kinds that the plan leaves out stay as they are.

    The first plan (an empty memory) is only clipped, as nothing is known to compare it with: seed ``Memory(want=...)``
    with the members that already are. ``blind`` names sources of observations that did not answer: nothing is removed.
    """
    asked = {kind.name: plan.want.get(kind.name, memory.want.get(kind.name, kind.least)) for kind in kinds}
    history = _recent((*memory.asked, (at_s, asked)), at_s - guard.settle_s)
    want: dict[str, int] = {}
    held: list[str] = []
    raised_s, lowered_s = dict(memory.raised_s), dict(memory.lowered_s)
    for kind in kinds:
        name, before = kind.name, memory.want.get(kind.name)
        if before is None:
            want[name] = asked[name]
            continue
        want[name], why = _step(name, before, asked[name], at_s, memory, history, guard, bool(blind))
        if why:
            held.append(f"{name}: {why}")
    want = _clipped(want, kinds, guard)
    for name, count in want.items():
        before = memory.want.get(name, count)
        if count != before:
            (raised_s if count > before else lowered_s)[name] = at_s
    reason = plan.reason
    if held:
        reason += f" Held ({'; '.join(held)})."
    elif want != asked:
        reason += " Bounded."
    kept = Memory(want, history, raised_s, lowered_s)
    return Plan(want, reason, plan.evidence), kept


def _step(
    name: str, before: int, asked: int, at_s: float, memory: Memory, history: tuple[tuple[float, dict[str, int]], ...],
    guard: Guard, blind: bool,
) -> tuple[int, str]:  # fmt: skip
    """The next count of one kind, and why it is not the one asked for."""
    if asked > before:
        if at_s - memory.raised_s.get(name, -1e18) < guard.up_wait_s:
            return before, f"raised less than {guard.up_wait_s:g} s ago"
        return min(asked, before + guard.up_most), ""
    settled = max(want.get(name, asked) for _, want in history)
    why = ""
    if asked == before:
        return before, why
    if blind:
        why = "a source of observations is blind"
    elif settled >= before:
        why = f"{settled} asked for within {guard.settle_s:g} s"
    elif at_s - memory.lowered_s.get(name, -1e18) < guard.down_wait_s:
        why = f"lowered less than {guard.down_wait_s:g} s ago"
    return (before, why) if why else (max(settled, before - guard.down_most), "")


def _recent(asked: tuple[tuple[float, dict[str, int]], ...], from_s: float) -> tuple[tuple[float, dict[str, int]], ...]:
    return tuple(one for one in asked if one[0] > from_s)[-REMEMBERED_MOST:] or asked[-1:]


def _clipped(want: Mapping[str, int], kinds: Sequence[Kind], guard: Guard) -> dict[str, int]:
    """Within every kind's bounds and the total's: the cheapest are added first, the dearest left out first."""
    clipped = {kind.name: min(max(want[kind.name], kind.least), kind.most) for kind in kinds}
    cheapest_first = sorted(kinds, key=lambda kind: kind.price)
    for kind in cheapest_first:
        lacking = guard.least - sum(clipped.values())
        if lacking > 0:
            clipped[kind.name] = min(kind.most, clipped[kind.name] + lacking)
    for kind in reversed(cheapest_first):
        over = sum(clipped.values()) - guard.most
        if over > 0:
            clipped[kind.name] = max(kind.least, clipped[kind.name] - over)
    return clipped
