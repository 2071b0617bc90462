"""Random engines and request streams, drawn by hypothesis so that a failure shrinks."""

from dataclasses import dataclass

from hypothesis import strategies as st

from block.engine.limits import EngineLimits
from block.engine.pipeline import Engine
from block.engine.sequence import Sequence
from block.steptime.profile import load_profile

MODEL_LEN = 600


@dataclass(frozen=True)
class Arrival:
    at_s: float
    prompt: int
    max_tokens: int
    stop_after: int
    priority: int = 0

    def sequence(self, key: int) -> Sequence:
        return Sequence(
            key, self.prompt, self.max_tokens, self.stop_after, self.priority, order=self.at_s, arrived_s=self.at_s
        )


@st.composite
def plain_limits(draw: st.DrawFn) -> EngineLimits:
    block_size = draw(st.sampled_from([4, 16, 32]))
    return EngineLimits(
        max_num_seqs=draw(st.sampled_from([2, 8, 48])),
        max_num_batched_tokens=draw(st.sampled_from([64, 256, 2048])),
        num_gpu_blocks=draw(st.sampled_from([640, 1600, 6400])) // block_size + 1,
        block_size=block_size,
        max_model_len=MODEL_LEN,
        async_scheduling=draw(st.booleans()),
        enable_chunked_prefill=draw(st.sampled_from([True, True, True, False])),
        watermark=draw(st.sampled_from([0.0, 0.0, 0.02])),
        scheduler_reserve_full_isl=draw(st.sampled_from([True, True, False])),
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        long_prefill_token_threshold=draw(st.sampled_from([0, 0, 7, 48])),
    )


@st.composite
def arrivals(draw: st.DrawFn, limits: EngineLimits, most: int = 60) -> list[Arrival]:
    """Requests that this engine can serve, in order of arrival."""
    rate = draw(st.sampled_from([2.0, 20.0, 200.0, 2000.0]))
    prompt_most = draw(st.sampled_from([5, 50, 300]))
    rows = draw(
        st.lists(
            st.tuples(
                st.floats(0.0, 3.0), st.integers(1, prompt_most), st.integers(1, 200), st.integers(1, 250), st.integers(0, 2)
            ),
            min_size=1, max_size=most,
        )
    )  # fmt: skip
    now_s, found = 0.0, []
    for gap, prompt, max_tokens, stop, priority in rows:
        now_s += gap / rate
        arrival = Arrival(now_s, prompt, min(max_tokens, MODEL_LEN - prompt), stop, priority)
        if servable(limits, arrival):
            found.append(arrival)
    return found


def servable(limits: EngineLimits, arrival: Arrival) -> bool:
    sequence = arrival.sequence(0)
    whole_fits = limits.enable_chunked_prefill or arrival.prompt + sequence.stop_after <= limits.max_num_batched_tokens
    return whole_fits and Engine(limits, curve()).scheduler.can_ever_run(sequence)


def curve():
    return load_profile("h200-llama3.1-8b").curve()
