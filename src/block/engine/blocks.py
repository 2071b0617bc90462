"""KV blocks with identities, for engines with prefix caching: who holds them, what is in them, and who is evicted next."""

from collections import OrderedDict

import cython

if cython.compiled:
    from cython.cimports.block.engine.sequence import Sequence
else:
    from block.engine.sequence import Sequence


@cython.cclass
class PrefixPool:
    """Blocks with identities: reference counts, content keys, and a free list in order of eviction.

    A freed block that is findable goes to the tail of the free list, any other to its head; allocation takes the
    head and forgets its content. Blocks of equal content stay apart; the first one is the one that is found.
    ``queried_tokens`` and ``hit_tokens`` count the prompts admitted so far and what of them was found.
    """

    def __init__(self, num_blocks):
        self.free = OrderedDict((b, None) for b in range(1, num_blocks))
        self.references = [0] * num_blocks
        self.key_of = [None] * num_blocks
        self.blocks_of = {}
        self.queried_tokens = self.hit_tokens = 0

    @cython.ccall
    def find(self, seq: Sequence, most: cython.longlong) -> list:
        """The blocks that hold the longest run of the sequence's first ``most`` blocks."""
        i: cython.longlong
        found: list = []
        for i in range(most):
            blocks = self.blocks_of.get(seq.block_key(i))
            if blocks is None:
                break
            found.append(blocks[0])
        return found

    @cython.ccall
    def unreferenced(self, blocks: list) -> cython.longlong:
        """How many of ``blocks`` are held by nobody, so that touching them takes them out of the free list."""
        n: cython.longlong = 0
        for block in blocks:
            if self.references[block] == 0:
                n += 1
        return n

    @cython.ccall
    def touch(self, blocks: list) -> None:
        for block in blocks:
            if self.references[block] == 0:
                del self.free[block]
            self.references[block] += 1

    @cython.ccall
    def take(self, count: cython.longlong) -> list:
        taken: list = []
        for _ in range(count):
            block, _nothing = self.free.popitem(last=False)
            key = self.key_of[block]
            if key is not None:
                self._forget(block, key)
            self.references[block] = 1
            taken.append(block)
        return taken

    @cython.cfunc
    def _forget(self, block: object, key: object) -> cython.void:
        blocks: list = self.blocks_of[key]
        if len(blocks) == 1:
            del self.blocks_of[key]
        else:
            blocks.remove(block)
        self.key_of[block] = None

    @cython.ccall
    def enter(self, block: object, key: object) -> None:
        """Make a full block findable by its content."""
        if self.key_of[block] is None:
            self.key_of[block] = key
            blocks = self.blocks_of.get(key)
            if blocks is None:
                self.blocks_of[key] = [block]
            else:
                blocks.append(block)

    @cython.ccall
    def release(self, blocks: list) -> None:
        """Give back a sequence's blocks (in its order); the last one is the first to be evicted."""
        plain: list = []
        for block in reversed(blocks):
            self.references[block] -= 1
            if self.references[block] == 0:
                if self.key_of[block] is not None:
                    self.free[block] = None
                else:
                    plain.append(block)
        for block in reversed(plain):
            self.free[block] = None
            self.free.move_to_end(block, last=False)
