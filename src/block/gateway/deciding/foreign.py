"""What others send to an engine that a gateway models from its own streams: told by the engine's own counts.

Theory of operation. The engine's metrics say how many requests run and wait and how full the cache is, and the gateway knows
how many of those are its own. The rest is *foreign*: another gateway's, or nobody's we know. Each is played in the
modelled engine by a ghost of the mean lengths that the engine's histograms state, made to run or to wait as the counts
say, and sized so that all together hold the blocks that are in use. Between two looks the ghosts live on in the model.

Counts lag: what has just been sent is not in them yet, what has just ended still is. So a foreign request is believed only
where there are more than the gateway has had there at any time in the moments before; with one gateway there are none.
"""

from collections import deque
from typing import Final

from block.engine.pipeline import Engine
from block.engine.sequence import FINISHED, RUNNING, WAITING, Sequence
from block.predictor.sources.metrics import Figures

LAG_S: Final = 0.3
"""How far the engine's counts may be behind."""
LOOK_EVERY_S: Final = 0.5
SHARE_MAX: Final = 0.03
"""Of an engine's time that looking at it may take: an answer costs vLLM 10 to 500 ms."""
GHOSTS_MAX: Final = 4096
_FIRST_KEY: Final = 1 << 63


class Foreign:
    """The ghosts in one modelled engine. ``note`` the gateway's own count as it changes, ``take`` what a look told."""

    def __init__(self) -> None:
        self.ghosts: list[Sequence] = []
        self.keys: set[int] = set()
        """Keys of the ghosts: their lengths are as good as fixed."""
        self._made = 0
        self._own: deque[tuple[float, int]] = deque(maxlen=256)

    def note(self, own: int, now_s: float) -> None:
        """``own`` requests of this gateway are there now."""
        own_n = self._own
        if not own_n or own_n[-1][1] != own:
            own_n.append((now_s, own))
        while len(own_n) > 1 and own_n[1][0] < now_s - LAG_S:
            own_n.popleft()

    def forget(self) -> None:
        """The modelled engine begins anew, empty."""
        self.ghosts, self.keys = [], set()

    def take(self, engine: Engine, figures: Figures, now_s: float) -> None:
        """Make the ghosts agree with what a look at the engine told."""
        running, waiting = round(figures.running or 0), round(figures.waiting or 0)
        own = max((count for _, count in self._own), default=0)
        wanted = min(max(running + waiting - own, 0), GHOSTS_MAX)
        self.ghosts = [g for g in self.ghosts if g.status != FINISHED]
        while len(self.ghosts) > wanted:
            self._remove(engine, running, now_s)
        missing = wanted - len(self.ghosts)
        room = max(running - len(engine.scheduler.running), 0)
        placed = min(missing, room)
        prompt, total = self._lengths(engine, figures, placed)
        for number in range(missing):
            ghost = self._make(prompt if number < placed else round(figures.prompt_tokens), total, now_s)
            engine.add(ghost, now_s)
        engine.advance(now_s)
        self._let_run(engine, room)
        self.keys = {g.key for g in self.ghosts}

    def _make(self, prompt: int, total: int, now_s: float) -> Sequence:
        ghost = Sequence(_FIRST_KEY + self._made, prompt, total, order=now_s, arrived_s=now_s)
        self._made += 1
        self.ghosts.append(ghost)
        return ghost

    def _lengths(self, engine: Engine, figures: Figures, placed: int) -> tuple[int, int]:
        """Prompt and answer of new ghosts: the engine's means, the prompts of those that run such that the blocks fit."""
        limits = engine.limits
        total = max(min(round(figures.output_tokens), limits.max_model_len // 2), 2)
        prompt = max(min(round(figures.prompt_tokens), limits.max_model_len - total - 1), 1)
        if placed and figures.kv_used is not None:
            held = limits.blocks_usable - engine.scheduler.blocks_free
            tokens = (figures.kv_used * limits.blocks_usable - held) * limits.block_size / placed - total / 2
            prompt = round(min(max(tokens, prompt / 2), 2 * prompt))
        return max(min(prompt, limits.max_model_len - total - 1), 1), total

    def _let_run(self, engine: Engine, room: int) -> None:
        """Where more run than the model thinks, ghosts that wait do, spread over their answers."""
        idle = [g for g in self.ghosts if g.status == WAITING][:room]
        for number, ghost in enumerate(idle):
            engine.place(ghost, max(1, round((number + 0.5) / len(idle) * (ghost.max_tokens - 1))))

    def _remove(self, engine: Engine, running: int, now_s: float) -> None:
        """The one nearest its end if the model lets too many run, else the last in the queue."""
        runs = [g for g in self.ghosts if g.status == RUNNING]
        waits = [g for g in self.ghosts if g.status != RUNNING]
        crowded = len(engine.scheduler.running) > running
        leaving = max(runs, key=lambda g: g.output) if runs and (crowded or not waits) else waits[-1]
        self.ghosts.remove(leaving)
        engine.abort(leaving, now_s)
