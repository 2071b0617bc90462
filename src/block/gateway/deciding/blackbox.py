"""An instance that tells nothing: its engine modelled from what the gateway itself sees of its requests.

Theory of operation. Every request that this gateway sends there runs in a modelled engine (`engine.pipeline`) with the
instance's profile and limits, from its dispatch on. What the streams show corrects the model: a request that has
answered more than the model thinks is put where it is, one that the model lets run ahead is held back, one whose answer
ended is aborted, whatever the model thought of it. So the model says what cannot be seen (who waits, how far a prefill
is, how full the cache is) and the streams say what can. A few dozen times a second the result goes to the
instance's evidence as a snapshot, like a predictor's.

Of an answer that is not streamed it knows only the end. Requests that others send to the same engine show in the engine's
own counts, where it has a metrics page, and are played as ghosts (`foreign`); without one, they are not known of.
``sent`` and ``ended`` only take notes; all modelling happens in ``run``, so no failure of it can touch a request.
"""

import asyncio
import logging
import time
from time import monotonic
from typing import Final, Protocol

import aiohttp
import msgspec

from block.engine.limits import EngineLimits
from block.engine.pipeline import Engine
from block.engine.sequence import FINISHED, RUNNING, Sequence
from block.errors import BlockError
from block.gateway.deciding.evidence import Evidence
from block.gateway.deciding.foreign import LOOK_EVERY_S, SHARE_MAX, Foreign
from block.predict.capture import Recorder
from block.predictor.sources.metrics import Figures, read_figures
from block.steptime.profile import StepTimeProfile

TICK_S: Final = 0.02
IDLE_S: Final = 0.25
ASK_EVERY_S: Final = 5.0
PAGE_BYTES_MAX: Final = 8 << 20
AHEAD_MAX: Final = 2
"""Output tokens that the model may be ahead of the stream: what the engine has sampled and is still on its way here."""
MODEL_ERRORS: Final = (BlockError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError)

log = logging.getLogger("block.gateway")


class Progress(Protocol):
    """What can be seen of a request in flight."""

    @property
    def tokens_seen(self) -> int | None:
        """Output tokens that have come; ``None``: cannot be seen."""

    @property
    def prompt_seen(self) -> int | None:
        """Prompt tokens, if the instance has told them."""


class Play:
    """One request there. ``inside``: it is in the modelled engine (a prompt larger than the cache never is)."""

    __slots__ = ("inside", "key", "progress", "sequence")

    def __init__(self, key: int, sequence: Sequence, progress: Progress) -> None:
        self.key, self.sequence, self.progress = key, sequence, progress
        self.inside = False


class BlackBox:
    """The modelled engine of one instance. Fed by dispatch (``sent``, ``ended``); feeds the instance's ``Evidence``."""

    def __init__(
        self, evidence: Evidence, profile: StepTimeProfile, limits: EngineLimits, *, url: str | None,
        watched: str | None = None,
    ) -> None:  # fmt: skip
        """``url``: the instance's, to ask its ``/metrics`` once for the size of its cache; ``None``: do not ask. ``watched``:
        the same, to look there for requests of others again and again."""
        self.evidence, self.profile, self.limits = evidence, profile, limits
        self._url, self._watched = url, watched
        self.foreign = Foreign()
        self._told: Figures | None = None  # what the last look told, until the model has heard of it
        self._asked_s = -ASK_EVERY_S
        self._epoch = time.time_ns()
        self._plays: dict[int, Play] = {}
        self._notes: list[tuple[float, Play, bool]] = []  # (when, who, whether it ended); bounded by requests in flight
        self._exact: set[int] = set()
        self._wake = asyncio.Event()
        self._input_due_s = 0.0
        self._begin(monotonic())
        evidence.take_profile(profile, 1.0)

    def _begin(self, now_s: float) -> None:
        self._epoch += 1
        self._engine = Engine(self.limits, self.profile.curve(1.0, self.limits), now_s)
        self._recorder = Recorder(self._engine, self._epoch)

    # Fed by dispatch

    @property
    def requests(self) -> int:
        return len(self._plays)

    def sent(self, key: int, prompt_tokens: int, max_tokens: int, progress: Progress, *, exact: bool) -> None:
        """A request goes there now."""
        self.ended(key)  # somebody else's of the same id: the engine could not tell them apart either
        now_s = monotonic()
        prompt = max(1, min(prompt_tokens, self.limits.max_model_len - 1))
        most = max(1, min(max_tokens, self.limits.max_model_len - prompt))
        self._plays[key] = play = Play(key, _sequence(key, prompt, most, now_s), progress)
        if exact:
            self._exact.add(key)
        self._notes.append((now_s, play, False))
        self._wake.set()

    def ended(self, key: int) -> None:
        """Its answer is over, or nobody waits for it any more."""
        play = self._plays.pop(key, None)
        if play is not None:
            self._exact.discard(key)
            self._notes.append((monotonic(), play, True))

    # The model

    async def run(self, session: aiohttp.ClientSession) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._play(session))
            if self._watched is not None:
                tasks.create_task(self._watch(session, self._watched))

    async def _play(self, session: aiohttp.ClientSession) -> None:
        while True:
            if self._url is not None and not self._plays and monotonic() - self._asked_s >= ASK_EVERY_S:
                await self._ask(session, self._url)
            self.tick()
            self._wake.clear()
            if self._plays:
                await asyncio.sleep(TICK_S)
                continue
            try:
                async with asyncio.timeout(IDLE_S):
                    await self._wake.wait()
            except TimeoutError:
                pass

    def tick(self) -> None:
        """Bring the model up to now and hand its state to the evidence."""
        now_s = monotonic()
        try:
            self._take_notes(now_s)
            for play in self._plays.values():
                if play.inside:
                    self._correct(play)
            self.foreign.note(len(self._plays), now_s)
            if self._told is not None:
                told, self._told = self._told, None
                self.foreign.take(self._engine, told, now_s)
            exact = self._exact | self.foreign.keys if self.foreign.keys else self._exact
            frame = self._recorder.capture(now_s, time.time() - now_s, exact)
        except MODEL_ERRORS as error:  # a bug, but evidence is never worth a request
            log.exception("the model of %s failed and begins anew", self.evidence.instance)
            self.evidence.lost(f"the model of its engine failed: {error!r}")
            self._begin_again(now_s)
            return
        self.evidence.take_frame(frame, time.time())

    def _take_notes(self, now_s: float) -> None:
        engine, notes = self._engine, self._notes
        self._notes = []
        for at_s, play, over in notes:
            if over:
                engine.advance(at_s)
                if play.inside:
                    engine.abort(play.sequence, at_s)
            elif play.sequence.prompt < self.limits.blocks_usable * self.limits.block_size:
                play.inside = True
                self._input_due_s = max(self._input_due_s, at_s + self.profile.input_s)
                engine.add(play.sequence, self._input_due_s)
        engine.advance(now_s)

    def _correct(self, play: Play) -> None:
        """Move a request that reality shows to be elsewhere than the model thinks."""
        sequence, seen = play.sequence, play.progress.tokens_seen
        told = play.progress.prompt_seen
        if told is not None and told != sequence.prompt and sequence.output:
            self._set_prompt(sequence, told)
        output, most = sequence.output, max(1, sequence.max_tokens - 1)
        behind = seen is not None and seen > 0 and not sequence.placeholders and output < seen
        if seen is not None and (behind or output < seen - 1):
            target = seen
        elif seen is not None and output > seen + AHEAD_MAX:
            target = seen + 1
        elif output > most or sequence.status == FINISHED:
            target = output
        else:
            return
        if sequence.status == FINISHED:  # the model let it end
            play.sequence = sequence = _sequence(play.key, sequence.prompt, sequence.max_tokens, sequence.arrived_s)
        self._engine.place(sequence, max(1, min(target, most)))

    def _set_prompt(self, sequence: Sequence, told: int) -> None:
        if sequence.status != RUNNING or told + sequence.output + 2 >= self.limits.max_model_len:
            return
        sequence.computed += told - sequence.prompt
        sequence.prompt = told

    def _begin_again(self, now_s: float) -> None:
        """An empty engine that gets everything in flight anew."""
        self._begin(now_s)
        self.foreign.forget()
        self._notes = []
        for play in self._plays.values():
            old = play.sequence
            play.sequence = _sequence(play.key, old.prompt, old.max_tokens, old.arrived_s)
            play.inside = False
            self._notes.append((now_s, play, False))

    # The size of the cache

    async def _ask(self, session: aiohttp.ClientSession, url: str) -> None:
        """Read the number and size of the engine's blocks from its metrics; asked again while it does not answer."""
        self._asked_s = monotonic()
        figures = await _look(session, url)
        if figures is None:
            return
        self._url = None
        if figures.num_gpu_blocks is None or figures.num_gpu_blocks < 2:
            log.warning(
                "%s does not tell how many KV blocks it has: %d are assumed, set num_gpu_blocks",
                self.evidence.instance,
                self.limits.num_gpu_blocks,
            )
            return
        block_size = figures.block_size or self.limits.block_size
        self.limits = msgspec.structs.replace(self.limits, num_gpu_blocks=figures.num_gpu_blocks, block_size=block_size)
        self._begin_again(monotonic())

    # Requests of others

    async def _watch(self, session: aiohttp.ClientSession, url: str) -> None:
        """Look how many requests the engine has, as often as that costs it little; until it turns out not to tell."""
        while True:
            began_s = monotonic()
            figures = await _look(session, url)
            if figures is not None:
                if figures.running is None:
                    return
                self._told = figures
                if self.foreign.ghosts or figures.running > len(self._plays):
                    self._wake.set()
            took_s = monotonic() - began_s
            await asyncio.sleep(max(LOOK_EVERY_S, took_s / SHARE_MAX) if figures else ASK_EVERY_S)


async def _look(session: aiohttp.ClientSession, url: str) -> Figures | None:
    """The engine's metrics; ``None``: it does not answer."""
    timeout = aiohttp.ClientTimeout(total=2.0)
    try:
        async with session.get(f"{url}/metrics", timeout=timeout, allow_redirects=False) as answer:
            page = await answer.content.read(PAGE_BYTES_MAX)
            if answer.status >= 500:
                return None
    except (aiohttp.ClientError, OSError, TimeoutError):
        return None
    return read_figures(page.decode("utf-8", "replace"))


def _sequence(key: int, prompt: int, max_tokens: int, arrived_s: float) -> Sequence:
    """One that the model does not end by itself: its answer's end can be seen, and until then it goes on."""
    sequence = Sequence(key, prompt, max_tokens, order=arrived_s, arrived_s=arrived_s)
    sequence.stop_after = 1 << 40
    return sequence
