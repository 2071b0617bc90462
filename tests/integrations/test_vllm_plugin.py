"""The vLLM plugin without vLLM; against the real one: ``make test-vllm``."""

import ast
import itertools
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fake_vllm import FakeOutput, FakeRequest, FakeScheduler

from block.integrations.vllm import options_from, refusal_for
from block.integrations.vllm.hooks import attach, data_parallel_rank, install
from block.integrations.vllm.publisher import StatePublisher
from block.integrations.vllm.scheduler_view import external_id, shape_of
from block.predict import snapshot as wire
from block.predictor.shared_memory import SnapshotReader, snapshot_path

_numbers = itertools.count()


@pytest.fixture
def name() -> Iterator[str]:
    chosen = f"test-plugin-{os.getpid()}-{next(_numbers)}"
    yield chosen
    assert not snapshot_path(chosen).exists(), "a publisher left its shared memory behind"


def published(publisher: StatePublisher, name: str) -> wire.EngineSnapshot:
    frame = SnapshotReader(name).read()
    assert frame is not None
    return wire.decode(frame)


@pytest.mark.parametrize(
    ("engine_id", "client_id"),
    [
        ("cmpl-abc-0-0123abcd", "abc"),
        ("cmpl-abc-12-0123abcd", "abc"),
        ("cmpl-6b1f7a34-5f0e-4a55-9c39-0f7d3c1f2a10-0-deadbeef", "6b1f7a34-5f0e-4a55-9c39-0f7d3c1f2a10"),
        ("cmpl-abc-0", "abc"),  # older versions add no hex digits
        ("chatcmpl-abc-1-0123abcd", "abc-1"),
        ("chatcmpl-6b1f7a34-5f0e-4a55-9c39-0f7d3c1f2a10", "6b1f7a34-5f0e-4a55-9c39-0f7d3c1f2a10"),
        ("1_chatcmpl-abc-0123abcd", "abc"),  # n > 1
        ("embd-abc", "embd-abc"),
    ],
)
def test_the_clients_request_id_is_found_in_the_engines(engine_id: str, client_id: str) -> None:
    assert external_id(engine_id) == client_id


def test_a_snapshot_shows_running_then_waiting_requests_under_the_clients_keys(name: str) -> None:
    publisher = StatePublisher(FakeScheduler(running=2, waiting=2), name)
    snapshot = published(publisher, name)
    expected = [wire.request_key(key) for key in ("run-0", "run-1", "wait-0", "wait-1")]
    assert snapshot.keys.tolist() == expected
    assert (snapshot.running, snapshot.waiting) == (2, 2)
    assert snapshot.kv_blocks_free == 700
    publisher.close()


def test_the_batch_in_flight_is_published_while_it_runs_and_logged_when_it_ends(name: str) -> None:
    scheduler = FakeScheduler(running=3)
    publisher = StatePublisher(scheduler, name)
    output = scheduler.schedule()
    publisher.scheduled(scheduler, output, 5.0)
    during = published(publisher, name)
    assert int(during.header["batches_in_flight"]) == 1
    assert during.header["batch_1_started_s"] == 5.0
    assert during.requests[wire.BATCH_1].tolist() == [1, 1, 1]
    assert (during.requests[wire.FLAGS] & wire.SAMPLES_1).all()
    scheduler.update_from_output(output, None)
    publisher.updated(scheduler, output, 5.25)
    publisher.scheduled(scheduler, scheduler.schedule(), 5.26)
    after = published(publisher, name)
    assert int(after.header["batches_in_flight"]) == 1
    assert after.header["batch_1_started_s"] == 5.26
    assert after.requests[wire.OUTPUT].tolist() == [1, 1, 1]
    assert after.steps.tolist() == [(5.0, 5.25, 3, 300, 0, 0.0, 0)]
    publisher.close()


def test_the_last_results_are_published_although_nothing_is_left_to_schedule(name: str) -> None:
    scheduler = FakeScheduler(running=2)
    publisher = StatePublisher(scheduler, name)
    output = scheduler.schedule()
    publisher.scheduled(scheduler, output, 5.0)
    scheduler.update_from_output(output, None)
    scheduler.running = []
    publisher.updated(scheduler, output, 5.25)
    after = published(publisher, name)
    assert (after.running, int(after.header["batches_in_flight"])) == (0, 0)
    assert after.steps.tolist() == [(5.0, 5.25, 2, 200, 0, 0.0, 0)]
    publisher.close()


def test_waiting_requests_beyond_the_cap_are_told_as_a_number_and_a_token_sum(name: str) -> None:
    publisher = StatePublisher(FakeScheduler(waiting=5), name, waiting_max=2)
    snapshot = published(publisher, name)
    assert (snapshot.waiting, int(snapshot.header["waiting_total"])) == (2, 5)
    assert int(snapshot.header["waiting_tokens_beyond"]) == 30 + 40 + 50
    publisher.close()


@pytest.mark.parametrize(
    ("options", "exact"),
    [
        ({"ignore_eos": True}, True),
        ({"ignore_eos": True, "stop": ["."]}, False),
        ({"ignore_eos": True, "stop_token_ids": [9]}, False),
        ({"min_tokens": 50}, True),
        ({}, False),
    ],
)
def test_an_output_is_exact_only_where_the_client_fixed_it(name: str, options: dict[str, Any], exact: bool) -> None:
    scheduler = FakeScheduler()
    scheduler.running = [FakeRequest("cmpl-a-0-0123abcd", max_tokens=50, **options)]
    publisher = StatePublisher(scheduler, name)
    assert bool(published(publisher, name).requests[wire.FLAGS, 0] & wire.EXACT) is exact
    publisher.close()


def test_max_tokens_is_cut_to_the_context(name: str) -> None:
    scheduler = FakeScheduler()
    scheduler.running = [FakeRequest("cmpl-a-0-0123abcd", prompt=2000, max_tokens=10_000)]
    publisher = StatePublisher(scheduler, name)
    assert published(publisher, name).requests[wire.MAX_TOKENS, 0] == 48
    publisher.close()


def test_a_failing_plugin_disables_itself_and_never_the_engine(name: str, caplog: pytest.LogCaptureFixture) -> None:
    class Engine(FakeScheduler):
        pass

    install(Engine, lambda scheduler: attach(scheduler, name, 256, None, "0.32.0"))
    engine = Engine(running=1)
    assert snapshot_path(name).exists()
    del engine.kv_cache_manager  # something a new version of vLLM does not have
    with caplog.at_level(logging.WARNING, "vllm.block"):
        output = engine.schedule()
    assert output.total_num_scheduled_tokens == 1
    assert engine.update_from_output(output, None) == "outputs"
    assert engine.schedule().total_num_scheduled_tokens == 1
    assert [r.message.split(":")[0] for r in caplog.records] == ["Block stops publishing this engine's state"]
    assert not snapshot_path(name).exists()


def test_an_engine_whose_state_cannot_be_read_starts_without_the_plugin(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Engine(FakeScheduler):
        def __init__(self) -> None:
            super().__init__(running=1)
            del self.max_num_running_reqs

    install(Engine, lambda scheduler: attach(scheduler, name, 256, None, "0.99.0"))
    with caplog.at_level(logging.WARNING, "vllm.block"):
        assert Engine().schedule().total_num_scheduled_tokens == 1
    assert "max_num_running_reqs" in caplog.text


def test_two_engines_under_one_name_are_told_apart_by_a_refusal(name: str, caplog: pytest.LogCaptureFixture) -> None:
    class Engine(FakeScheduler):
        pass

    install(Engine, lambda scheduler: attach(scheduler, name, 256, None, "0.32.0"))
    first = Engine(running=1)
    with caplog.at_level(logging.WARNING, "vllm.block"):
        second = Engine(running=2)
    assert "another name" in caplog.text
    second.schedule()
    first.schedule()
    reader = SnapshotReader(name)
    frame = reader.read()
    assert frame is not None
    assert wire.decode(frame).running == 1
    first._block_watcher.close()


def test_each_data_parallel_rank_is_an_instance(name: str) -> None:
    scheduler = FakeScheduler(rank=3)
    assert data_parallel_rank(scheduler) == 3
    watcher = attach(scheduler, name, 256, None, "0.32.0")
    assert snapshot_path(f"{name}-dp3").exists()
    watcher.close()


def test_installing_twice_wraps_once(name: str) -> None:
    class Engine(FakeScheduler):
        pass

    seen: list[Any] = []
    install(Engine, seen.append)
    install(Engine, seen.append)
    Engine().schedule()
    assert len(seen) == 1


def test_the_plugin_needs_only_what_vllm_has_anyway() -> None:
    program = """
import sys
import block.integrations.vllm
foreign = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
print(sorted(name for name in foreign if not name.startswith("_")))
"""
    imported = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert set(ast.literal_eval(imported)) <= {
        "block", "msgspec", "numpy", "typing_extensions", "sitecustomize", "usercustomize",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("version", "refused"),
    [
        ("0.9.2", True),
        ("0.10.2", False),
        ("0.32.0", False),
        ("0.33.0", False),
        ("1.0.0", False),
        ("0.34.0rc1.dev5+gabc", False),
        ("dev", False),
    ],
)
def test_versions_without_the_hook_points_are_refused(version: str, refused: bool) -> None:
    assert (refusal_for(version) is not None) is refused


def test_an_option_that_makes_no_sense_names_its_variable() -> None:
    assert options_from({}).name == "vllm"
    assert options_from({"BLOCK_VLLM_NAME": "prod-0", "BLOCK_VLLM_WAITING": "0"}).waiting_max == 0
    with pytest.raises(ValueError, match="BLOCK_VLLM_WAITING"):
        options_from({"BLOCK_VLLM_WAITING": "many"})


def test_a_batchs_shape_is_that_of_the_engine_model() -> None:
    # A decode, a first chunk, a later chunk, and a last chunk of one token.
    rows = [(1, 120, 100), (64, 0, 300), (32, 64, 300), (1, 99, 100)]
    work = 64 * 32 + 32 * (64 + 16) + 1 * (99 + 0.5)
    assert shape_of(rows) == (1, 120, 97, work, 3)


def test_an_update_of_an_unknown_batch_changes_nothing(name: str) -> None:
    scheduler = FakeScheduler(running=1)
    publisher = StatePublisher(scheduler, name)
    before = publisher.published
    publisher.updated(scheduler, FakeOutput({"somebody": 1}), 1.0)
    assert publisher.published == before
    publisher.close()


def test_what_requests_found_in_the_prefix_cache_is_told_with_counters(name: str) -> None:
    scheduler = FakeScheduler(running=1, waiting=1)
    scheduler.vllm_config.cache_config.enable_prefix_caching = True
    scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block = {b"a": 1, b"b": 2}
    publisher = StatePublisher(scheduler, name)
    arrived = FakeRequest("cmpl-new-0-0123abcd", prompt=100)
    publisher.arrived(arrived)
    scheduler.add_request(arrived)
    scheduler.requests = {arrived.request_id: arrived}
    output = scheduler.schedule()
    output.scheduled_new_reqs = [
        SimpleNamespace(req_id=arrived.request_id, prompt_token_ids=[1] * 100, num_computed_tokens=64)
    ]
    publisher.scheduled(scheduler, output, 1.0)
    snapshot = published(publisher, name)
    assert snapshot.prefix is not None
    assert (snapshot.prefix.queried_tokens, snapshot.prefix.hit_tokens, snapshot.prefix.blocks_cached) == (100, 64, 2)
    assert snapshot.prefix.hits.tolist() == [-1, 64, -1]
    assert snapshot.keys[1] == wire.request_key("new")
    publisher.close()


def test_an_engine_without_prefix_caching_tells_nothing_of_it(name: str) -> None:
    publisher = StatePublisher(FakeScheduler(running=1), name)
    assert published(publisher, name).prefix is None
    publisher.close()


def test_a_preempted_request_is_described_where_it_waits(name: str) -> None:
    scheduler = FakeScheduler(asynchronous=True, running=2, waiting=1)
    scheduler._preempt_request = lambda request: None
    publisher = StatePublisher(scheduler, name)
    publisher.scheduled(scheduler, scheduler.schedule(), 1.0)
    victim = scheduler.running.pop()
    victim.num_computed_tokens, victim.num_preemptions, victim.num_stale_output_tokens = 0, 1, 1
    victim._output_token_ids += [7, 7]
    publisher.preempted(victim)
    scheduler.waiting.insert(0, victim)
    publisher.scheduled(scheduler, scheduler.schedule(), 2.0)
    rows = published(publisher, name).requests
    assert rows[wire.OUTPUT].tolist() == [0, 2, 0]
    assert rows[wire.STALE].tolist() == [0, 1, 0]
    assert rows[wire.PREEMPTIONS].tolist() == [0, 1, 0]
    assert rows[wire.BATCH_1].tolist() == [1, 1, 0], "its token of before is still in flight"
    assert rows[wire.BATCH_2].tolist() == [1, 0, 0]
    publisher.close()


def test_a_long_queues_tail_is_told_about_right(name: str) -> None:
    scheduler = FakeScheduler(waiting=300)
    publisher = StatePublisher(scheduler, name, waiting_max=10)
    told = []
    for number in range(40):
        scheduler.waiting.append(FakeRequest(f"chatcmpl-more-{number}-0123abcd", prompt=1500))
        publisher.scheduled(scheduler, FakeOutput({}), 1.0)
        header = published(publisher, name).header
        true = sum(r.num_prompt_tokens for r in scheduler.waiting[10:])
        assert int(header["waiting_total"]) == len(scheduler.waiting)
        told.append(int(header["waiting_tokens_beyond"]) / true)
    assert 0.9 < min(told) <= max(told) < 1.1
    publisher.close()
