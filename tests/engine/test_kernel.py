"""The fast kernel makes the decisions and the times of the step-by-step engine, in jumps or not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from block.engine.kernel import FastEngine
from block.engine.limits import EngineLimits
from block.engine.pipeline import Engine
from engine.cases import Arrival, arrivals, curve, plain_limits

FOREVER = 1e9


@st.composite
def streams(draw: st.DrawFn) -> tuple[EngineLimits, list[Arrival]]:
    limits = draw(plain_limits())
    return limits, draw(arrivals(limits))


def stepped(limits: EngineLimits, stream: list[Arrival]) -> tuple[Engine, dict[int, tuple[float, ...]]]:
    engine = Engine(limits, curve())
    sequences = [a.sequence(i) for i, a in enumerate(stream)]
    for sequence in sequences:
        engine.add(sequence, sequence.arrived_s)
    engine.advance(FOREVER)
    return engine, {s.key: (s.scheduled_s, s.first_token_s, s.finished_s, s.preemptions) for s in sequences}


def fast(limits: EngineLimits, stream: list[Arrival], jumping: bool) -> FastEngine:
    engine = FastEngine(limits, curve(), capacity=4)
    engine.jumping = jumping
    for i, a in enumerate(stream):
        engine.add(a.prompt, a.max_tokens, a.stop_after, a.at_s, label=i, priority=a.priority)
    return engine


def collected(engine: FastEngine) -> dict[int, tuple[float, ...]]:
    return {label: times for label, *times in engine.collect()}


def same(model: dict[int, tuple[float, ...]], real: dict[int, tuple[float, ...]]) -> bool:
    return model.keys() == real.keys() and all(model[k] == pytest.approx(real[k], abs=1e-7) for k in real)


@settings(max_examples=150, deadline=None)
@given(streams(), st.booleans())
def test_jumping_and_stepping_equal_the_reference_engine(
    stream: tuple[EngineLimits, list[Arrival]], jumping: bool
) -> None:
    limits, requests = stream
    reference, expected = stepped(limits, requests)
    engine = fast(limits, requests, jumping)
    engine.advance(FOREVER)
    assert same(collected(engine), expected)
    assert engine.preemptions == reference.scheduler.preemptions
    assert engine.steps == reference.steps
    assert engine.load() == (0, 0, 0, limits.blocks_usable)


@settings(max_examples=60, deadline=None)
@given(streams(), st.lists(st.floats(0.001, 0.5), max_size=20))
def test_advancing_in_slices_equals_advancing_at_once(
    stream: tuple[EngineLimits, list[Arrival]], slices: list[float]
) -> None:
    limits, requests = stream
    whole, sliced = fast(limits, requests, True), fast(limits, requests, True)
    whole.advance(FOREVER)
    found, now_s = {}, 0.0
    for slice_s in slices:
        now_s += slice_s
        sliced.advance(now_s)
        found |= collected(sliced)
    sliced.advance(FOREVER)
    assert same(found | collected(sliced), collected(whole))


@settings(max_examples=60, deadline=None)
@given(streams(), st.floats(0.0, 2.0))
def test_a_copy_goes_on_like_its_original_and_leaves_it_alone(
    stream: tuple[EngineLimits, list[Arrival]], at_s: float
) -> None:
    limits, requests = stream
    engine, untouched = fast(limits, requests, True), fast(limits, requests, True)
    engine.advance(at_s)
    untouched.advance(at_s)
    copy = FastEngine(limits, curve(), capacity=2)
    copy.copy_from(engine)
    copy.advance(FOREVER)
    assert engine.load() == untouched.load()
    engine.collect()
    engine.advance(FOREVER)
    assert same(collected(copy), collected(engine))


def test_nothing_is_promised_when_nothing_is_there() -> None:
    engine = FastEngine(EngineLimits(), curve())
    assert engine.next_event_s() == float("inf")
    engine.advance(10.0)
    assert engine.collect() == []


def test_a_request_that_never_fits_blocks_the_queue_but_not_the_clock() -> None:
    limits = EngineLimits(num_gpu_blocks=10, max_model_len=8192)
    engine = FastEngine(limits, curve())
    engine.add(1000, 10, 10, 0.0, label=1)
    engine.add(10, 10, 10, 1.0, label=2)
    engine.advance(100.0)
    assert engine.collect() == []
    assert engine.load()[1] == 2


def test_outlived_beliefs_are_stretched_and_unfulfilled_ones_end_early() -> None:
    engine = FastEngine(EngineLimits(), curve())
    row = engine.add(10, 1000, 500, 0.0, believed=20, label=7)
    engine.advance(1.0)
    rows, generated = engine.live()
    assert rows.tolist() == [row]
    assert generated[0] > 20
    copy = FastEngine(EngineLimits(), curve())
    copy.copy_from(engine, True)
    copy.advance(FOREVER)
    engine.advance(FOREVER)
    assert copy.collect()[0][3] < engine.collect()[0][3]
