"""Laws L1-L5 of the engine model, in every mode of the scheduler."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from block.engine.limits import EngineLimits
from block.engine.pipeline import Engine
from block.engine.scheduler import Scheduler
from block.engine.sequence import FINISHED, PREEMPTED, RUNNING, WAITING, Sequence
from engine.cases import curve

MODEL_LEN = 400


@st.composite
def any_limits(draw: st.DrawFn) -> EngineLimits:
    block_size = draw(st.sampled_from([4, 16]))
    return EngineLimits(
        max_num_seqs=draw(st.sampled_from([2, 8, 32])),
        max_num_batched_tokens=draw(st.sampled_from([64, 512])),
        num_gpu_blocks=draw(st.sampled_from([432, 1600])) // block_size + 1,
        block_size=block_size,
        max_model_len=MODEL_LEN,
        async_scheduling=draw(st.booleans()),
        enable_prefix_caching=draw(st.booleans()),
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        long_prefill_token_threshold=draw(st.sampled_from([0, 0, 24])),
        watermark=draw(st.sampled_from([0.0, 0.02])),
        scheduler_reserve_full_isl=draw(st.booleans()),
    )


requests = st.lists(
    st.tuples(
        st.floats(0.0, 0.05),
        st.integers(1, 250),
        st.integers(1, 120),
        st.integers(1, 150),
        st.integers(0, 2),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=50,
)


def offered(limits: EngineLimits, rows: list[tuple[float, int, int, int, int, int]]) -> list[Sequence]:
    """Sequences in order of arrival; those of one group share their first blocks' content."""
    now_s, found = 0.0, []
    for i, (gap_s, prompt, max_tokens, stop, priority, group) in enumerate(rows):
        now_s += gap_s
        shared = [(group, b) for b in range(min(5, prompt // limits.block_size))] if group else None
        sequence = Sequence(
            i, prompt, max_tokens, stop, priority=priority, order=float(i), block_keys=shared, arrived_s=now_s
        )
        if Engine(limits, curve()).scheduler.can_ever_run(sequence):
            found.append(sequence)
    return found


@settings(max_examples=120, deadline=None)
@given(any_limits(), requests)
def test_the_laws_hold_at_every_event(limits: EngineLimits, rows: list[tuple[float, int, int, int, int, int]]) -> None:
    engine = Engine(limits, curve())
    sequences = offered(limits, rows)
    for sequence in sequences:
        engine.add(sequence, sequence.arrived_s)
    last_s, events = 0.0, 0
    while (at_s := engine.next_event_s()) is not None:
        assert at_s >= last_s, "time goes back (L3)"
        engine.advance(at_s)
        conserved(engine, sequences)
        last_s = at_s
        events += 1
        assert events < 200_000, "no progress (L5)"
    for sequence in sequences:
        assert sequence.status == FINISHED
        assert sequence.output == min(sequence.stop_after, limits.max_model_len - sequence.prompt)
        assert sequence.arrived_s <= sequence.scheduled_s <= sequence.first_token_s <= sequence.finished_s
    assert engine.scheduler.blocks_free == limits.blocks_usable


def conserved(engine: Engine, sequences: list[Sequence]) -> None:
    scheduler = engine.scheduler
    running, waiting = list(scheduler.running), list(scheduler.waiting)
    assert all(s.status == RUNNING for s in running)
    assert all(s.status in (WAITING, PREEMPTED) for s in waiting)
    assert not {s.key for s in running} & {s.key for s in waiting}
    assert len(running) <= engine.limits.max_num_seqs
    held = {b for s in running for b in s.block_ids} if engine.limits.enable_prefix_caching else None
    used = len(held) if held is not None else sum(s.blocks for s in running)
    assert used + scheduler.blocks_free == engine.limits.blocks_usable, "blocks leak (L2)"
    assert all(s.blocks == 0 for s in waiting)
    for s in running:
        assert s.blocks >= -(-min(s.computed, engine.limits.max_model_len) // engine.limits.block_size)


@settings(max_examples=40, deadline=None)
@given(any_limits(), requests)
def test_an_aborted_request_leaves_nothing_behind(
    limits: EngineLimits, rows: list[tuple[float, int, int, int, int, int]]
) -> None:
    engine = Engine(limits, curve())
    sequences = offered(limits, rows)
    for sequence in sequences:
        engine.add(sequence, sequence.arrived_s)
    engine.advance(0.3)
    for sequence in sequences[::2]:
        engine.abort(sequence)
    engine.advance(1e9)
    assert all(s.status == FINISHED for s in sequences)
    assert engine.scheduler.blocks_free == limits.blocks_usable


@pytest.mark.parametrize("prompt", range(200, 216))
def test_a_step_that_only_preempts_is_followed_by_one_that_computes(prompt: int) -> None:
    """The least important request gives way itself, before the others' turn came."""
    limits = EngineLimits(
        max_num_seqs=2, max_num_batched_tokens=64, num_gpu_blocks=109, block_size=4, max_model_len=400, policy="priority",
        async_scheduling=False,
    )  # fmt: skip
    engine = Engine(limits, curve())
    humble = Sequence("humble", prompt, 120, 120, priority=1, order=0.0)
    grand = Sequence("grand", 200, 120, 120, priority=0, order=1.0, arrived_s=0.05)
    for sequence in (humble, grand):
        engine.add(sequence, sequence.arrived_s)
    engine.advance(1e9)
    assert (humble.status, grand.status) == (FINISHED, FINISHED)
    assert humble.preemptions > 0


@settings(max_examples=60, deadline=None)
@given(any_limits(), requests)
def test_if_something_waits_and_fits_a_step_happens(
    limits: EngineLimits, rows: list[tuple[float, int, int, int, int, int]]
) -> None:
    engine = Engine(limits, curve())
    for sequence in offered(limits, rows):
        engine.scheduler.add(sequence)
    while engine.scheduler.has_requests:
        batch = engine.scheduler.schedule()
        assert batch.total_tokens > 0, "an idle engine with work that fits (L4)"
        assert batch.total_tokens <= limits.max_num_batched_tokens
        engine.scheduler.update(batch)


def test_a_batch_tells_how_much_its_requests_share() -> None:
    limits = EngineLimits(enable_prefix_caching=True, block_size=16, num_gpu_blocks=200)
    scheduler = Scheduler(limits)
    common = [("system", i) for i in range(10)]
    for key in range(3):
        scheduler.add(Sequence(key, 200, 20, block_keys=common))
        scheduler.update(scheduler.schedule())
    batch = scheduler.schedule()
    assert batch.decode_requests == 3
    assert batch.shared == 2 * 160
