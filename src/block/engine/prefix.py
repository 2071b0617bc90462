"""Which prompt blocks an engine still holds: references, and who is evicted first. The fast engine's prefix cache.

The same rules as `block.engine.blocks.PrefixPool`, at the grain of a workload's content keys (one key stands for ``tokens``
tokens of a prompt and for all before them) and without identities of memory blocks: the engine counts free blocks, of
which the idle cached ones are a part. When memory for something else is needed, those idle for longest go first, a
chain's end before its beginning. What requests generate is not kept.

Chunks that several requests use are charged to one of them, the *owner*; the others *borrow* them. When an owner ends, the
next borrower becomes the owner (`release` says so), so that what is charged is always what is in use.
"""

from collections import OrderedDict
from collections.abc import Sequence

Keys = tuple[int, ...]


class PrefixCache:
    """The prompt chunks of one engine, each ``chunk_blocks`` KV blocks. The engine and whoever adds requests to it write it.

    ``version`` changes whenever a look-up may answer otherwise than before.
    """

    __slots__ = ("_chains", "_due", "_idle", "_pending", "_used", "_users", "chunk_blocks", "tokens", "version")

    def __init__(self, tokens: int, block_size: int) -> None:
        if tokens < block_size or tokens % block_size:
            raise ValueError(f"content keys of {tokens} tokens do not fit blocks of {block_size}")
        self.tokens = tokens
        self.chunk_blocks = tokens // block_size
        self.version = 0
        self._users: dict[int, list[int]] = {}  # key -> rows, the owner first
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached and used by nobody, the next to be evicted first
        self._chains: dict[
            int, tuple[Keys, int]
        ] = {}  # row -> its prompt's whole chunks, how many of them may be found
        self._due: set[int] = set()  # rows whose prompt is not computed yet
        self._used: dict[int, list[int]] = {}  # row -> keys that it owns or borrows
        self._pending: dict[int, int] = {}  # key -> requests present that will have computed it

    def __len__(self) -> int:
        """Chunks held."""
        return len(self._users) + len(self._idle)

    # ---- asked by gateways

    def match_tokens(self, keys: Keys, prompt_tokens: int) -> int:
        """Tokens of a prompt that a request coming now would find: held, or about to be computed by those before it."""
        count, users, idle, pending = 0, self._users, self._idle, self._pending
        for key in keys[: (prompt_tokens - 1) // self.tokens]:
            if key not in users and key not in idle and key not in pending:
                break
            count += 1
        return count * self.tokens

    # ---- a request's way through the engine

    def expect(self, row: int, keys: Keys, prompt_tokens: int) -> None:
        """A request was added; the last token of a prompt is always computed, so not all of it can be found."""
        self._chains[row] = (keys[: prompt_tokens // self.tokens], (prompt_tokens - 1) // self.tokens)
        self._due.add(row)
        for key in self._chains[row][0]:
            self._pending[key] = self._pending.get(key, 0) + 1

    def look(self, row: int) -> tuple[int, int]:
        """(tokens that it would find now, blocks of them that others use)."""
        chain = self._chains.get(row)
        if chain is None:
            return 0, 0
        found = borrowed = 0
        users, idle = self._users, self._idle
        for key in chain[0][: chain[1]]:
            if key in users:
                borrowed += 1
            elif key not in idle:
                break
            found += 1
        return found * self.tokens, borrowed * self.chunk_blocks

    def admit(self, row: int, hit_tokens: int) -> None:
        """It starts to run, using the chunks that were found."""
        if row not in self._chains:
            return
        used = self._used.setdefault(row, [])
        for key in self._chains[row][0][: hit_tokens // self.tokens]:
            if key in self._users:
                self._users[key].append(row)
            else:
                del self._idle[key]
                self._users[key] = [row]
            used.append(key)

    def complete(self, row: int) -> None:
        """Its prompt is computed: what was not held before can be found from now on."""
        chain = self._chains.get(row)
        if chain is None:
            return
        used = self._used.setdefault(row, [])
        for key in chain[0][len(used) :]:
            if key not in self._users and key not in self._idle:
                self._users[key] = [row]
                used.append(key)
        self._settle(row)
        self.version += 1

    def release(self, row: int, *, over: bool) -> Sequence[tuple[int, int]]:
        """It gives back its blocks (``over``: for good, else it was preempted). Returns who owns what instead of it:
        (row, blocks)."""
        heirs: dict[int, int] = {}
        for key in reversed(self._used.pop(row, ())):
            rows = self._users[key]
            owner = rows[0]
            rows.remove(row)
            if not rows:
                del self._users[key]
                self._idle[key] = None
            elif owner == row:
                heirs[rows[0]] = heirs.get(rows[0], 0) + self.chunk_blocks
        if over:
            self._settle(row)
            self._chains.pop(row, None)
        self.version += 1
        return tuple(heirs.items())

    def fit(self, free_blocks: int) -> None:
        """Evict until the idle chunks are no more than the free blocks."""
        most = free_blocks // self.chunk_blocks
        while len(self._idle) > most:
            self._idle.popitem(last=False)
            self.version += 1

    def _settle(self, row: int) -> None:
        """Its prompt is no longer about to be computed."""
        if row not in self._due:
            return
        self._due.remove(row)
        pending = self._pending
        for key in self._chains[row][0]:
            left = pending.get(key, 0) - 1
            if left > 0:
                pending[key] = left
            else:
                pending.pop(key, None)
