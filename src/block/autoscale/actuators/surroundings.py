"""What every actuator is given."""

from collections.abc import Mapping
from typing import NamedTuple

import aiohttp

from block.autoscale.live.membership import Membership
from block.autoscale.terms import Kind


class Surroundings(NamedTuple):
    """``name`` is the autoscaler's own: instances that it makes begin with it."""

    name: str
    kinds: Mapping[str, Kind]
    membership: Membership
    session: aiohttp.ClientSession
