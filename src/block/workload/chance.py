"""Chance, by name: every use has its own stream, so that one more draw here changes nothing there."""

import zlib
from random import Random

import numpy as np

from block.errors import ConfigError


def generator(seed: int, name: str) -> np.random.Generator:
    """The numpy generator of the stream ``name`` under ``seed``.

    Raises:
        ConfigError: a negative seed.
    """
    if seed < 0:
        raise ConfigError(f"A seed must not be negative, not {seed}.")
    return np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(name.encode())]))


def pyrandom(seed: int, name: str) -> Random:
    """The standard library's generator of the stream ``name``: much faster for single draws, so policies use it."""
    return Random(f"{seed}/{name}")
