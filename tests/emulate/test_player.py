"""The player against virtual time: a manual clock, a timer that only notes when it was asked to wake."""

import random

import pytest

from block.clock import ManualClock
from block.emulate.lateness import Lateness
from block.emulate.measures import Measures
from block.emulate.pace import PausableClock
from block.emulate.player import Player
from block.engine.limits import EngineLimits
from block.engine.pipeline import Engine
from block.engine.sequence import Sequence

from .served import PROFILE


class NotedTimer:
    def __init__(self):
        self.at_s = None

    def wake_at(self, monotonic_s):
        self.at_s = monotonic_s

    def close(self):
        pass


class NotedFuture:
    """As much of a future as the player uses."""

    def __init__(self):
        self.error = None

    def done(self):
        return self.error is not None

    def set_exception(self, error):
        self.error = error


class NotedAnswer:
    """Remembers when its tokens came and why it ended."""

    def __init__(self, clock):
        self.clock, self.tokens_s, self.reasons = clock, [], []
        self.done = NotedFuture()

    def token(self, reason):
        self.tokens_s.append(self.clock.now_s())
        self.reasons.append(reason)


class Stage:
    """A player, its clocks and its timer; ``run`` wakes it when it asked to be woken, ``late_s`` after."""

    def __init__(self, limits=None, late_s=0.0, **delays):
        self.wall = ManualClock(100.0)
        self.clock = PausableClock(self.wall)
        self.limits = limits or EngineLimits(max_num_seqs=8, max_num_batched_tokens=256, num_gpu_blocks=64)
        self.engine = Engine(self.limits, PROFILE.curve(1.0, self.limits), self.clock.now_s())
        self.measures = Measures(self.limits.max_model_len)
        self.lateness = Lateness(self.measures.late)
        self.changes = 0
        self.player = Player(self.engine, self.clock, self.measures, self.lateness, self._changed, **delays)
        self.timer = NotedTimer()
        self.player.use_timer(self.timer)
        self.late_s = late_s

    def _changed(self):
        self.changes += 1

    def add(self, key, prompt=20, max_tokens=10, stop_after=None):
        answer = NotedAnswer(self.wall)
        sequence = Sequence(key, prompt, max_tokens, stop_after, arrived_s=self.clock.now_s())
        self.player.add(sequence, answer)
        return sequence, answer

    def run(self, until_s=None, events=100_000):
        for _ in range(events):
            if self.timer.at_s is None or (until_s is not None and self.timer.at_s > until_s):
                break
            self.wall.advance(max(self.timer.at_s + self.late_s - self.wall.now_s(), 0.0))
            self.player.play()
        if until_s is not None and until_s > self.wall.now_s():
            self.wall.advance(until_s - self.wall.now_s())


def alone(limits, arrivals, **delays):
    """(key, due time) of every token when nothing but the engine model runs."""
    engine = Engine(limits, PROFILE.curve(1.0, limits), 100.0)
    for key, at_s, prompt, output in arrivals:
        engine.add(Sequence(key, prompt, output, arrived_s=at_s), at_s + delays.get("input_s", 0.0))
    return [(sequence.key, at_s) for at_s, sequence in engine.advance(1e9)]


def random_arrivals(seed, n=30):
    rng = random.Random(seed)
    at_s, arrivals = 100.0, []
    for key in range(1, n + 1):
        at_s += rng.expovariate(400.0)
        arrivals.append((key, at_s, rng.randint(1, 300), rng.randint(1, 60)))
    return arrivals


def play(stage, arrivals):
    answers = {}
    for key, at_s, prompt, output in arrivals:
        stage.run(until_s=at_s)
        answers[key] = stage.add(key, prompt, output)
    stage.run()
    return answers


@pytest.mark.parametrize("seed", range(3))
def test_every_token_comes_when_the_engine_model_says(seed):
    stage = Stage(input_s=0.0005)
    arrivals = random_arrivals(seed)
    answers = play(stage, arrivals)
    expected = alone(stage.limits, arrivals, input_s=0.0005)
    for key, _, _, output in arrivals:
        due = [at_s for k, at_s in expected if k == key]
        assert answers[key][1].tokens_s == pytest.approx(due, abs=1e-9)
        assert len(due) == output
    assert stage.engine.scheduler.preemptions > 0, "the workload should be hard enough"


def test_a_late_machine_does_not_slow_the_emulated_engine():
    ended_s = []
    for late_s in (0.0, 0.003):
        stage = Stage(late_s=late_s)
        sequences = [stage.add(key, prompt, output)[0] for key, _, prompt, output in random_arrivals(7)]
        stage.run()
        ended_s.append([sequence.finished_s for sequence in sequences])
    assert ended_s[0] == pytest.approx(ended_s[1], abs=1e-9)


def test_a_late_machine_knows_by_how_much():
    punctual, late = Stage(), Stage(late_s=0.02)
    for stage in (punctual, late):
        stage.add(1, max_tokens=50)
        stage.run()
    assert punctual.lateness.summary().max_s == pytest.approx(0, abs=1e-9)
    assert late.lateness.summary().max_s == pytest.approx(0.02)
    assert late.lateness.summary().late_fraction > 0.8
    assert punctual.lateness.summary().late_fraction == 0


def test_tokens_leave_after_the_time_that_the_api_takes():
    plain, slow = Stage(), Stage(output_s=0.01, output_request_s=0.001)
    firsts = []
    for stage in (plain, slow):
        answers = [stage.add(key)[1] for key in (1, 2)]
        stage.run()
        firsts.append([a.tokens_s[0] for a in answers])
    assert firsts[1] == pytest.approx([s + 0.01 + 2 * 0.001 for s in firsts[0]])


def test_the_last_token_says_why_it_is_the_last():
    stage = Stage(EngineLimits(max_num_seqs=8, max_num_batched_tokens=256, num_gpu_blocks=64, max_model_len=100))
    cut = stage.add(1, max_tokens=5)[1]
    ended = stage.add(2, max_tokens=50, stop_after=5)[1]
    full = stage.add(3, prompt=90, max_tokens=10)[1]
    stage.run()
    assert cut.reasons == [None] * 4 + ["length"]
    assert ended.reasons == [None] * 4 + ["stop"]
    assert full.reasons[-1] == "length"
    assert len(full.tokens_s) == 10
    assert stage.player.requests == 0


def test_an_aborted_request_is_gone_at_once_and_hears_nothing_more():
    stage = Stage()
    sequence, answer = stage.add(1, max_tokens=1000)
    stage.run(until_s=100.05)
    heard, changes = len(answer.tokens_s), stage.changes
    assert heard > 0
    stage.player.abort(sequence)
    assert stage.engine.scheduler.blocks_free == stage.limits.blocks_usable
    assert stage.changes == changes + 1
    assert 1 not in stage.player
    stage.run()
    assert len(answer.tokens_s) == heard
    assert stage.measures.finished["abort"] == 1
    assert sequence.finished_s < 0


def test_a_request_aborted_before_the_scheduler_saw_it_is_never_scheduled():
    stage = Stage(input_s=0.01)
    sequence, answer = stage.add(1)
    stage.player.abort(sequence)
    stage.run()
    assert answer.tokens_s == []
    assert stage.engine.steps == 0


def test_the_place_of_an_aborted_request_goes_to_the_next_and_not_before_it_was_free():
    stage = Stage(EngineLimits(max_num_seqs=1, max_num_batched_tokens=256, num_gpu_blocks=64))
    leaving, _ = stage.add(1, max_tokens=500)
    _, waiting = stage.add(2, max_tokens=3)
    stage.run(until_s=100.1)
    assert waiting.tokens_s == []
    aborted_s = stage.wall.now_s()
    stage.player.abort(leaving)
    stage.run()
    assert len(waiting.tokens_s) == 3
    assert waiting.tokens_s[0] > aborted_s


def test_a_hang_moves_everything_after_it_by_its_length():
    hung, smooth = Stage(), Stage()
    answers = [stage.add(1, max_tokens=40)[1] for stage in (hung, smooth)]
    for stage in (hung, smooth):
        stage.run(until_s=100.02)
    hung.player.pause()
    assert hung.timer.at_s is None
    hung.wall.advance(5.0)
    hung.player.play()
    assert len(answers[0].tokens_s) == len(answers[1].tokens_s)
    hung.player.resume()
    for stage in (hung, smooth):
        stage.run()
    moved = [a - b for a, b in zip(answers[0].tokens_s, answers[1].tokens_s, strict=True)]
    assert {round(m, 6) for m in moved} == {0.0, 5.0}


def test_breaking_off_tells_every_answer():
    stage = Stage()
    answers = [stage.add(key)[1] for key in (1, 2, 3)]
    error = RuntimeError("broken")
    assert stage.player.break_all(error) == 3
    assert all(answer.done.error is error for answer in answers)


def test_what_is_measured_adds_up():
    stage = Stage()
    arrivals = random_arrivals(3)
    play(stage, arrivals)
    tokens = sum(output for *_, output in arrivals)
    assert stage.measures.generation_tokens == tokens
    assert stage.measures.prompt_tokens == sum(prompt for _, _, prompt, _ in arrivals)
    assert stage.measures.finished == {"stop": 0, "length": len(arrivals), "abort": 0, "error": 0}


def test_what_was_due_before_an_abort_is_not_moved_by_it():
    stage, other = Stage(), Stage()
    answers = []
    for each in (stage, other):
        leaving, _ = each.add(1, max_tokens=900)
        answers.append(each.add(2, max_tokens=20)[1])
        each.run(until_s=100.01)
        each.wall.advance(0.5)  # the machine slept over many steps
        if each is stage:
            each.player.abort(leaving)
        each.run()
    assert stage.engine.steps < other.engine.steps
    assert answers[0].tokens_s == answers[1].tokens_s
