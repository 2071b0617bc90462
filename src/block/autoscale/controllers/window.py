"""Reading a window of observations: counts of members, rates, and keeping it small."""

from collections.abc import Sequence

import msgspec

from block.autoscale.terms import Kind, Observation, Phase

DETAIL_S = 3600.0
"""How long single arrivals are kept; of older observations only counts and tokens."""

ARRIVALS_MOST = 60_000
"""Single arrivals kept over the whole window; beyond, the oldest observations lose theirs first."""


def counts(seen: Observation, kinds: Sequence[Kind], *phases: Phase) -> dict[str, int]:
    """Members of each kind in one of ``phases`` (none given: starting or ready)."""
    wanted = phases or (Phase.STARTING, Phase.READY)
    found = dict.fromkeys((kind.name for kind in kinds), 0)
    for member in seen.members:
        if member.phase in wanted and member.kind in found:
            found[member.kind] += 1
    return found


def last(window: Sequence[Observation], span_s: float) -> list[Observation]:
    """The observations of the last ``span_s`` seconds, the newest always."""
    from_s = window[-1].at_s - span_s
    first = len(window) - 1
    while first > 0 and window[first - 1].at_s > from_s:
        first -= 1
    return list(window[first:])


def thinned(seen: Observation) -> Observation:
    """Without its single requests: their count and their tokens stay."""
    tokens = seen.tokens or (
        sum(one.prompt_tokens for one in seen.arrivals), sum(one.output_tokens for one in seen.arrivals)
    )  # fmt: skip
    return msgspec.structs.replace(
        seen, arrived=seen.count, tokens=tokens, arrivals=(), served=(), slow_e2e_s=()
    )  # fmt: skip


class Window:
    """The observations that a controller is shown, in bounded memory. Whoever observes appends; ``seen`` is the window.

    Nothing older than ``history_s`` (and ``detail_s``); single requests only of the last ``detail_s`` seconds and at
    most ``ARRIVALS_MOST``: older observations keep their count and tokens.
    """

    def __init__(self, history_s: float, detail_s: float = DETAIL_S) -> None:
        self._history_s, self._detail_s = max(history_s, detail_s), detail_s
        self._detailed = 0  # index of the oldest observation that still has its single requests
        self._arrivals = 0
        self.seen: list[Observation] = []

    def append(self, seen: Observation) -> None:
        self.seen.append(seen)
        self._arrivals += len(seen.arrivals)
        while self._detailed < len(self.seen) - 1 and (
            self.seen[self._detailed].at_s <= seen.at_s - self._detail_s or self._arrivals > ARRIVALS_MOST
        ):
            old = self.seen[self._detailed]
            self._arrivals -= len(old.arrivals)
            self.seen[self._detailed] = thinned(old)
            self._detailed += 1
        if self.seen[0].at_s < seen.at_s - 1.25 * self._history_s:  # in strides: cheap on the whole
            keep = next(i for i, one in enumerate(self.seen) if one.at_s >= seen.at_s - self._history_s)
            self.seen, self._detailed = self.seen[keep:], self._detailed - keep


def interval_s(window: Sequence[Observation], default_s: float = 15.0) -> float:
    """Seconds between observations: the newest gap."""
    if len(window) < 2 or window[-1].at_s <= window[-2].at_s:
        return default_s
    return window[-1].at_s - window[-2].at_s
