"""What each instance probably keeps of prompts, as far as this gateway knows: from what it sent there itself.

Engines do not say what their prefix caches hold (not in a snapshot), so this is an index of keys of the prompts sent, bounded
by the memory that the instance has. It is emptied when the engine restarts, and of an engine without a prefix cache it
expects nothing.
"""

from collections.abc import Sequence
from typing import Final

from block.core import InstanceId, Request
from block.gateway.deciding.evidence import Evidence
from block.policy.prefix import PrefixIndex

KEYS_MAX: Final = 65_536
"""Per instance, where its memory is not known: some 16 million tokens."""


class Prefixes:
    """One index per instance. Written by dispatch; asked by decisions."""

    def __init__(self) -> None:
        self._indexes: dict[InstanceId, tuple[int, PrefixIndex]] = {}

    def hit_tokens(self, request: Request, instance: InstanceId, evidence: Evidence | None) -> int:
        """Prompt tokens that the request will probably find there."""
        if request.blocks is None:
            return 0
        snapshot = None if evidence is None else evidence.snapshot
        if snapshot is not None and not snapshot.limits.enable_prefix_caching:
            return 0
        epoch, index = self._indexes.get(instance, (0, None))
        if index is None or (snapshot is not None and snapshot.epoch != epoch):
            return 0
        return index.match_tokens(request.blocks, request.prompt_tokens)

    def hits(self, request: Request, ids: Sequence[InstanceId], evidence: dict[InstanceId, Evidence]) -> list[int]:
        """The same for all of ``ids``."""
        if request.blocks is None:
            return [0] * len(ids)
        return [self.hit_tokens(request, i, evidence.get(i)) for i in ids]

    def sent(self, request: Request, instance: InstanceId, evidence: Evidence | None) -> None:
        """A request was sent there: its prompt will be in the cache."""
        if request.blocks is None:
            return
        snapshot = None if evidence is None else evidence.snapshot
        epoch, most = 0, KEYS_MAX
        if snapshot is not None:
            limits, epoch = snapshot.limits, snapshot.epoch
            if not limits.enable_prefix_caching:
                return
            most = min(KEYS_MAX, limits.blocks_usable * limits.block_size // request.blocks.tokens)
        known, index = self._indexes.get(instance, (0, None))
        if index is None or known != epoch:
            index = PrefixIndex(most)
            self._indexes[instance] = (epoch, index)
        index.most = max(most, 1)
        index.note(request.blocks)

    def forget(self, instance: InstanceId) -> None:
        """An instance left."""
        self._indexes.pop(instance, None)
