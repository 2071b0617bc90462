"""How long the emulated model's answers would be if nobody bounded them."""

import math
import random
from collections.abc import Callable
from typing import Final

from block.errors import ConfigError, UnknownNameError

# ShareGPT's answers have a mean of about 326 tokens; a log-normal of this spread has its long tail (median 206).
_SHAREGPT_MEAN: Final = 326.0
_SHAREGPT_SIGMA: Final = 0.96


class OutputLengths:
    """Draws output lengths, tokens, at least 1; its generator is its own, so that draws depend on the seed alone."""

    def __init__(self, draw: Callable[[random.Random], float], seed: int) -> None:
        self._draw = draw
        self._rng = random.Random(seed)

    def next(self) -> int:
        return max(1, round(self._draw(self._rng)))


def _fixed(arguments: list[float]) -> Callable[[random.Random], float]:
    (tokens,) = arguments
    if tokens < 1:
        raise ValueError("at least one token")
    return lambda _rng: tokens


def _lognormal(arguments: list[float]) -> Callable[[random.Random], float]:
    mean, sigma = arguments if len(arguments) > 1 else (*arguments, _SHAREGPT_SIGMA)
    mu = math.log(mean) - sigma * sigma / 2
    return lambda rng: rng.lognormvariate(mu, sigma)


def _uniform(arguments: list[float]) -> Callable[[random.Random], float]:
    low, high = arguments
    if not 1 <= low <= high:
        raise ValueError("1 <= LOW <= HIGH")
    return lambda rng: rng.uniform(low, high)


def _sharegpt(arguments: list[float]) -> Callable[[random.Random], float]:
    if arguments:
        raise ValueError("it takes no arguments")
    return _lognormal([_SHAREGPT_MEAN, _SHAREGPT_SIGMA])


LENGTHS: Final = {
    "sharegpt": (_sharegpt, "sharegpt"),
    "fixed": (_fixed, "fixed:TOKENS"),
    "lognormal": (_lognormal, "lognormal:MEAN[,SIGMA]"),
    "uniform": (_uniform, "uniform:LOW,HIGH"),
}


def output_lengths(spec: str, seed: int) -> OutputLengths:
    """The distribution that ``spec`` names, e.g. ``sharegpt``, ``fixed:100``, ``lognormal:200,0.8``, ``uniform:10,50``.

    Raises:
        UnknownNameError: no distribution of that name.
        ConfigError: its arguments are wrong.
    """
    name, _, rest = spec.partition(":")
    if name not in LENGTHS:
        raise UnknownNameError("output length distribution", name, [form for _, form in LENGTHS.values()])
    make, form = LENGTHS[name]
    try:
        return OutputLengths(make([float(a) for a in rest.split(",")] if rest else []), seed)
    except ValueError as error:
        raise ConfigError(f"--output-lengths {spec!r} should read {form} ({error}).") from error
