"""Real vLLM at a GPU's pace: does the engine model foresee it?"""

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from live import BLOCK, REPOSITORY, Program, VllmServer, free_port, wait_healthy
from measure import errors, offer, replayed

from block.predict import snapshot as wire
from block.predictor.shared_memory import SnapshotReader
from block.steptime.profile import StepTimeProfile, load_profile

LIMITS = (
    "--max-model-len",
    "4096",
    "--max-num-seqs",
    "64",
    "--max-num-batched-tokens",
    "1024",
    "--num-gpu-blocks-override",
    "600",
    "--seed",
    "1",
)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the shipped profile, so that both sides use the same."""
    path = tmp_path_factory.mktemp("profile") / "gpu.json"
    path.write_bytes(msgspec.json.encode(load_profile("h200-llama3.1-8b")))
    return path


@pytest.fixture(scope="module")
def server(
    python: Path, large_config: Path, profile: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServer]:
    log = tmp_path_factory.mktemp("emulated") / "server.log"
    started = VllmServer(
        python,
        large_config,
        log,
        name="test-emulated",
        arguments=LIMITS,
        environment={"BLOCK_VLLM_EMULATE": str(profile)},
    )
    try:
        started.wait()
        yield started
    finally:
        started.stop()


def limits_of(server: VllmServer) -> Any:
    frame = SnapshotReader(server.name).read()
    assert frame is not None
    return wire.decode(frame).limits


def test_the_emulated_engine_schedules_as_on_a_gpu(server: VllmServer) -> None:
    limits = limits_of(server)
    assert limits.async_scheduling
    assert limits.enable_chunked_prefill
    assert limits.num_gpu_blocks == 600


@pytest.mark.parametrize("rate_rps", [3.0, 10.0, 18.0])
async def test_the_engine_model_foresees_the_emulated_engine(
    server: VllmServer, profile: Path, rate_rps: float, report: dict[str, Any]
) -> None:
    """The model is given only arrivals and lengths. At 18 requests/s the KV cache is full."""
    outcomes = await offer(
        server.url,
        requests=int(12 * rate_rps),
        rate_rps=rate_rps,
        seed=int(rate_rps),
        prompt=(20, 600),
        output=(10, 250),
    )
    assert [o.error for o in outcomes if o.error] == []
    found = errors(replayed(outcomes, limits_of(server), load_profile(str(profile))), "model")
    report[f"emulated GPU, {rate_rps:g} requests/s"] = found
    assert found["e2e_error_p50"] < 0.10
    assert found["e2e_mean_ratio"] == pytest.approx(1.0, abs=0.12)


async def test_what_each_source_is_worth(
    server: VllmServer, profile: Path, tmp_path: Path, report: dict[str, Any]
) -> None:
    """Predictions at a request's arrival, which know nothing of later ones: from the plugin's state, and from metrics
    alone."""
    shape = "max_num_seqs=64&max_num_batched_tokens=1024&max_model_len=4096&enable_prefix_caching=true"
    sources = {"vllm": f"vllm:{server.name}", "metrics": f"metrics:{server.url}#{shape}"}
    programs, urls = {}, {}
    try:
        for name, source in sources.items():
            port = free_port()
            command = [*BLOCK, "predictor", "--source", source, "--profile", str(profile), "--port", str(port)]
            programs[name], urls[name] = Program(command, tmp_path / f"{name}.log", {}), f"http://127.0.0.1:{port}"
        for name, program in programs.items():
            wait_healthy(program, urls[name], within_s=30)
        for rate_rps in (6.0, 18.0, 32.0):
            outcomes = await offer(
                server.url,
                requests=int(12 * rate_rps),
                rate_rps=rate_rps,
                seed=40,
                prompt=(20, 600),
                output=(10, 250),
                predictors=urls,
            )
            for name in sources:
                found = errors(outcomes, name)
                report[f"source {name}, {rate_rps:g} requests/s"] = found
                assert found["requests"] > 0.9 * len(outcomes)
    finally:
        for program in programs.values():
            program.stop()


def test_calibration_finds_the_emulated_gpus_step_times(
    server: VllmServer, profile: Path, tmp_path: Path, report: dict[str, Any]
) -> None:
    fitted = calibrate(server, tmp_path / "fitted.json")
    true, limits = load_profile(str(profile)).curve(1.0, limits_of(server)), limits_of(server)
    found = fitted.curve(1.0, limits)
    shapes = {
        "decode 1": (1, 300, 0, 0.0, 0),
        "decode 16": (16, 16 * 300, 0, 0.0, 0),
        "prefill 800": (0, 0, 800, 320_000.0, 1),
    }
    ratios = {name: found.gpu_s(*shape) / true.gpu_s(*shape) for name, shape in shapes.items()}
    report["calibrated against emulated GPU, fitted/true"] = {name: round(ratio, 3) for name, ratio in ratios.items()}
    for name, ratio in ratios.items():
        assert ratio == pytest.approx(1.0, abs=0.25), name


def calibrate(server: VllmServer, output: Path, effort: str = "gentle") -> StepTimeProfile:
    """``block calibrate`` against a server with the plugin."""
    arguments = [
        "calibrate",
        server.url,
        "--source",
        f"vllm:{server.name}",
        "-o",
        str(output),
        "--effort",
        effort,
        "--json",
    ]
    result = subprocess.run(
        [*BLOCK, *arguments], capture_output=True, text=True, cwd=REPOSITORY, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return msgspec.json.decode(output.read_bytes(), type=StepTimeProfile)


async def test_an_aborted_request_leaves_the_engine(server: VllmServer) -> None:
    load = asyncio.create_task(
        offer(server.url, requests=4, rate_rps=100, seed=1, prompt=(50, 50), output=(2000, 2000))
    )
    reader = SnapshotReader(server.name)

    async def until(count: int) -> None:
        async with asyncio.timeout(20):
            while True:
                frame = reader.read()
                if frame is not None and wire.decode(frame).running == count:
                    return
                await asyncio.sleep(0.01)

    await until(4)
    load.cancel()
    await asyncio.gather(load, return_exceptions=True)
    await until(0)
