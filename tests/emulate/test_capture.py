"""Snapshots of the engine model against the engine model itself."""

import random

import numpy as np
import pytest

from block.engine.limits import EngineLimits
from block.engine.pipeline import Engine
from block.engine.sequence import Sequence
from block.predict import snapshot as s
from block.predict.capture import Recorder, cached_keys, size_max

from .served import PROFILE

SMALL = EngineLimits(max_num_seqs=8, max_num_batched_tokens=128, num_gpu_blocks=40)


def engine_under_load(seed, limits=SMALL, n=40):
    rng = random.Random(seed)
    engine = Engine(limits, PROFILE.curve(1.0, limits))
    at_s = 0.0
    for key in range(1, n + 1):
        at_s += rng.expovariate(300.0)
        engine.add(Sequence(key, rng.randint(1, 200), rng.randint(1, 60), rng.randint(1, 60), arrived_s=at_s), at_s)
    return engine, rng


def moments(seed, limits=SMALL):
    """An engine at many moments of a run, until it is idle."""
    engine, rng = engine_under_load(seed, limits)
    now_s = 0.0
    while engine.next_event_s() is not None:
        now_s += rng.expovariate(1000.0)
        engine.advance(now_s)
        yield engine, now_s


@pytest.mark.parametrize("limits", [SMALL, EngineLimits(max_num_seqs=8, max_num_batched_tokens=128, num_gpu_blocks=40,
                                                        async_scheduling=False)])  # fmt: skip
def test_a_snapshot_says_what_the_scheduler_holds(limits):
    preempted = 0
    recorders = {}
    for engine, now_s in moments(5, limits):
        recorder = recorders.setdefault(id(engine), Recorder(engine, epoch=9))
        found = s.decode(recorder.capture(now_s, 1000.0, {3, 4}))
        sequences = [*engine.scheduler.running, *engine.scheduler.waiting]
        assert found.running == len(engine.scheduler.running)
        assert found.keys.tolist() == [q.key for q in sequences]
        for row, field in ((s.PROMPT, "prompt"), (s.MAX_TOKENS, "max_tokens"), (s.COMPUTED, "computed"), (s.OUTPUT, "output"),
                           (s.PLACEHOLDERS, "placeholders"), (s.STALE, "stale"), (s.BLOCKS, "blocks"),
                           (s.PRIORITY, "priority"), (s.PREEMPTIONS, "preemptions")):  # fmt: skip
            assert found.requests[row].tolist() == [getattr(q, field) for q in sequences]
        in_flight = found.requests[s.BATCH_1] + found.requests[s.BATCH_2]
        assert in_flight.tolist() == [q.in_flight for q in sequences]
        assert ((found.requests[s.FLAGS] & s.EXACT) > 0).tolist() == [q.key in (3, 4) for q in sequences]
        assert found.arrived.tolist() == pytest.approx([q.arrived_s + 1000.0 for q in sequences])
        assert found.kv_blocks_free == engine.scheduler.blocks_free
        assert found.limits == limits
        assert (found.taken_s, found.epoch) == (now_s + 1000.0, 9)
        assert int(found.header["batches_in_flight"]) == len(engine.in_flight) <= (2 if limits.async_scheduling else 1)
        preempted = int(found.header["preemptions_total"])
    assert preempted > 0, "the workload should be hard enough"


def test_samples_flags_say_which_batch_in_flight_brings_a_token():
    promised = outputs = 0
    for engine, now_s in moments(6):
        found = s.decode(Recorder(engine).capture(now_s))
        flags = found.requests[s.FLAGS]
        samples = ((flags & s.SAMPLES_1) > 0).astype(int) + ((flags & s.SAMPLES_2) > 0)
        stale = found.requests[s.STALE] > 0
        assert (samples[~stale] == found.requests[s.PLACEHOLDERS][~stale]).all()
        assert (found.requests[s.BATCH_1][(flags & s.SAMPLES_1) > 0] > 0).all()
        promised, outputs = promised + samples.sum(), outputs + len(flags)
    assert promised > 0
    assert outputs > 0


def test_the_step_log_is_the_last_finished_steps_in_order():
    recorder, logged, finished = None, {}, 0
    for engine, now_s in moments(7):
        recorder = recorder or Recorder(engine)
        found = s.decode(recorder.capture(now_s, 50.0))
        finished = engine.steps - len(engine.in_flight)
        assert len(found.steps) == min(finished, 16)
        assert (np.diff(found.steps["finished_s"]) >= 0).all()
        for i, row in enumerate(found.steps.tolist()):
            number = finished - len(found.steps) + i
            assert logged.setdefault(number, row) == row
    assert len(logged) == finished
    assert all(scheduled < ended <= now_s + 50.0 for scheduled, ended, *_ in logged.values())


def test_sequence_numbers_grow():
    engine, _ = engine_under_load(1)
    recorder = Recorder(engine)
    numbers = [s.decode(recorder.capture(0.0)).sequence for _ in range(5)]
    assert numbers == sorted(set(numbers))


def test_nothing_in_a_snapshot_depends_on_the_true_lengths():
    """Law L7: two engines whose requests stop at different times are told apart only once one has stopped."""
    frames = []
    for true_length in (500, 900):
        engine = Engine(SMALL, PROFILE.curve())
        for key in range(1, 4):
            engine.add(Sequence(key, 30, 1000, true_length, arrived_s=0.0), 0.0)
        recorder = Recorder(engine)
        captured = []
        for i in range(1, 20):
            engine.advance(i * 0.005)
            captured.append(recorder.capture(i * 0.005))
        frames.append(captured)
        assert max(q.output for q in engine.scheduler.running) > 10
    assert frames[0] == frames[1]


def test_waiting_requests_beyond_the_cap_are_a_count_and_a_sum():
    engine = Engine(SMALL, PROFILE.curve())
    for key in range(1, 31):
        engine.add(Sequence(key, 10 + key, 50), 0.0)
    engine.advance(0.0005)
    engine.advance(0.004)
    waiting = [q.prompt for q in engine.scheduler.waiting]
    found = s.decode(Recorder(engine, waiting_max=5).capture(0.004))
    assert found.waiting == 5
    assert int(found.header["waiting_total"]) == len(waiting) > 5
    assert int(found.header["waiting_tokens_beyond"]) == sum(waiting[5:])


def test_the_largest_snapshot_fits_the_stated_size():
    engine = Engine(SMALL, PROFILE.curve())
    for key in range(1, 400):
        engine.add(Sequence(key, 2, 30), 0.0)
    engine.advance(0.1)
    assert len(engine.scheduler.running) == SMALL.max_num_seqs
    assert len(Recorder(engine).capture(0.1)) == size_max(SMALL)


def test_the_prefix_caches_contents_can_be_put_in():
    limits = EngineLimits(num_gpu_blocks=40, enable_prefix_caching=True)
    engine = Engine(limits, PROFILE.curve(1.0, limits))
    engine.add(Sequence(1, 64, 8, block_keys=[11, 12, 13, 14]), 0.0)
    engine.advance(1.0)
    keys = cached_keys(engine)
    assert set(keys.tolist()) >= {11, 12, 13, 14}
    found = s.decode(Recorder(engine).capture(1.0, cached_blocks=keys))
    assert found.cached_blocks.tolist() == keys.tolist()
    assert cached_keys(Engine(SMALL, PROFILE.curve())) is None


def test_a_key_of_64_bits_survives():
    engine = Engine(SMALL, PROFILE.curve())
    engine.add(Sequence(2**64 - 1, 4, 4), 0.0)
    engine.advance(0.0)
    assert s.decode(Recorder(engine).capture(0.0)).keys.tolist() == [2**64 - 1]
