"""Whom does a policy consider? Each shortlist returns a non-empty, distinct subset of the instances given."""

from collections.abc import Sequence
from random import Random
from typing import Protocol

from block.core import InstanceId
from block.errors import ConfigError


class Shortlist(Protocol):
    """Chooses whom to consider; whom it leaves out needs no evidence."""

    def choose(self, instances: Sequence[InstanceId], rng: Random) -> Sequence[InstanceId]:
        """A non-empty, distinct subset of ``instances`` (which is not empty)."""
        ...


class Everyone:
    """All instances."""

    def choose(self, instances: Sequence[InstanceId], rng: Random) -> Sequence[InstanceId]:
        return instances


class RandomSubset:
    """``k`` instances at random, all of them where there are no more: the power of k choices."""

    def __init__(self, k: int) -> None:
        if k < 1:
            raise ConfigError(f"k must be at least 1, not {k}.")
        self.k = k

    def choose(self, instances: Sequence[InstanceId], rng: Random) -> Sequence[InstanceId]:
        count = len(instances)
        if count <= self.k:
            return instances
        if self.k == 2:  # the usual case, several times faster than sample()
            first = int(rng.random() * count)
            second = int(rng.random() * (count - 1))
            return (instances[first], instances[second + (second >= first)])
        return rng.sample(instances, self.k)


class Rotation:
    """The next one in turn. Owns the turn, so each policy object rotates by itself."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, instances: Sequence[InstanceId], rng: Random) -> Sequence[InstanceId]:
        chosen = instances[self._turn % len(instances)]
        self._turn += 1
        return (chosen,)
