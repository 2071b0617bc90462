"""A step takes longer the more there is in it, and the compiled curve is the documented formula."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from block.engine.limits import EngineLimits
from block.errors import BadInputError, UnknownNameError
from block.steptime.profile import graph_tokens, load_profile, profile_for, profile_names

from .emulated import LIMITS, known_profile

tokens = st.integers(0, 9000)
requests = st.integers(1, 700)


@pytest.mark.parametrize("name", profile_names())
@given(
    n=requests, context=st.integers(0, 2_000_000), prefill=tokens, chunks=st.integers(1, 20), more=st.integers(1, 500)
)
def test_no_shipped_profile_is_faster_with_more_work(name, n, context, prefill, chunks, more):
    curve = load_profile(name).curve()
    decode = curve.gpu_s(n, context, 0, 0, 0)
    assert decode > 0
    # Requests more, each with as much context as the others.
    assert curve.gpu_s(n + more, context * (n + more) / n, 0, 0, 0) >= decode
    assert curve.gpu_s(n, context + more, 0, 0, 0) >= decode
    work = prefill * prefill / 2
    mixed = curve.gpu_s(n, context, prefill, work, chunks)
    assert mixed > 0
    assert curve.gpu_s(n, context, prefill + more, work, chunks) >= mixed
    assert curve.gpu_s(n, context, prefill, work + more, chunks) >= mixed
    assert curve.gpu_s(n, context, prefill, work, chunks + 1) >= mixed


@pytest.mark.parametrize("name", profile_names())
def test_long_prompts_cost_what_their_tokens_cost_beyond_the_last_knot(name):
    curve = load_profile(name).curve()
    at = [curve.gpu_s(0, 0, t, 0, 1) for t in (20_000, 40_000, 60_000)]
    assert at[2] - at[1] == pytest.approx(at[1] - at[0])
    assert at[1] - at[0] > 0.1 * 20e3 * curve.gpu_s(0, 0, 2048, 0, 1) / 2048


@pytest.mark.parametrize("name", profile_names())
def test_a_decoding_request_more_costs_a_good_part_of_a_prefill_token_in_large_batches(name):
    curve = load_profile(name).curve()
    decode_s = curve.gpu_s(1000, 0, 0, 0, 0) - curve.gpu_s(500, 0, 0, 0, 0)
    assert decode_s > 0.5 * (curve.gpu_s(0, 0, 1000, 0, 1) - curve.gpu_s(0, 0, 500, 0, 1))


@given(n=st.integers(1, 300), context=st.integers(0, 10**6), steps=st.integers(1, 1000))
def test_decode_steps_of_one_batch_are_linear_in_the_context(n, context, steps):
    curve = known_profile().curve()
    first = curve.gpu_s(n, context, 0, 0, 0)
    assert curve.gpu_s(n, context + n * steps, 0, 0, 0) == pytest.approx(first + curve.kv_s * n * steps)


def test_a_mixed_step_is_the_documented_sum():
    profile = known_profile()
    base = 6.6e-3 + (512 + 30 - 128) * (46e-3 - 6.6e-3) / (2048 - 128)
    expected = base + 30 * profile.request_s + 9000 * profile.kv_s + 131_072 * profile.attention_s
    assert profile.curve().gpu_s(30, 9000, 512, 131_072, 1) == pytest.approx(expected)


def test_a_scaled_curve_is_slower_in_everything():
    plain, slow = known_profile().curve(), known_profile().curve(1.5)
    assert slow.gpu_s(10, 1000, 300, 45_000, 1) == pytest.approx(1.5 * plain.gpu_s(10, 1000, 300, 45_000, 1))
    assert slow.launch_s(10, 300, 1) == pytest.approx(1.5 * plain.launch_s(10, 300, 1))
    assert slow.head_s == pytest.approx(1.5 * plain.head_s)


def test_steps_beyond_the_captured_cuda_graphs_launch_every_kernel():
    profile = known_profile()
    curve = profile.curve(limits=LIMITS)
    assert graph_tokens(LIMITS) == 256
    assert curve.launch_s(0, 256, 1) == pytest.approx(profile.launch_graph_s + profile.launch_request_s)
    assert curve.launch_s(0, 257, 1) == pytest.approx(profile.launch_eager_s + profile.launch_request_s)
    assert curve.launch_s(20, 0, 0) == pytest.approx(profile.launch_decode_s + 20 * profile.launch_request_s)
    assert graph_tokens(EngineLimits(max_num_seqs=1024, max_num_batched_tokens=4096)) == 512


def test_prefix_caching_adds_its_share_to_every_step():
    profile = load_profile("h200-llama3.1-8b")
    on = profile.curve(limits=EngineLimits(enable_prefix_caching=True))
    off = profile.curve(limits=EngineLimits())
    assert on.gpu_s(8, 4000, 0, 0, 0) - off.gpu_s(8, 4000, 0, 0, 0) == pytest.approx(profile.caching_s)


def test_a_profile_that_does_not_exist_lists_those_that_do():
    with pytest.raises(UnknownNameError, match=r"h200-qwen2-7b"):
        load_profile("h300-llama")
    with pytest.raises(UnknownNameError, match=r"mixtral on NVIDIA H200"):
        profile_for("NVIDIA H200", "mixtral")


def test_a_file_that_is_no_profile_is_told_so(tmp_path):
    (tmp_path / "odd.json").write_text('{"name": "odd"}')
    with pytest.raises(BadInputError, match="not a step-time profile"):
        load_profile(str(tmp_path / "odd.json"))


def test_the_shipped_profile_of_a_gpu_and_model_is_found():
    assert profile_for("NVIDIA H200", "llama2-7b").name == "h200-llama2-7b"


def test_prefill_heats_the_accelerator_and_decoding_is_spared():
    curve = load_profile("h200-llama3.1-8b").curve()
    cold, hot = curve.gpu_s(0, 0, 2000, 0, 1), curve.gpu_s(0, 0, 2000, 0, 1, 4000.0)
    assert 1.02 * cold < hot < 1.3 * cold
    assert curve.gpu_s(32, 16_000, 0, 0, 0, 4000.0) == curve.gpu_s(32, 16_000, 0, 0, 0)
    assert curve.heat_after(4000.0, 0.0) == 4000.0
    assert curve.heat_after(4000.0, 1.0) < 10.0


def test_a_token_of_context_costs_less_in_a_larger_batch_and_least_when_shared():
    curve = load_profile("h200-llama3.1-8b").curve()
    prices = [curve.decode_kv_s(n) for n in (1, 16, 64, 256)]
    assert prices == sorted(prices, reverse=True)
    alone, shared = (curve.gpu_s(32, 64_000, 0, 0, 0, 0.0, s) for s in (0.0, 32_000.0))
    assert 0.8 * alone < shared < alone
