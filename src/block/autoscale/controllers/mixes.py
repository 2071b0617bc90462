"""Which counts to try, and which to take: the cheapest that meet the target, found with few trials.

``missed`` falls as instances are added. With one kind the fewest are found by bracketing from the present count and bisecting;
with several, for each count of the dearer kinds near the present the fewest of the cheapest are.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product

from block.autoscale.terms import Kind

Counts = dict[str, int]
NEAR = 3
"""How far from the present count of a dearer kind mixes are tried."""
OVERLOADED = 0.5
"""Missed fraction of the most instances from which on counts are not compared any more."""
SWAP = 1.2
"""A mix that stops instances of one kind and starts some of another must be cheaper by this factor: while the new start the old are
paid for too, and the load that makes it a little cheaper now may be gone before."""


def cheapest(
    kinds: Sequence[Kind], have: Counts, missed: Callable[[Counts], float], allowed: float
) -> tuple[Counts, float]:
    """The cheapest counts with a missed fraction of at most ``allowed``, and that fraction.

    If nothing meets it, the fewest that miss hardly more than the most would.
    """
    first, *others = sorted(kinds, key=lambda kind: kind.price)
    best: tuple[tuple[bool, float, float], Counts, float] | None = None
    for fixed in _others(others, have):
        want, missing = _fewest(first, fixed, have, missed, allowed)
        price = sum(kind.price * want[kind.name] for kind in kinds)
        changes = [want[kind.name] - have[kind.name] for kind in kinds]
        price *= SWAP if min(changes) < 0 < max(changes) else 1.0
        meets = missing <= allowed
        key = (not meets, price if meets else missing, missing if meets else price)
        if best is None or key < best[0]:
            best = key, want, missing
    assert best is not None
    return best[1], best[2]


def _others(others: Sequence[Kind], have: Counts) -> Iterator[Counts]:
    """Counts of the dearer kinds to try: near the present ones, and none."""
    spans = []
    for kind in others:
        near = range(max(have[kind.name] - NEAR, kind.least), min(have[kind.name] + NEAR, kind.most) + 1)
        spans.append(sorted({kind.least, *near}))
    for values in product(*spans):
        yield dict(zip((kind.name for kind in others), values, strict=True))


def _fewest(
    kind: Kind, fixed: Counts, have: Counts, missed: Callable[[Counts], float], allowed: float
) -> tuple[Counts, float]:
    """The fewest of ``kind`` beside ``fixed``: doubling steps from the present count, then bisection."""

    def at(count: int) -> tuple[Counts, float]:
        # The order of ``have`` is the order of the kinds: candidates are told apart by it.
        want = {name: {**fixed, kind.name: count}[name] for name in have}
        return want, missed(want) if sum(want.values()) else 1.0

    low, high, step = (
        kind.least - 1,
        kind.most + 1,
        1,
    )  # low fails or is below the least, high holds or is above the most
    count = min(max(have[kind.name], kind.least), kind.most)
    while high - low > 1:
        if at(count)[1] <= allowed:
            high = count
        else:
            low = count
        if low >= kind.least and high <= kind.most:
            count = (low + high) // 2
        elif high <= kind.most:
            count, step = max(high - step, kind.least), 2 * step
        else:
            count, step = min(low + step, kind.most), 2 * step
    if high <= kind.most:
        return at(high)
    return _enough(kind, at)


def _enough(kind: Kind, at: Callable[[int], tuple[Counts, float]]) -> tuple[Counts, float]:
    """Nothing meets the target: the fewest that miss at most a twentieth more than the most would. If even the most miss more
    than half they are overloaded, every count looks alike, and only the most will do."""
    low, high = kind.least - 1, kind.most
    if at(high)[1] > OVERLOADED:
        return at(high)
    bearable = 1.05 * at(high)[1] + 1e-9
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle)[1] <= bearable else (middle, high)
    return at(high)
