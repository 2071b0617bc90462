"""Who made which response of ``/v1/responses``: engines keep them in their own memory, so what refers to one goes where it is."""

import re
from typing import Final

from block.core import InstanceId

ROUTE: Final = "/v1/responses/"
KEPT: Final = 16384
_ID: Final = re.compile(rb'"id"\s*:\s*"(resp_[\w.:\-]{1,256})"')


class Owners:
    """The last ``KEPT`` responses by their ids, as this process relayed them."""

    def __init__(self) -> None:
        self._owners: dict[str, InstanceId] = {}

    def learn(self, beginning: bytes, instance_id: InstanceId) -> None:
        """An answer begins like this."""
        found = _ID.search(beginning, 0, 4096)
        if found is None:
            return
        if len(self._owners) >= KEPT:
            del self._owners[next(iter(self._owners))]
        self._owners[found[1].decode()] = instance_id

    def of(self, path: str, previous: str | None) -> InstanceId | None:
        """Whose response a request refers to, by its path or as the previous one; ``None``: to none, or nobody knows."""
        if previous is None:
            if not path.startswith(ROUTE):
                return None
            previous = path.removeprefix(ROUTE).partition("/")[0]
        return self._owners.get(previous)
