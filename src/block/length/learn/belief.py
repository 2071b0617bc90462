"""How much of an effect to believe: what the records say, weighed by how surely they say it.

A weight is the one of least loss. Its standard error comes from a bootstrap over prompts (answers to one prompt are no
independent evidence) and decides, beside what such weights are elsewhere, what is believed: the normal posterior

    (weight / error^2 + mean / width^2) / (1 / error^2 + 1 / width^2)

so that an effect that few prompts speak for moves little, whatever it gains on them.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from block.length.distribution import Floats

SHARES: Floats = np.linspace(-3.0, 5.0, 161)
"""Weights that are tried: far beyond those that are believed, so that the error of an uncertain one shows."""

_RESAMPLES = 100


class Prior(NamedTuple):
    """What is known of a weight before there are records: its mean and how widely it varies between sets of records."""

    mean: float
    width: float


class Seen(NamedTuple):
    """The weight that records speak for, and its standard error."""

    weight: float
    error: float

    def believed(self, prior: Prior, *, most: float) -> float:
        """The weight to use, 0 to ``most``."""
        told, before = self.error**-2, prior.width**-2
        return min(max(0.0, (told * self.weight + before * prior.mean) / (told + before)), most)


def seen(target: Floats, effect: Floats, prompt: NDArray[np.int64]) -> Seen:
    """How much of ``effect`` the ``target`` holds, by least absolute error. All (n,); ``prompt``: whose answer each is."""
    return least(np.abs(target[:, None] - effect[:, None] * SHARES[None, :]), prompt)


def least(losses: Floats, prompt: NDArray[np.int64]) -> Seen:
    """The one of `SHARES` with the least total loss, (n, shares), and its standard error over prompts, (n,)."""
    names, place = np.unique(prompt, return_inverse=True)
    by_prompt = np.zeros((len(names), len(SHARES)))
    np.add.at(by_prompt, place, losses)
    rng = np.random.default_rng(0)
    even = np.full(len(names), 1.0 / len(names))
    drawn = [SHARES[int(np.argmin(rng.multinomial(len(names), even) @ by_prompt))] for _ in range(_RESAMPLES)]
    best = SHARES[int(np.argmin(by_prompt.sum(axis=0)))]
    return Seen(
        float(best), max(float(np.std(drawn)), 1.0 / len(names))
    )  # of one or two prompts all resamples are alike
