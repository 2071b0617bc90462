"""A fit gives back the times that made a log, stays physical on measured ones, and says what is wrong with bad input."""

import gzip
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from block.engine.limits import EngineLimits
from block.errors import BadInputError
from block.steptime.delays import Calls, fit_delays
from block.steptime.fit import Subject, fit_profile
from block.steptime.regress import rises
from block.steptime.roofline import arithmetic
from block.steptime.sources import read_measured
from block.steptime.steplog import StepLog, cut, read_run, read_steps
from block.steptime.windows import errors_by_regime, windows
from block.steptime.work import HEAT_MEMORY_S, Samples, fit_work

from .emulated import LIMITS, known_profile, log_of, steps_of

RUN = Path(__file__).parent / "data" / "llama2-7b"
SUBJECT = Subject(name="fitted", gpu="made up", model="made up")


@pytest.fixture(scope="module")
def emulated_log():
    return log_of(steps_of(known_profile()))


@pytest.fixture(scope="module")
def measured():
    return read_measured([RUN])


@pytest.fixture(scope="module")
def measured_profile(measured):
    prior = arithmetic(measured.model_config, measured.gpu, 1)
    return fit_profile(
        measured.logs, Subject(name="l2", gpu=measured.gpu, model=measured.model, prior=prior), calls=measured.calls
    )


def test_a_fit_gives_back_the_step_times_that_made_the_log(emulated_log):
    found, true = (
        fit_profile([(emulated_log, LIMITS)], SUBJECT).curve(limits=LIMITS),
        known_profile().curve(limits=LIMITS),
    )
    for n, context in ((1, 500), (10, 4000), (25, 10_000)):
        assert found.gpu_s(n, context, 0, 0, 0) == pytest.approx(true.gpu_s(n, context, 0, 0, 0), rel=0.02)
    for prefill in (300, 1000, 2000):
        expected = true.gpu_s(30, 10_000, prefill, prefill**2 / 2, 1)
        assert found.gpu_s(30, 10_000, prefill, prefill**2 / 2, 1) == pytest.approx(expected, rel=0.06)
    assert found.launch_s(20, 100, 1) == pytest.approx(true.launch_s(20, 100, 1), rel=0.05)
    assert found.launch_s(20, 1000, 1) == pytest.approx(true.launch_s(20, 1000, 1), rel=0.05)


def test_larger_batches_than_were_seen_grow_as_steps_with_prefill_do(emulated_log):
    assert emulated_log.decode_requests.max() < 50
    found, true = (
        fit_profile([(emulated_log, LIMITS)], SUBJECT).curve(limits=LIMITS),
        known_profile().curve(limits=LIMITS),
    )
    for n in (70, 100, 128):
        assert found.gpu_s(n, 300 * n, 0, 0, 0) == pytest.approx(true.gpu_s(n, 300 * n, 0, 0, 0), rel=0.02)


def test_large_batches_that_were_only_seen_right_after_their_prefill_are_not_taken_for_slower():
    rng = np.random.default_rng(0)
    requests = rng.integers(1, 65, 4000).astype(float)
    context, zero = 500 * requests * rng.uniform(0.5, 1.5, 4000), np.zeros(4000)
    heat = np.where(requests > 32, rng.uniform(1000, 3000, 4000), rng.uniform(0, 1000, 4000))
    seconds = 5e-3 + 12e-6 * requests + 3e-8 * context + 1e-7 * (heat - heat.mean())
    steps = Samples(requests, requests, context, zero, zero, zero, zero, zero, heat, zero.astype(int), seconds)
    found = fit_work(steps, None)
    assert found.g(np.array([64.0]))[0] + 64 * found.request_s == pytest.approx(5e-3 + 64 * 12e-6, rel=0.005)


def test_a_fit_finds_how_much_slower_prefill_without_end_is():
    known = msgspec.structs.replace(known_profile(), heat_s=5e-10, heat_memory_s=HEAT_MEMORY_S)
    logs = [(log_of(steps_of(known, rate_rps=rate)), LIMITS) for rate in (20.0, 200.0)]
    found = fit_profile(logs, SUBJECT).curve(limits=LIMITS)
    true = known.curve(limits=LIMITS)

    def hot(curve):
        return curve.gpu_s(30, 10_000, 2000, 2000**2 / 2, 1, 4000.0) / curve.gpu_s(30, 10_000, 2000, 2000**2 / 2, 1)

    assert hot(true) > 1.07
    assert hot(found) == pytest.approx(hot(true), abs=0.03)


def test_shared_context_is_what_the_blocks_in_use_do_not_account_for():
    limits = EngineLimits(enable_prefix_caching=True, num_gpu_blocks=101, block_size=16)
    one = {name: np.ones(1) for name in ("scheduled_s", "finished_s", "prefill_work")}
    none = {name: np.zeros(1) for name in ("prefill_tokens", "chunks", "prefilled")}
    # Two requests of 20 blocks each, the last one half full, ten blocks in common: 30 of 100 are in use.
    log = StepLog(
        "x",
        decode_requests=np.full(1, 2.0),
        context=np.full(1, 2 * 19.5 * 16 - 2),
        blocks_free=np.full(1, 70.0),
        **one,
        **none,
    )
    assert log.shared(limits)[0] == pytest.approx(160)
    assert log.shared(EngineLimits(num_gpu_blocks=101))[0] == 0
    assert msgspec.structs.replace(log, blocks_free=None).shared(limits)[0] == 0


def test_windows_of_a_log_are_exact_under_the_profile_that_made_it(emulated_log):
    found = list(windows(emulated_log, known_profile(), LIMITS))
    assert len(found) > 100
    assert max(abs(w.modelled_s / w.measured_s - 1) for w in found) < 1e-6


def test_a_slower_profile_shows_as_a_bias_in_every_regime(emulated_log):
    import msgspec

    true = known_profile()
    slower = msgspec.structs.replace(
        true,
        decode_knots=[(n, 1.1 * s) for n, s in true.decode_knots],
        mixed_knots=[(n, 1.1 * s) for n, s in true.mixed_knots],
    )
    for error in errors_by_regime([(emulated_log, LIMITS)], slower):
        assert 0.01 < error.bias_fraction < 0.1


def test_a_measured_run_is_fitted_within_two_per_cent_of_its_windows(measured_profile):
    by_regime = {e.regime: e for e in measured_profile.errors}
    assert abs(by_regime["decode, up to 32 requests"].bias_fraction) < 0.01
    assert by_regime["decode, up to 32 requests"].error_p50_fraction < 0.02
    assert abs(by_regime["with prefill"].bias_fraction) < 0.03


def test_a_measured_fit_is_positive_and_never_falls(measured_profile):
    for knots in (measured_profile.decode_knots, measured_profile.mixed_knots):
        times = [seconds for _, seconds in knots]
        assert min(times) > 0
        assert times == sorted(times)
    for field in ("kv_s", "launch_graph_s", "launch_eager_s", "launch_decode_s", "input_s", "output_s"):
        assert getattr(measured_profile, field) > 0
    assert measured_profile.launch_eager_s > measured_profile.launch_graph_s > measured_profile.launch_decode_s


def test_reading_the_cache_costs_about_what_the_memory_allows(measured_profile):
    bytes_per_token, bandwidth = 2 * 32 * 32 * 128 * 2, 4.8e12
    assert 0.8 < measured_profile.kv_s * bandwidth / bytes_per_token < 1.5


def test_prefills_that_no_step_shows_cost_what_arithmetic_says(measured_profile, measured):
    prior = arithmetic(measured.model_config, measured.gpu, 1)
    curve = measured_profile.curve()
    per_token_s = (curve.gpu_s(0, 0, 8000, 0, 1) - curve.gpu_s(0, 0, 4000, 0, 1)) / 4000
    assert per_token_s == pytest.approx(prior.token_s, rel=0.15)


def test_delays_are_found_where_a_request_wakes_an_idle_engine_and_at_its_end(emulated_log):
    starts = emulated_log.scheduled_s[:1]
    log = cut(emulated_log, 5.0)
    batch = log.decode_requests + log.chunks
    ended = log.finished_s[20:400:7] + 1e-3 + 2e-5 * batch[20:400:7]
    calls = Calls(arrived_s=np.array([starts[0]]), ended_s=ended)
    delays = fit_delays([(log, calls)])
    assert delays.output_s == pytest.approx(1e-3, rel=0.2)
    assert delays.output_request_s == pytest.approx(2e-5, rel=0.3)
    assert delays.input_s == 0.0  # one arrival is too few


def test_rises_make_functions_that_never_fall():
    x, knots = np.linspace(0, 50, 200), np.array([0.0, 10, 20, 40])
    rng = np.random.default_rng(1)
    for _ in range(20):
        assert (np.diff(rises(x, knots) @ rng.random(4)) >= 0).all()


def test_too_few_steps_are_refused_with_a_reason(emulated_log):
    with pytest.raises(BadInputError, match="too few decode-only steps"):
        fit_profile([(cut(emulated_log, 0.1), LIMITS)], SUBJECT)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "missing", "no file or directory"),
        (lambda d: d, "holds no engine.json"),
        (lambda d: (d / "a.csv").write_text("x") and d / "a.csv", "neither a run directory nor a step log"),
        (lambda d: (d / "a.steps.csv.gz").write_bytes(b"no gzip") and d / "a.steps.csv.gz", "holds no engine.json"),
    ],
)
def test_input_that_is_no_run_is_refused_with_a_reason(tmp_path, make, message):
    with pytest.raises(BadInputError, match=message):
        read_measured([make(tmp_path)])


def test_step_logs_alone_are_enough_to_fit(tmp_path):
    for name in ("engine.json", "sweep.steps.csv.gz"):
        shutil.copy(RUN / name, tmp_path)
    for given in (tmp_path, tmp_path / "sweep.steps.csv.gz"):
        measured = read_measured([given])
        assert measured.stages == [f"{tmp_path.name}/sweep"]
        assert not measured.calls


def test_a_broken_step_log_is_named(tmp_path):
    (tmp_path / "a.steps.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(BadInputError, match="not a gzip CSV"):
        read_steps(tmp_path / "a.steps.csv.gz")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0,nan,1,10,", "update_start_s holds nan"),
        ("0,1,1,10,12", "prefill_chunks holds '12'"),
        ("0,1,x,10,", "could not convert"),
    ],
)
def test_a_step_that_is_none_is_named(tmp_path, row, message):
    header = "schedule_start_s,update_start_s,decode_requests,decode_context_tokens,prefill_chunks"
    (tmp_path / "a.steps.csv.gz").write_bytes(gzip.compress(f"{header}\n{row}\n".encode()))
    with pytest.raises(BadInputError, match=message):
        read_steps(tmp_path / "a.steps.csv.gz")


def test_steps_of_the_next_stage_are_left_out():
    run = read_run(RUN)
    log = read_steps(RUN / "sweep.steps.csv.gz")
    assert cut(log, run.durations_s["sweep"]).scheduled_s.max() < run.durations_s["sweep"] <= log.scheduled_s.max() + 1
