"""Faults on order, so that tests and demos can see what the parts around an engine do about them."""

import random
from typing import Annotated, Final, Literal

import msgspec

from block.errors import ClientError

INTERNAL_ERROR: Final = "InternalServerError"


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What ``POST /emulate/fault`` takes.

    hang: nothing moves for ``seconds`` (it goes on where it was); slow: every step takes ``factor`` times as long,
    from now on (1: as before); errors: this ``fraction`` of requests gets a 500, from now on; break: all requests in
    play lose their connection in the middle; exit: the process is gone at once, as if killed.
    """

    kind: Literal["hang", "slow", "errors", "break", "exit"]
    seconds: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 1.0
    factor: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 1.0
    fraction: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0


class BrokenOnOrder(Exception):  # noqa: N818 - it is not a mistake of anyone
    """A fault broke this request off."""


class Failures:
    """Lets a seeded fraction of requests fail."""

    def __init__(self, fraction: float, seed: int) -> None:
        self.fraction = fraction
        self._rng = random.Random(seed)

    def maybe_fail(self) -> None:
        """Raises ``ClientError`` 500 for the fraction."""
        if self.fraction > 0 and self._rng.random() < self.fraction:
            raise ClientError(500, "This failure was injected (fail rate).", kind=INTERNAL_ERROR)
