"""The engine model played in real time: sleeps until its next event, hands each token to the answer that waits for it.

The player's time is a pausable clock under which the engine's virtual time runs. Everything due is computed in one go
and keeps its virtual time, so a machine that is late does not slow the emulated engine: it delivers late and counts
by how much (``Lateness``). A step's tokens leave together, ``output_s`` + ``output_request_s`` a token after its
results are in, and requests reach the scheduler ``input_s`` after they arrive, as the profile measured it.
"""

from collections import deque
from collections.abc import Callable
from itertools import groupby, islice
from operator import itemgetter

from block.emulate.answers import Answer
from block.emulate.lateness import Lateness
from block.emulate.measures import Measures
from block.emulate.pace import PausableClock
from block.emulate.timer import Timer
from block.engine.pipeline import Engine
from block.engine.sequence import FINISHED, Sequence

_time = itemgetter(0)


class Play:
    """A request in play: its sequence, its answer, how many tokens the answer got, when the last one was due."""

    __slots__ = ("answer", "last_s", "sequence", "told")

    def __init__(self, sequence: Sequence, answer: Answer) -> None:
        self.sequence, self.answer = sequence, answer
        self.told = 0
        self.last_s = sequence.arrived_s


class Player:
    """Owns the engine: the only one that adds to it, aborts in it and lets its time pass.

    ``on_change`` is called after the engine's state has changed (to publish it).
    """

    def __init__(
        self, engine: Engine, clock: PausableClock, measures: Measures, lateness: Lateness,
        on_change: Callable[[], None], *, input_s: float = 0.0, output_s: float = 0.0, output_request_s: float = 0.0,
    ) -> None:  # fmt: skip
        self.engine = engine
        self.clock = clock
        self._timer: Timer | None = None
        self._measures, self._lateness, self._on_change = measures, lateness, on_change
        self._input_s, self._output_s, self._output_request_s = input_s, output_s, output_request_s
        self._model_len = engine.limits.max_model_len
        self._playing: dict[int, Play] = {}
        self._deliveries: deque[tuple[float, list[Play]]] = deque()  # (due, whose token), in order
        self._input_due_s = self._due_s = 0.0
        self._steps_counted = 0

    def use_timer(self, timer: Timer) -> None:
        """The timer that calls ``play``; needed before the first request."""
        self._timer = timer

    @property
    def requests(self) -> int:
        return len(self._playing)

    def __contains__(self, key: int) -> bool:
        return key in self._playing

    def add(self, sequence: Sequence, answer: Answer) -> None:
        """Start a request; its ``key`` must not be in play."""
        self._playing[sequence.key] = Play(sequence, answer)
        # A request can be started after one that arrived later; the engine takes them in order.
        self._input_due_s = max(self._input_due_s, sequence.arrived_s + self._input_s)
        self.engine.add(sequence, self._input_due_s)
        self._arm()

    def abort(self, sequence: Sequence) -> None:
        """The client is gone: its blocks are free at once. A sequence that is not in play is ignored."""
        play = self._playing.get(sequence.key)
        if play is None or play.sequence is not sequence:
            return
        del self._playing[sequence.key]
        self.play()  # what was due before it left has happened
        if sequence.status == FINISHED:  # only its last tokens were still on their way out
            return
        self.engine.abort(sequence, self.clock.now_s())
        self._measures.finished["abort"] += 1
        self._on_change()
        self._arm()

    def break_all(self, error: Exception) -> int:
        """End every request in play with an error; returns how many there were."""
        answers = [play.answer for play in self._playing.values()]
        for answer in answers:
            if not answer.done.done():
                answer.done.set_exception(error)
        return len(answers)

    def play(self) -> None:
        """Let everything happen that is due."""
        if self.clock.paused:
            return
        steps = self.engine.steps
        in_flight = len(self.engine.in_flight)
        events = self.engine.advance(self.clock.now_s())
        if events or self.engine.steps != steps or len(self.engine.in_flight) != in_flight:
            self._count_steps()
            self._group(events)
            self._on_change()
        self._deliver()
        self._arm()

    def pause(self) -> None:
        self.clock.pause()
        self._arm()

    def resume(self) -> None:
        self.clock.resume()
        self._arm()

    def _group(self, events: list[tuple[float, Sequence]]) -> None:
        """Put the tokens of each step into one delivery."""
        for at_s, tokens in groupby(events, key=_time):
            batch = [play for _, sequence in tokens if (play := self._playing.get(sequence.key)) is not None]
            self._due_s = max(self._due_s, at_s + self._output_s + self._output_request_s * len(batch))
            self._deliveries.append((self._due_s, batch))

    def _deliver(self) -> None:
        while self._deliveries and self._deliveries[0][0] <= self.clock.now_s():
            due_s, batch = self._deliveries.popleft()
            for play in batch:
                self._tell(play, due_s)
            self._lateness.observe(self.clock.now_s() - due_s)

    def _tell(self, play: Play, at_s: float) -> None:
        measures, sequence = self._measures, play.sequence
        play.told += 1
        measures.generation_tokens += 1
        if play.told > 1:
            measures.gap.observe(at_s - play.last_s)
        else:
            measures.observe_first_token(sequence, at_s - play.last_s)
        play.last_s = at_s
        if sequence.status != FINISHED or play.told < sequence.output:
            play.answer.token(None)
        elif self._playing.pop(sequence.key, None) is play:
            full = sequence.output >= sequence.max_tokens or sequence.prompt + sequence.output >= self._model_len
            reason = "length" if full else "stop"
            measures.observe_finished(sequence, reason)
            play.answer.token(reason)

    def _count_steps(self) -> None:
        engine = self.engine
        finished = engine.steps - len(engine.in_flight)
        fresh = min(finished - self._steps_counted, len(engine.recent))
        self._steps_counted = finished
        for flight, _ in islice(engine.recent, len(engine.recent) - fresh, None):
            self._measures.step_tokens.observe(flight.batch.total_tokens)

    def _arm(self) -> None:
        """Ask to be woken for whatever is next."""
        if self._timer is None:
            return
        times = [
            at_s
            for at_s in (self.engine.next_event_s(), self._deliveries[0][0] if self._deliveries else None)
            if at_s is not None
        ]
        self._timer.wake_at(None if self.clock.paused or not times else self.clock.under_s(min(times)))
