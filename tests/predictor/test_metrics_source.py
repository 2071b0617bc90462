"""The coarse source: an engine's Prometheus metrics."""

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from block.core import Request
from block.engine.limits import EngineLimits
from block.errors import ConfigError
from block.predict import snapshot as wire
from block.predict.whatif import predict
from block.predictor.source import open_source
from block.predictor.sources.metrics import Figures, coarse_snapshot, limits_told, read_figures
from block.steptime.profile import load_profile

VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 24.0
vllm:num_requests_waiting{engine="0",model_name="m"} 6.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 6.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:cache_config_info{block_size="32",enable_prefix_caching="True",engine="0",num_gpu_blocks="1001"} 1.0
vllm:num_preemptions_total{engine="0",model_name="m"} 3.0
vllm:request_prompt_tokens_sum{engine="0",model_name="m"} 30000.0
vllm:request_prompt_tokens_count{engine="0",model_name="m"} 100.0
vllm:request_generation_tokens_sum{engine="0",model_name="m"} 20000.0
vllm:request_generation_tokens_count{engine="0",model_name="m"} 100.0
"""
SGLANG = """\
sglang:num_running_reqs{model_name="m",engine_type="unified",tp_rank="0"} 5.0
sglang:num_queue_reqs{model_name="m",engine_type="unified",tp_rank="0"} 1.0
sglang:token_usage{model_name="m",engine_type="unified",tp_rank="0"} 0.25
sglang:max_total_num_tokens{model_name="m",tp_rank="0"} 160000.0
"""


def test_vllms_and_sglangs_names_are_understood() -> None:
    vllm, sglang = read_figures(VLLM), read_figures(SGLANG)
    assert (vllm.running, vllm.waiting, vllm.kv_used, vllm.prompt_tokens, vllm.output_tokens) == (24, 6, 0.5, 300, 200)
    assert (vllm.block_size, vllm.num_gpu_blocks, vllm.prefix_caching) == (32, 1001, True)
    assert (sglang.running, sglang.waiting, sglang.kv_used) == (5, 1, 0.25)
    assert limits_told(EngineLimits(), sglang).num_gpu_blocks == 10_001


def test_data_parallel_ranks_are_summed() -> None:
    figures = read_figures(VLLM + VLLM.replace('engine="0"', 'engine="1"'))
    assert (figures.running, figures.kv_used, figures.num_gpu_blocks) == (48, 0.5, 2002)


@pytest.mark.parametrize("used", [0.0, 0.1, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("running", [0, 1, 24, 500])
def test_the_made_up_requests_agree_with_the_figures(running: int, used: float) -> None:
    limits = EngineLimits(max_num_seqs=256, num_gpu_blocks=1001, block_size=32)
    figures = Figures(running=running, waiting=3, kv_used=used if running else 0.0, prompt_sum=300, prompt_count=1)
    snapshot = wire.decode(coarse_snapshot(figures, limits, taken_s=5.0, sequence=1, epoch=1))
    assert snapshot.running == min(running, 256)
    assert int(snapshot.header["waiting_total"]) == running + 3 - snapshot.running
    assert snapshot.kv_blocks_free >= 0
    assert snapshot.kv_blocks_free + snapshot.requests[wire.BLOCKS].sum() <= limits.blocks_usable
    if running == 24 and used < 1:
        held = 1 - snapshot.kv_blocks_free / limits.blocks_usable
        assert held == pytest.approx(max(used, 24 * 4 / 1000), abs=0.08)  # an answer's own tokens need blocks too
    rows = snapshot.requests
    assert (rows[wire.OUTPUT] < rows[wire.MAX_TOKENS]).all()
    assert (rows[wire.FLAGS] & wire.EXACT).all()
    assert len(np.unique(snapshot.keys)) == len(snapshot.keys)
    assert snapshot.anonymous
    assert snapshot.limits == limits


def test_a_what_if_runs_from_a_coarse_snapshot() -> None:
    limits = limits_told(EngineLimits(), read_figures(VLLM))
    snapshot = wire.decode(coarse_snapshot(read_figures(VLLM), limits, taken_s=5.0, sequence=1, epoch=1))
    request = Request(id="x", arrived_s=5.0, prompt_tokens=200, max_tokens=50)
    found = predict(snapshot, request, output_tokens=50, step_time=load_profile("h200-llama3.1-8b").curve())
    assert 0 < found.ttft_s < found.e2e_s < 60


async def test_an_engine_is_polled_and_its_silence_named() -> None:
    pages = iter([VLLM, "nothing of interest 1\n"])

    async def metrics(_request: web.Request) -> web.Response:
        return web.Response(text=next(pages, ""))

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    async with TestServer(app) as server:
        source = open_source(f"metrics:{server.make_url('/')}#max_num_seqs=64", 0.0)
        assert source.problem is not None
        frames = source.frames()
        snapshot = wire.decode(await anext(frames))
        assert (snapshot.running, snapshot.limits.max_num_seqs) == (24, 64)
        assert source.problem is None
        await frames.aclose()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "text", ["metrics:nowhere", "metrics:http://h:1#speed=3", "metrics:http://h:1#max_num_seqs=many"]
)
def test_a_source_that_makes_no_sense_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(ConfigError):
        open_source(text)
