"""Law L8: with the true lengths and the same step times, a what-if equals what then happens."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from block.core import Request
from block.engine.limits import EngineLimits
from block.engine.pipeline import Engine
from block.engine.sequence import FINISHED, Sequence
from block.errors import BadInputError
from block.predict.capture import Recorder
from block.predict.snapshot import MAX_TOKENS, decode, encode, header_of
from block.predict.whatif import Mirror, Oracle, predict, predict_all
from engine.cases import Arrival, arrivals, curve, plain_limits, servable

FOREVER = 1e9
ENDED_IN_FLIGHT_S = 3e-4  # a batch in flight may carry a token of a request that has ended and is in no snapshot


@st.composite
def situations(draw: st.DrawFn) -> tuple[EngineLimits, list[Arrival], float, Arrival]:
    limits = draw(plain_limits())
    stream = draw(arrivals(limits, most=40))
    taken_s = draw(st.floats(0.0, 3.0))
    late = draw(st.sampled_from([0.0, 0.01, 0.1]))
    asked = Arrival(taken_s + late, draw(st.integers(1, 200)), draw(st.integers(1, 150)), draw(st.integers(1, 150)),
                    draw(st.integers(0, 2)))  # fmt: skip
    assume(servable(limits, asked))
    return limits, [a for a in stream if a.at_s <= taken_s], taken_s, asked


@settings(max_examples=200, deadline=None)
@given(situations())
def test_a_what_if_from_a_snapshot_equals_what_then_happens(
    situation: tuple[EngineLimits, list[Arrival], float, Arrival],
) -> None:
    limits, stream, taken_s, asked = situation
    engine = Engine(limits, curve())
    sequences = {i: a.sequence(i) for i, a in enumerate(stream)}
    for sequence in sequences.values():
        engine.add(sequence, sequence.arrived_s)
    engine.advance(taken_s)
    snapshot = decode(Recorder(engine).capture(taken_s))
    mirror = Mirror(engine.curve)
    mirror.load(snapshot, np.array([sequences[int(k)].stop_after for k in snapshot.keys], np.int32))
    present = {int(k) for k in snapshot.keys}
    for key, sequence in sequences.items():
        if key not in present and sequence.status != FINISHED:  # on its way to the queue: the gateway's own ledger
            mirror.add(
                key, sequence.prompt, sequence.max_tokens, sequence.stop_after, sequence.arrived_s, sequence.priority
            )
    prediction = Oracle().predict_all(
        [mirror],
        prompt_tokens=asked.prompt,
        max_tokens=asked.max_tokens,
        output_tokens=asked.stop_after,
        now_s=asked.at_s,
        priority=asked.priority,
    )[0]
    before = earlier = engine.scheduler.preemptions
    sequence = asked.sequence(-1)
    engine.add(sequence, asked.at_s)
    while sequence.status != FINISHED:
        earlier = engine.scheduler.preemptions
        engine.advance(engine.next_event_s())
    happened = (sequence.first_token_s - asked.at_s, sequence.finished_s - asked.at_s)
    assert (prediction.ttft_s, prediction.e2e_s) == pytest.approx(happened, abs=ENDED_IN_FLIGHT_S)
    # At the very moment at which it ends the next step may be scheduled too.
    assert earlier - before <= prediction.preemptions <= engine.scheduler.preemptions - before
    assert not prediction.truncated


def busy_mirror(running: int = 8) -> Mirror:
    engine = Engine(EngineLimits(), curve())
    for i in range(running):
        engine.add(Arrival(0.0, 50, 400, 400).sequence(i), 0.0)
    engine.advance(0.5)
    mirror = Mirror(engine.curve)
    snapshot = decode(Recorder(engine).capture(0.5))
    mirror.load(snapshot, snapshot.requests[MAX_TOKENS])
    return mirror


def test_asking_changes_no_mirror() -> None:
    mirror = busy_mirror()
    asked = {"prompt_tokens": 100, "max_tokens": 100, "output_tokens": 100, "now_s": 0.5}
    assert predict_all([mirror], **asked) == predict_all([mirror], **asked)


def test_a_request_added_since_makes_the_next_one_slower() -> None:
    alone, joined = busy_mirror(), busy_mirror()
    joined.add(99, 2000, 400, 400, 0.5)
    asked = {"prompt_tokens": 100, "max_tokens": 100, "output_tokens": 100, "now_s": 0.5}
    before, after = predict_all([alone, joined], **asked)
    assert after.ttft_s > before.ttft_s


def test_harm_is_what_the_others_lose() -> None:
    empty, busy = busy_mirror(0), busy_mirror(8)
    asked = {"prompt_tokens": 4000, "max_tokens": 100, "output_tokens": 100, "now_s": 0.5, "harm": True}
    alone, among = predict_all([empty, busy], **asked)
    assert alone.harm_s == 0.0
    assert among.harm_s > 0.01


def test_a_horizon_truncates_and_says_so() -> None:
    asked = {"prompt_tokens": 100, "max_tokens": 4000, "output_tokens": 4000, "now_s": 0.5, "horizon_s": 1.0}
    prediction = predict_all([busy_mirror()], **asked)[0]
    assert prediction.truncated
    assert prediction.e2e_s >= 1.0


def test_scenarios_average() -> None:
    asked = {"prompt_tokens": 100, "max_tokens": 1000, "now_s": 0.5}
    short, long, both = (
        predict_all([busy_mirror()], output_tokens=n, **asked)[0].e2e_s for n in (100, 300, [100, 300])
    )
    assert both == pytest.approx((short + long) / 2)


def test_predict_takes_a_snapshot_and_a_request() -> None:
    engine = Engine(EngineLimits(), curve())
    snapshot = decode(Recorder(engine).capture(2.0))
    request = Request(id="a", arrived_s=2.0, prompt_tokens=100, max_tokens=50)
    prediction = predict(snapshot, request, output_tokens=50, step_time=engine.curve)
    assert 0 < prediction.ttft_s < prediction.e2e_s
    assert prediction.queue_delay_s == 0.0


def test_waiting_requests_beyond_the_cap_of_a_snapshot_count() -> None:
    engine = Engine(EngineLimits(max_num_seqs=4), curve())
    for i in range(60):
        engine.add(Arrival(0.0, 50, 100, 100).sequence(i), 0.0)
    engine.advance(0.1)
    whole, capped = (decode(Recorder(engine, waiting_max=most).capture(0.1)) for most in (100, 5))
    assert capped.waiting < whole.waiting
    ttfts = []
    for snapshot in (whole, capped):
        mirror = Mirror(engine.curve)
        mirror.load(snapshot, snapshot.requests[MAX_TOKENS])
        ttfts.append(predict_all([mirror], prompt_tokens=50, max_tokens=10, output_tokens=10, now_s=0.1)[0].ttft_s)
    assert ttfts[1] == pytest.approx(ttfts[0], rel=0.05)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:20], lambda b: b"XXXX" + b[4:], lambda b: b[:-1], lambda b: b[:4] + b"\xff\xff" + b[6:]]
)
def test_a_damaged_snapshot_is_refused_in_one_sentence(damage) -> None:
    engine = Engine(EngineLimits(), curve())
    engine.add(Arrival(0.0, 50, 100, 100).sequence(1), 0.0)
    engine.advance(0.1)
    with pytest.raises(BadInputError):
        decode(damage(Recorder(engine).capture(0.1)))


def test_limits_survive_the_wire() -> None:
    limits = EngineLimits(
        max_num_seqs=7,
        block_size=32,
        policy="priority",
        async_scheduling=False,
        watermark=0.05,
        enable_prefix_caching=True,
    )
    header = header_of(limits)
    empty = np.zeros((12, 0), np.int32)
    assert decode(encode(header, empty, np.zeros(0, np.uint64), np.zeros(0))).limits == limits


def test_each_instance_of_a_batch_has_its_own_way_in_and_out() -> None:
    near, far, asked = (
        busy_mirror(),
        busy_mirror(),
        {"prompt_tokens": 100, "max_tokens": 50, "output_tokens": 50, "now_s": 0.1},
    )
    far.input_s, far.output_s = 0.5, 0.25
    quick, slow = predict_all([near, far], **asked)
    assert (quick, slow) == (*predict_all([near], **asked), *predict_all([far], **asked))
    assert slow.ttft_s > quick.ttft_s + 0.25
    assert slow.queue_delay_s >= 0.5


def test_a_mirror_without_a_snapshot_is_refused() -> None:
    mirror = busy_mirror()
    with pytest.raises(ValueError, match="loaded"):
        predict_all([mirror, Mirror(mirror.curve)], prompt_tokens=10, max_tokens=5, output_tokens=5, now_s=0.1)


def test_what_requests_share_is_read_once_and_held_once() -> None:
    """Twelve requests behind one long prompt: steps are faster and memory is emptier than their contexts say."""
    limits = EngineLimits(enable_prefix_caching=True, num_gpu_blocks=700)
    common = [("system prompt", block) for block in range(120)]
    engine = Engine(limits, curve())
    sequences = {i: Sequence(i, 2000, 300 + 10 * i, block_keys=common, arrived_s=0.2 * i) for i in range(12)}
    for sequence in sequences.values():
        engine.add(sequence, sequence.arrived_s)
    engine.advance(3.0)
    snapshot = decode(Recorder(engine).capture(3.0))
    assert snapshot.shared_tokens == 16 * 120 * (snapshot.running - 1)
    mirror = Mirror(engine.curve)
    mirror.load(snapshot, np.array([sequences[int(key)].stop_after for key in snapshot.keys], np.int32))
    asked = Arrival(3.0, 900, 200, 200)
    prediction = predict_all([mirror], prompt_tokens=900, max_tokens=200, output_tokens=200, now_s=3.0)[0]
    sequence = asked.sequence(-1)
    engine.add(sequence, 3.0)
    while sequence.status != FINISHED:
        engine.advance(engine.next_event_s())
    assert engine.scheduler.preemptions == prediction.preemptions == 0
    assert prediction.e2e_s == pytest.approx(sequence.finished_s - 3.0, rel=0.005)
    assert mirror.engine is not None
    mirror.engine.advance(FOREVER)
    assert mirror.engine.load() == (0, 0, 0, limits.blocks_usable)


def test_a_prefix_that_running_requests_hold_takes_no_memory_again() -> None:
    limits = EngineLimits(enable_prefix_caching=True, num_gpu_blocks=260)
    common = [("system prompt", block) for block in range(120)]
    engine = Engine(limits, curve())
    for i in range(4):
        engine.add(Sequence(i, 2000, 200, block_keys=common), 0.2 * i)
    engine.advance(1.0)
    snapshot = decode(Recorder(engine).capture(1.0))
    assert snapshot.kv_blocks_free < 120
    mirror = Mirror(engine.curve)
    mirror.load(snapshot, snapshot.requests[MAX_TOKENS])
    asked = {"prompt_tokens": 2000, "max_tokens": 50, "output_tokens": 50, "now_s": 1.0}
    alike, unlike = (
        Oracle().predict_all([mirror], hits=np.array([hit], np.int32), **asked)[0] for hit in (16 * 120, 0)
    )
    sequence = Sequence(-1, 2000, 50, block_keys=common)
    engine.add(sequence, 1.0)
    while sequence.status != FINISHED:
        engine.advance(engine.next_event_s())
    assert alike.ttft_s == pytest.approx(sequence.first_token_s - 1.0, rel=0.02)
    assert unlike.ttft_s > 3 * alike.ttft_s
