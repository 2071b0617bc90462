"""The unit of load: seconds of work that requests bring, so that a thousand short prompts are not taken for a thousand long ones.

A request brings ``prompt_s`` for every token of its prompt and ``output_s`` for every one of its output: what those take on the
first kind of instance, in a full prefill step and in a batch that is half full. Only the ratio of the two matters, as what
instances bear is found in the same unit.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from block.autoscale.terms import Arrival, Kind, Observation
from block.steptime.profile import load_profile

Floats = npt.NDArray[np.float64]


class Work(NamedTuple):
    """Seconds an instance works on a token of each sort."""

    prompt_s: float
    output_s: float

    def of(self, prompts: npt.NDArray[np.int32], outputs: npt.NDArray[np.int32]) -> Floats:
        """(n,) prompt and output tokens -> (n,) seconds of work."""
        return np.asarray(self.prompt_s * prompts + self.output_s * outputs, dtype=float)


class Brought:
    """The work of a window's observations as arrays. Observations without their single requests never change again: those are
    turned into numbers once."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._settled = np.zeros((0, 3))
        self._single: dict[float, tuple[tuple[Arrival, ...], float]] = {}

    def of(self, window: Sequence[Observation]) -> tuple[Floats, Floats, Floats]:
        """(n,) ends of the observations, (n,) requests and (n,) seconds of work that came in each; NaN where nobody could tell.

        Where an observation has a count but no tokens its requests are taken for average ones.
        """
        first = int(np.searchsorted(self._settled[:, 0], window[0].at_s))
        settled = self._settled[first:]
        if len(settled) > len(window) or (len(settled) and settled[-1, 0] != window[len(settled) - 1].at_s):
            settled = settled[:0]
        rows = [self._row(seen) for seen in window[len(settled) :]]
        table = np.concatenate((settled, np.array(rows, dtype=float).reshape(-1, 3)))
        count = len(settled)
        while count < len(window) - 1 and not window[count].arrivals and window[count].tokens is not None:
            count += 1
        self._settled = table[:count]
        oldest_s = window[count].at_s
        self._single = {at_s: one for at_s, one in self._single.items() if at_s >= oldest_s}
        at_s, brought, requests = table.T
        told = np.isfinite(brought) & (requests > 0)
        each_s = float(brought[told].sum() / requests[told].sum()) if told.any() else 1.0
        return at_s, requests, np.where(np.isfinite(brought), brought, requests * each_s)

    def _row(self, seen: Observation) -> tuple[float, float, float]:
        """Its end, its work (NaN: unknown) and its requests (NaN: unknown)."""
        if seen.blind:
            return seen.at_s, np.nan, np.nan
        if seen.tokens is not None:
            return seen.at_s, self._work.prompt_s * seen.tokens[0] + self._work.output_s * seen.tokens[1], seen.count
        if not seen.arrivals:
            return seen.at_s, np.nan if seen.count else 0.0, seen.count
        known = self._single.get(seen.at_s)
        if known is None or known[0] is not seen.arrivals:
            prompts = sum(one.prompt_tokens for one in seen.arrivals)
            outputs = sum(one.output_tokens for one in seen.arrivals)
            known = seen.arrivals, self._work.prompt_s * prompts + self._work.output_s * outputs
            self._single[seen.at_s] = known
        return seen.at_s, known[1] * seen.count / len(seen.arrivals), seen.count


def work_on(kind: Kind) -> Work:
    """What tokens take on a kind of instance."""
    limits = kind.limits
    curve = load_profile(kind.profile).curve(1.0, limits)
    step, batch = limits.max_num_batched_tokens, max(limits.max_num_seqs // 2, 1)
    context = limits.blocks_usable * limits.block_size // 2
    return Work(curve.gpu_s(0, 0, step, 0, 1) / step, curve.gpu_s(batch, context, 0, 0, 0) / batch)
