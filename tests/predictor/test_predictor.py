"""The predictor beside an emulated engine, over real HTTP."""

import asyncio
import contextlib
import struct
import time
from types import SimpleNamespace

import aiohttp
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from block.engine.limits import EngineLimits
from block.engine.pipeline import Engine
from block.engine.sequence import Sequence
from block.predict.capture import Recorder
from block.predict.snapshot import decode, request_key
from block.predict.whatif import Mirror, predict_all
from block.predictor.program import run_predictor
from block.predictor.selftest import self_test
from block.predictor.serving import bind, url_of
from block.predictor.shared_memory import SnapshotWriter
from block.predictor.source import open_source
from block.predictor.state import InstanceState, Question
from block.steptime.calibrate import Calibration
from block.steptime.profile import StepTimeProfile

from .profile import PROFILE

API_S = PROFILE.input_s + PROFILE.output_s + PROFILE.output_request_s  # not the accelerator's: no scale changes it


@contextlib.asynccontextmanager
async def predicting(name, **options):
    """An HTTP session with the predictor of the engine ``name``."""
    ready, stop = asyncio.Event(), asyncio.Event()
    with bind("127.0.0.1", 0) as bound:
        source = open_source(f"emulate:{name}", options.pop("poll_s", 0.001))
        task = asyncio.create_task(run_predictor(source, PROFILE, bound, ready.set, stop=stop, **options))
        await ready.wait()
        try:
            async with aiohttp.ClientSession(url_of(bound)) as http:
                yield http
        finally:
            stop.set()
            await task


class PlayedEngine:
    """An engine whose snapshots the test publishes by hand."""

    def __init__(self, name, limits=None, epoch=1):
        self.limits = limits or EngineLimits()
        self.engine = Engine(self.limits, PROFILE.curve(1.0, self.limits))
        self.recorder = Recorder(self.engine, epoch)
        self.writer = SnapshotWriter(name)
        self.now_s = 0.0

    def add(self, name, prompt=100, max_tokens=200, stop_after=None):
        self.engine.add(Sequence(request_key(name), prompt, max_tokens, stop_after), self.now_s)

    def publish(self, age_s=0.0, exact=frozenset()):
        """Publish the present state as one that is ``age_s`` old; returns the bytes."""
        frame = self.recorder.capture(self.now_s, time.time() - age_s - self.now_s, exact)
        self.writer.write(frame)
        return frame

    def advance(self, seconds):
        self.now_s += seconds
        self.engine.advance(self.now_s)


@pytest.fixture
def engine(shm_name):
    played = PlayedEngine(shm_name)
    yield played
    played.writer.close()


async def until(condition, tries=400):
    for _ in range(tries):
        if await condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not become true")


def healthy(http, status=200):
    async def check():
        async with http.get("/health") as answer:
            return answer.status == status

    return check


async def ask(http, **question):
    async with http.post("/predict", json=question) as answer:
        return answer.status, await answer.json()


async def frames(answer):
    """The frames of a snapshot stream."""
    while True:
        (length,) = struct.unpack("<I", await answer.content.readexactly(4))
        yield await answer.content.readexactly(length)


async def test_the_stream_brings_what_the_engine_publishes(engine, shm_name):
    first = engine.publish()
    async with predicting(shm_name) as http:
        await until(healthy(http))
        async with http.get("/snapshots") as answer:
            stream = frames(answer)
            assert await anext(stream) == first
            engine.add("a")
            engine.advance(0.05)
            second = engine.publish()
            assert await anext(stream) == second
            await stream.aclose()
    assert decode(second).keys.tolist() == [request_key("a")]


async def test_an_unchanged_state_is_sent_again_as_a_heartbeat(engine, shm_name):
    frame = engine.publish()
    async with predicting(shm_name) as http:
        await until(healthy(http))
        async with http.get("/snapshots") as answer:
            stream = frames(answer)
            assert [await anext(stream) for _ in range(3)] == [frame] * 3
            await stream.aclose()


async def test_a_slow_reader_skips_to_the_newest(engine, shm_name):
    for i in range(200):
        engine.add(f"r{i}")
    engine.advance(0.2)
    frame = engine.publish()
    async with predicting(shm_name, min_interval_s=0.0) as http:
        await until(healthy(http))
        sock_reader, writer = await asyncio.open_connection("127.0.0.1", http._base_url.port, limit=1 << 14)
        writer.write(b"GET /snapshots HTTP/1.1\r\nHost: x\r\n\r\n")
        published = 0
        for _ in range(600):  # not read meanwhile
            engine.publish()
            published += 1
            await asyncio.sleep(0.002)
        engine.add("the last one")
        engine.advance(0.05)
        last = engine.publish()
        received = bytearray()
        while last not in received and len(received) < published * len(frame):
            received += await asyncio.wait_for(sock_reader.read(1 << 16), 5)
        writer.close()
        await writer.wait_closed()
    assert last in received
    assert len(received) < published * len(frame) * 0.9


async def test_a_subscriber_that_leaves_is_forgotten(engine, shm_name):
    engine.publish()
    async with predicting(shm_name) as http:
        await until(healthy(http))

        async def subscribers(n):
            async with http.get("/metrics") as answer:
                return f"block_predictor_subscribers {n}.0" in await answer.text()

        async with http.get("/snapshots"):
            await until(lambda: subscribers(1))
        await until(lambda: subscribers(0))


async def test_a_prediction_over_http_is_what_the_function_says(engine, shm_name):
    """Law L8, over the wire: same snapshot, same what-if."""
    for i in range(5):
        engine.add(f"r{i}", prompt=200)
    engine.advance(0.03)
    exact = {request_key(f"r{i}") for i in range(5)}
    frame = engine.publish(exact=exact)
    async with predicting(shm_name) as http:
        await until(healthy(http))
        status, said = await ask(http, prompt_tokens=300, max_tokens=100, output_tokens=60, harm=True)
    snapshot = decode(frame)
    output_s = PROFILE.output_s + PROFILE.output_request_s * 6
    mirror = Mirror(PROFILE.curve(1.0, snapshot.limits), PROFILE.input_s, output_s)
    mirror.load(snapshot, snapshot.requests[1])
    now_s = snapshot.taken_s + said["snapshot_age_s"]
    (expected,) = predict_all([mirror], prompt_tokens=300, max_tokens=100, output_tokens=60, now_s=now_s, harm=True)
    assert status == 200
    expected = msgspec.to_builtins(expected)
    assert said.keys() == expected.keys()
    for name, value in expected.items():
        assert said[name] == pytest.approx(value, abs=2e-6), name


async def test_output_can_be_told_as_quantiles_or_left_to_history(engine, shm_name):
    engine.publish()
    async with predicting(shm_name) as http:
        await until(healthy(http))
        _, short = await ask(http, prompt_tokens=50, quantiles=[[0.1, 10], [0.9, 20]])
        _, long = await ask(http, prompt_tokens=50, quantiles=[[0.1, 10], [0.9, 800]])
        _, capped = await ask(http, prompt_tokens=50, max_tokens=20, quantiles=[[0.1, 500], [0.9, 800]])
        _, exact = await ask(http, prompt_tokens=50, max_tokens=20, output_tokens=20)
        _, unknown = await ask(http, prompt_tokens=50)
    assert short["e2e_s"] < long["e2e_s"]
    assert capped["e2e_s"] == pytest.approx(exact["e2e_s"], rel=0.05)
    assert unknown["e2e_s"] > short["e2e_s"]
    assert short["harm_s"] is None


BAD = [
    b"{", b"[]", b"{}", b'{"prompt_tokens": 0}', b'{"prompt_tokens": "9"}', b'{"prompt_tokens": 9, "output_tokens": 0}',
    b'{"prompt_tokens": 9, "quantiles": []}', b'{"prompt_tokens": 9, "quantiles": [[2, 5]]}',
    b'{"prompt_tokens": 9, "quantiles": [[0.9, 5], [0.1, 9]]}', b'{"prompt_tokens": 8192}',
    b'{"prompt_tokens": 9, "typo": 1}', b'{"prompt_tokens": 1e99}', b"\xff",
]  # fmt: skip


async def test_a_bad_question_gets_openais_error_object(engine, shm_name):
    engine.publish()
    async with predicting(shm_name) as http:
        await until(healthy(http))
        for body in BAD:
            async with http.post("/predict", data=body) as answer:
                assert answer.status == 400, body
                assert set((await answer.json())["error"]) == {"message", "type", "param", "code"}
        async with http.get("/nowhere") as answer:
            assert answer.status == 404
        assert await healthy(http)()


async def test_without_an_engine_there_is_no_prediction_and_the_reason_is_said(shm_name):
    async with predicting(shm_name) as http:
        status, body = await ask(http, prompt_tokens=9)
        assert status == 503
        assert "no engine publishes" in body["error"]["message"]
        async with http.get("/health") as answer:
            assert answer.status == 503
            assert "no engine publishes" in (await answer.json())["reason"]
        async with http.get("/snapshot") as answer:
            assert answer.status == 503
        async with http.get("/profile") as answer:
            profile = await answer.json()
    scale = profile.pop("scale")
    assert msgspec.convert(profile, StepTimeProfile) == PROFILE
    assert scale == 1.0


async def test_a_busy_engine_that_stands_still_is_not_predicted_and_an_idle_one_is(engine, shm_name):
    async with predicting(shm_name, stale_after_s=3.0) as http:
        engine.publish(age_s=60.0)
        await until(healthy(http))
        assert (await ask(http, prompt_tokens=9))[0] == 200, "an idle engine's state does not age"
        engine.add("a")
        engine.advance(0.02)
        engine.publish(age_s=60.0)
        await until(healthy(http, 503))
        status, body = await ask(http, prompt_tokens=9)
        assert status == 503
        assert "stood still" in body["error"]["message"]
        engine.publish()
        await until(healthy(http))


async def test_an_engine_that_dies_is_missed_and_its_heir_is_found(engine, shm_name):
    engine.publish()
    async with predicting(shm_name) as http:
        await until(healthy(http))
        async with http.get("/snapshots") as answer:
            stream = frames(answer)
            await anext(stream)
            engine.writer.close()
            await until(healthy(http, 503))
            status, body = await ask(http, prompt_tokens=9)
            assert status == 503
            assert "is gone" in body["error"]["message"]
            heir = PlayedEngine(shm_name, EngineLimits(max_num_seqs=7), epoch=2)
            frame = heir.publish()
            await until(healthy(http))
            async with asyncio.timeout(5):
                while await anext(stream) != frame:
                    pass
            await stream.aclose()
        assert (await ask(http, prompt_tokens=9))[0] == 200
        async with http.get("/snapshot") as answer:
            assert (await answer.json())["limits"]["max_num_seqs"] == 7
        heir.writer.close()


async def test_a_frame_that_is_no_snapshot_is_left_out(engine, shm_name, caplog):
    engine.publish()
    async with predicting(shm_name) as http:
        await until(healthy(http))
        engine.writer.write(b"nonsense" * 50)
        engine.add("a")
        await asyncio.sleep(0.05)
        assert await healthy(http)()
        engine.advance(0.02)
        engine.publish()

        async def recovered():
            async with http.get("/snapshot") as answer:
                return (await answer.json())["header"]["running"] == 1

        await until(recovered)
    assert "not an engine snapshot" in caplog.text


async def test_metrics_can_be_parsed_and_count(engine, shm_name):
    engine.publish()
    async with predicting(shm_name) as http:
        await until(healthy(http))
        await ask(http, prompt_tokens=9)
        await ask(http, prompt_tokens=0)
        async with http.get("/metrics") as answer:
            text = await answer.text()
    found = {s.name: s.value for f in text_string_to_metric_families(text) for s in f.samples if not s.labels}
    assert found["block_predictor_predict_seconds_count"] == 1
    assert found["block_predictor_fresh"] == 1
    assert found["block_predictor_snapshots"] == 1
    assert 'block_predictor_refused_total{status="400"} 1.0' in text


async def test_the_human_snapshot_names_everything(engine, shm_name):
    engine.add("a", prompt=120, max_tokens=300)
    engine.advance(0.05)
    engine.publish(exact={request_key("a")})
    async with predicting(shm_name) as http:
        await until(healthy(http))
        async with http.get("/snapshot") as answer:
            said = await answer.json()
    (request,) = said["requests"]
    assert (request["prompt"], request["max_tokens"], request["state"]) == (120, 300, "running")
    assert request["key"] == f"{request_key('a'):016x}"
    assert len(said["steps"]) == 16
    assert said["limits"]["max_num_seqs"] == 256


def test_the_self_test_accepts_good_profiles_and_says_what_a_bad_one_does():
    assert self_test(PROFILE) is None
    broken = msgspec.structs.replace(PROFILE, decode_knots=[(1, float("nan")), (64, 0.002)])
    assert "what-if" in self_test(broken)


async def test_a_predictor_that_failed_its_self_test_is_not_healthy(engine, shm_name, monkeypatch):
    monkeypatch.setattr("block.predictor.program.self_test", lambda _profile: "it is a test")
    engine.publish()
    async with predicting(shm_name) as http:
        await asyncio.sleep(0.1)
        assert not await healthy(http)()
        assert (await ask(http, prompt_tokens=9))[0] == 503


def test_a_calibration_scales_the_prediction_and_sees_every_snapshot():
    engine = Engine(EngineLimits(), PROFILE.curve())
    frame = Recorder(engine).capture(0.0, 1000.0)
    seen = []
    calibration = SimpleNamespace(scale=1.0, observe=lambda snapshot: seen.append(snapshot.sequence))
    state = InstanceState(PROFILE, calibration=calibration, wall_s=lambda: 1000.0)
    state.take(frame)
    plain = state.predict(Question(prompt_tokens=50, output_tokens=50))
    calibration.scale = 2.0
    slow = state.predict(Question(prompt_tokens=50, output_tokens=50))
    assert slow.e2e_s - API_S == pytest.approx(2 * (plain.e2e_s - API_S))
    assert (seen, state.scale) == ([1], 2.0)


def test_a_profile_that_is_a_fifth_too_fast_is_found_out_while_the_engine_runs():
    limits = EngineLimits()
    engine = Engine(limits, PROFILE.curve(1.2, limits))
    recorder = Recorder(engine)
    state = InstanceState(PROFILE, calibration=Calibration(PROFILE), wall_s=lambda: 1000.0)
    for i in range(60):
        engine.add(Sequence(i, 40, 300, 300, arrived_s=i * 0.01), i * 0.01)
    while (now_s := engine.next_event_s()) is not None:
        engine.advance(now_s)
        state.take(recorder.capture(now_s, 1000.0))
    assert state.scale == pytest.approx(1.2, rel=0.03)


def test_a_known_speed_scales_the_prediction():
    frame = Recorder(Engine(EngineLimits(), PROFILE.curve())).capture(0.0, 1000.0)
    answers = []
    for speed in (1.0, 0.5):
        state = InstanceState(PROFILE, speed=speed, wall_s=lambda: 1000.0)
        state.take(frame)
        answers.append(state.predict(Question(prompt_tokens=50, output_tokens=50)))
    assert answers[1].e2e_s - API_S == pytest.approx(2 * (answers[0].e2e_s - API_S))
