"""Calibration without a GPU: the plan, the collector, the fit of synchronous engines, and a whole run on the emulator."""

import asyncio
import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from block.engine.limits import EngineLimits
from block.errors import BadInputError, ConfigError
from block.integrations import sweep
from block.integrations.calibrate import calibrate
from block.integrations.steps import StepCollector, write_run
from block.integrations.sweep import Answered, Stage, plan
from block.integrations.synchronous import durations_s, fit_synchronous
from block.predict import snapshot as wire
from block.predictor.source import SharedMemorySource
from block.steptime.curve import StepCurve
from block.steptime.profile import load_profile
from block.steptime.steplog import read_run, read_steps

LIMITS = EngineLimits(
    max_num_seqs=64, max_num_batched_tokens=512, num_gpu_blocks=2000, block_size=16, max_model_len=4096
)


def made_steps(count: int, seed: int, truth: StepCurve, gap_s: float = 0.0005) -> np.ndarray:
    """Steps of a synchronous engine that takes exactly as long as ``truth`` says, with a little noise."""
    chance = np.random.default_rng(seed)
    steps, at_s = np.zeros(count, wire.STEP), 1000.0
    for step in steps:
        decodes = int(chance.integers(1, 64))
        chunk = int(chance.integers(16, 512)) if chance.random() < 0.4 else 0
        context = decodes * int(chance.integers(50, 2000))
        work = chunk * (chance.integers(0, 500) + 0.5 * chunk)
        took_s = truth.gpu_s(decodes, context, chunk, work, int(chunk > 0)) * (1 + 0.01 * chance.standard_normal())
        at_s += gap_s
        step["scheduled_s"], at_s = at_s, at_s + took_s - gap_s
        step["finished_s"] = at_s
        step["decode_requests"], step["context"] = decodes, context
        step["prefill_tokens"], step["prefill_work"], step["chunks"] = chunk, work, int(chunk > 0)
    return steps


@pytest.mark.parametrize("effort", ["gentle", "normal", "thorough"])
@pytest.mark.parametrize(("running", "blocks", "model_len"), [(256, 20_000, 8192), (8, 70, 1024), (1, 40, 512)])
def test_a_plan_fits_its_engine(effort: sweep.Effort, running: int, blocks: int, model_len: int) -> None:
    limits = EngineLimits(max_num_seqs=running, num_gpu_blocks=blocks, max_model_len=model_len)
    stages = plan(limits, effort)
    assert stages
    for stage in stages:
        longest = stage.prompt_tokens[1] + stage.output_tokens[1]
        assert longest <= model_len
        assert stage.concurrency <= running
        assert stage.concurrency * -(-longest // limits.block_size) <= limits.blocks_usable


def test_a_synchronous_engines_step_times_are_found() -> None:
    truth = load_profile("h200-llama3.1-8b").curve()
    profile = fit_synchronous(made_steps(1500, 1, truth), name="x", gpu="g", model="m", source="test")
    found = profile.curve()
    for shape in [(1, 300, 0, 0.0, 0), (32, 32 * 900, 0, 0.0, 0), (8, 8 * 300, 256, 256 * 200.0, 1)]:
        assert found.gpu_s(*shape) == pytest.approx(truth.gpu_s(*shape), rel=0.05)
    assert {e.regime for e in profile.errors} == {"decode", "with prefill"}
    assert all(e.error_p50_fraction < 0.03 for e in profile.errors)


def test_stalls_of_the_host_do_not_bend_the_fit() -> None:
    truth = load_profile("h200-llama3.1-8b").curve()
    steps = made_steps(1500, 2, truth)
    steps["finished_s"][::23] += 0.05
    steps["scheduled_s"][1:] = np.maximum(steps["scheduled_s"][1:], steps["finished_s"][:-1])
    found = fit_synchronous(steps, name="x", gpu="g", model="m", source="test").curve()
    assert found.gpu_s(16, 16 * 500, 0, 0.0, 0) == pytest.approx(truth.gpu_s(16, 16 * 500, 0, 0.0, 0), rel=0.1)


def test_a_pause_before_a_step_is_not_its_time() -> None:
    steps = made_steps(50, 3, load_profile("h200-llama3.1-8b").curve())
    steps["scheduled_s"][25:] += 10.0
    steps["finished_s"][25:] += 10.0
    assert durations_s(steps).max() < 1.0


def test_too_short_a_sweep_says_so() -> None:
    with pytest.raises(BadInputError, match="longer"):
        fit_synchronous(
            made_steps(30, 4, load_profile("h200-llama3.1-8b").curve()), name="x", gpu="g", model="m", source=""
        )


def test_a_step_that_stands_in_several_snapshots_is_kept_once() -> None:
    steps = made_steps(60, 5, load_profile("h200-llama3.1-8b").curve())
    collector = StepCollector(SharedMemorySource("nobody"))
    rows, none = np.zeros((wire.FIELDS, 0), np.int32), np.zeros(0)
    for end in [0, 5, 5, 16, 20, 36, 60]:
        frame = wire.encode(wire.header_of(LIMITS), rows, none.astype(np.uint64), none, steps[max(end - 16, 0) : end])
        collector.take(wire.decode(frame))
    assert len(collector.steps) == 36 + 16  # of the last 24 only 16 are kept by a snapshot
    assert collector.lost == 1 + 1  # 20 to 36 is a whole log too, and cannot be told from a gap
    assert (np.diff(collector.steps["scheduled_s"]) > 0).all()


def test_a_kept_run_is_read_back_with_the_same_sums(tmp_path: Path) -> None:
    steps = made_steps(80, 6, load_profile("h200-llama3.1-8b").curve())
    write_run(tmp_path, steps, [Answered(1000.0, 100, 20, 0.02, 0.3)], LIMITS, gpu="NVIDIA X", model="m")
    run, log = read_run(tmp_path), read_steps(tmp_path / "sweep.steps.csv.gz")
    assert (run.gpu, run.limits) == ("NVIDIA X", LIMITS)
    assert log.decode_requests.tolist() == steps["decode_requests"].tolist()
    assert log.prefill_tokens.tolist() == steps["prefill_tokens"].tolist()
    assert np.allclose(log.prefill_work, steps["prefill_work"], rtol=0.01, atol=600)


@pytest.fixture
def emulated() -> Iterator[tuple[str, str]]:
    """URL and name of an emulated engine whose steps take twice an H200's: a busy host hides few of them."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    program = [sys.executable, "-c", "from block.cli import main; main()", "emulate", "--profile", "h200-llama3.1-8b"]
    arguments = ["--port", "0", "--name", name, "--speed", "0.5", "--max-num-seqs", "32", "--json"]
    with subprocess.Popen([*program, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"], name
        finally:
            process.terminate()
            process.wait(10)


async def test_a_live_engine_is_calibrated(
    emulated: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, name = emulated
    stages = [Stage(f"{n} decode", n, (50, 50), (40, 40)) for n in (1, 4, 16)]
    stages += [Stage(f"prefill {n}", 1, (n, n), (3, 3), rounds=2) for n in (64, 256, 700)]
    stages.append(Stage("mixed", 8, (20, 400), (5, 40), rounds=14))
    monkeypatch.setattr(sweep, "plan", lambda limits, effort: stages)
    found = await calibrate(
        url, "emulated", SharedMemorySource(name, 0.002), effort="gentle", name="x", gpu="g", keep=tmp_path / "run"
    )
    assert found.requests > 27
    assert found.profile.errors
    true = load_profile("h200-llama3.1-8b").curve(2.0, found.limits)
    assert found.profile.curve(1.0, found.limits).gpu_s(8, 8 * 100, 0, 0.0, 0) == pytest.approx(
        true.gpu_s(8, 8 * 100, 0, 0.0, 0), rel=0.2
    )
    assert (tmp_path / "run" / "engine.json").exists()


async def test_an_engine_that_publishes_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("block.integrations.calibrate.FIRST_SNAPSHOT_S", 0.2)
    with pytest.raises(ConfigError, match="no engine publishes as 'nobody'"):
        async with asyncio.timeout(5):
            await calibrate("http://127.0.0.1:9", "m", SharedMemorySource("nobody"), effort="gentle", name="x", gpu="g")
