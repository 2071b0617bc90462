"""What users of other routers have in their fingers: flags, names of policies, headers, routes for workers."""

import asyncio
import json
from typing import Any

import pytest
from click.testing import CliRunner

from block.cli.serve import command
from block.gateway.config import load_config
from block.gateway.peers import POLICIES, policy_called
from block.policy.table import POLICIES as OURS
from gateway.conftest import Client, Start, until
from gateway.fakes import FakeEngine, never_answers, slowly

KEY = {"authorization": "Bearer k"}


def dumped(*arguments: str) -> str:
    done = CliRunner().invoke(command, [*arguments, "--dump-config"], env={"BLOCK_CONFIG_FILE": None})
    assert done.exit_code == 0, done.output
    return done.output


def test_every_policy_of_others_is_one_of_ours() -> None:
    assert set(POLICIES.values()) <= set(OURS)
    assert policy_called("power_of_two:k=3") == "power-of-two:k=3"
    assert policy_called("block") == "block"
    assert load_config({}, environment={"BLOCK_POLICY": "cache_aware"}).policy == "prefix-affinity"


def test_flags_of_sglangs_and_vllms_routers_are_taken() -> None:
    text = dumped(
        "--worker-urls", "http://a:1", "http://b:2", "--policy", "power_of_two", "--host", "0.0.0.0", "--port", "30000",
        "--prometheus-port", "29000", "--prometheus-host", "0.0.0.0", "--request-id-headers", "x-request-id", "x-trace-id",
        "--request-timeout-secs", "60", "--retry-max-retries", "2", "--cb-failure-threshold", "3",
        "--cb-timeout-duration-secs", "7", "--health-failure-threshold", "2", "--health-check-endpoint", "/ping",
        "--health-check-interval-secs", "5", "--max-payload-size", "1000", "--max-concurrent-requests", "64",
        "--queue-size", "8", "--queue-timeout-secs", "3", "--cors-allowed-origins", "https://a.example", "https://b.example",
        "--log-level", "warn", "--shutdown-grace-period-secs", "9",
    )  # fmt: skip
    for line in (
        'url = "http://a:1"', 'url = "http://b:2"', 'policy = "power-of-two"', "prometheus_port = 29000", "retries = 2",
        'request_id_headers = ["x-request-id","x-trace-id"]', "cb_open_s = 7.0", 'health_check_path = "/ping"',
        "request_bytes_max = 1000", 'cors_allowed_origins = ["https://a.example","https://b.example"]',
        'log_level = "warning"', "health_failure_threshold = 2",
    ):  # fmt: skip
        assert line in text, line
    text = dumped("--worker-urls", "http://a:1 http://b:2", "--disable-retries", "--disable-circuit-breaker")
    assert "retries = 0\n" in text
    assert "cb_failure_threshold = 0\n" in text


def test_discovery_as_other_routers_name_it() -> None:
    vllm = dumped(
        "--service-discovery", "--selector", "app=vllm", "tier=gpu", "--service-discovery-port", "8080",
        "--service-discovery-namespace", "prod",
    )  # fmt: skip
    assert 'service_discovery = "k8s"' in vllm
    assert 'discovery_name = "prod/pods:app=vllm,tier=gpu:8080"' in vllm
    stack = dumped("--service-discovery", "k8s", "--k8s-label-selector", "app=vllm", "--k8s-namespace", "default")
    assert 'discovery_name = "default/pods:app=vllm:8000"' in stack


def test_flags_of_production_stack_are_taken() -> None:
    text = dumped("--static-backends", "http://a:1,http://b:2", "--static-models", "m,m", "--routing-logic", "session")
    assert 'policy = "consistent-hash"' in text
    done = CliRunner().invoke(command, ["--static-backends", "http://a:1,http://b:2", "--static-models", "m"])
    assert "one model for each backend" in done.output


def test_any_setting_can_be_set() -> None:
    text = dumped("--set", "objectives=batch=9 chat=0", "--set", "hang_after_s=0.5", "--set", "decision_headers=false")
    assert 'objectives = { "batch" = 9, "chat" = 0 }' in text
    assert "hang_after_s = 0.5" in text
    assert "decision_headers = false" in text


# Headers that say where


async def test_a_request_goes_only_where_its_headers_let_it(start: Start) -> None:
    engines = [FakeEngine() for _ in range(3)]
    client = await start(*engines)
    at = [f"127.0.0.1:{engine.port}" for engine in engines]
    for headers, allowed in (
        ({"x-gateway-destination-endpoint-subset": f"{at[1]}, 10.0.0.1:80"}, {"e1"}),
        ({"x-gateway-destination-endpoint-subset": "e0,e2"}, {"e0", "e2"}),
        ({"x-smg-target-worker": "2"}, {"e2"}),
        ({"x-smg-target-worker": engines[0].url}, {"e0"}),
        ({"x-smg-target-worker": "e1", "x-gateway-destination-endpoint-subset": "e0,e1"}, {"e1"}),
    ):
        chosen = {(await client.post(headers=headers))[2]["x-gateway-destination-endpoint"] for _ in range(4)}
        assert chosen == allowed, headers
    status, _, _ = await client.post(headers={"x-smg-target-worker": "1", "x-request-id": "r"})
    assert status == 200
    assert json.loads((await client.get("/v1/decisions/r"))[1])["request"]["instances"] == ["e1"]


@pytest.mark.parametrize("named", ["http://evil.example", "169.254.169.254:80", "99", ""])
async def test_nothing_but_an_instance_can_be_named(start: Start, named: str) -> None:
    client = await start(FakeEngine())
    status, body, _ = await client.post(headers={"x-smg-target-worker": named})
    assert (status, json.loads(body)["error"]["param"]) == (400, "x-smg-target-worker")
    status, body, _ = await client.post(headers={"x-gateway-destination-endpoint-subset": named})
    error = json.loads(body)["error"]
    assert (status, error["code"]) == (503, "no_ready_endpoint")
    assert "none of those that the request asks for is here" in error["message"]


async def test_a_retry_stays_among_those_that_were_asked_for(start: Start) -> None:
    engines = [FakeEngine(), FakeEngine(), FakeEngine()]
    client = await start(*engines)
    await engines[1].stop()
    status, _, headers = await client.post(headers={"x-gateway-destination-endpoint-subset": "e1,e2"})
    assert (status, headers["x-gateway-destination-endpoint"]) == (200, "e2")
    assert (await client.post(headers={"x-smg-target-worker": "e1"}))[0] in (502, 503)
    assert engines[0].heard == []


async def test_a_request_may_name_its_policy(start: Start) -> None:
    client = await start(FakeEngine(), FakeEngine())
    for name in ("least-request", "cache_aware", "block"):
        assert (await client.post(headers={"routing-strategy": name, "x-request-id": name}))[0] == 200
        why = json.loads((await client.get(f"/v1/decisions/{name}"))[1])
        assert why["policy"] == policy_called(name)
        assert why["why"].startswith("It had the lowest cost of 2 candidates by load")
    for name in ("best", "block-k:k=1"):
        status, body, _ = await client.post(headers={"routing-strategy": name})
        assert (status, json.loads(body)["error"]["param"]) == (400, "routing-strategy")


async def test_a_decision_says_who_was_left_out_and_why(start: Start) -> None:
    broken, other = FakeEngine(), FakeEngine(models=("other",))
    broken.healthy = False
    client = await start(FakeEngine(), broken, other)
    await client.post(headers={"x-request-id": "r", "x-session-id": "s", "x-priority": "3"})
    why = json.loads((await client.get("/v1/decisions/r"))[1])
    assert why["left_out"]["e1"].startswith("down: ")
    assert why["left_out"]["e2"] == "it does not serve the model"
    assert "e0" not in why["left_out"]
    assert (why["request"]["session"], why["request"]["priority"]) == ("s", 3)
    assert why["why"] == "It was alone on the policy's shortlist."


# Routes for workers


async def ask(client: Client, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    async with client.session.request(method, client.url + path, json=body, headers=KEY) as answer:
        return answer.status, json.loads(await answer.read())


async def test_workers_come_and_go_as_with_other_routers(start: Start) -> None:
    first, second, third = FakeEngine(), await FakeEngine().start(), await FakeEngine().start()
    client = await start(first, admin_key="k")
    status, told = await ask(
        client, "POST", "/workers", {"url": second.url, "model_id": "fake", "worker_type": "regular"}
    )
    assert (status, told["status"], told["url"]) == (202, "accepted", second.url)
    assert (await ask(client, "POST", f"/add_worker?url={third.url}"))[0] == 202
    assert set((await ask(client, "GET", "/list_workers"))[1]["urls"]) == {first.url, second.url, third.url}
    await until(lambda: len(client.gateway.pool.ready()) == 3)
    _, found = await ask(client, "GET", "/workers")
    assert (found["total"], {worker["is_healthy"] for worker in found["workers"]}) == (3, {True})
    assert (await ask(client, "GET", told["location"]))[1]["model_id"] == "fake"
    assert (await ask(client, "GET", "/get_loads"))[1]["workers"][0] == {"worker": first.url, "load": 0}
    assert (await ask(client, "DELETE", told["location"]))[0] == 202
    assert (await ask(client, "POST", f"/remove_worker?url={third.url}"))[0] == 202
    assert (await ask(client, "GET", "/list_workers"))[1]["urls"] == [first.url]
    assert (await ask(client, "DELETE", told["location"]))[0] == 404
    for engine in (second, third):
        await engine.stop()


async def test_workers_are_behind_the_admin_key(start: Start) -> None:
    client = await start(FakeEngine(), admin_key="k")
    for method, path in (
        ("GET", "/workers"), ("POST", "/workers"), ("POST", "/add_worker?url=http://127.0.0.1:1"), ("GET", "/list_workers"),
        ("DELETE", "/workers/e0"),
    ):  # fmt: skip
        async with client.session.request(method, client.url + path) as got:
            assert got.status == 401, path
    closed = await start(FakeEngine())
    assert (await closed.get("/workers"))[0] == 404


async def test_a_worker_must_be_allowed_as_an_instance_must(start: Start) -> None:
    client = await start(FakeEngine(), admin_key="k", instance_allow=["10.0.0.0/8"])
    for body in ({"url": "http://169.254.169.254"}, {"url": "http://192.168.0.1:1"}):
        assert (await ask(client, "POST", "/workers", body))[0] == 403
    assert (await ask(client, "POST", "/workers", {"url": "file:///etc/passwd"}))[0] == 400
    assert (await ask(client, "POST", "/workers", {"model_id": "m"}))[0] == 400
    assert (await ask(client, "POST", "/add_worker"))[0] == 400


# The queue


async def test_who_is_more_important_is_admitted_first(start: Start) -> None:
    engine = FakeEngine(slowly(0.1))
    client = await start(engine, max_concurrent_requests=1)
    asked = [asyncio.create_task(client.post(headers={"x-request-id": "first"}))]
    await until(lambda: len(engine.heard) == 1)
    for number, priority in enumerate((5, 5, 0, -1)):
        headers = {"x-request-id": str(number), "x-priority": str(priority)}
        asked.append(asyncio.create_task(client.post(headers=headers)))
        await until(lambda: len(client.gateway.dispatcher.queue) == len(asked) - 1)
    assert [x.request.id for x in client.gateway.dispatcher.queue] == ["3", "2", "0", "1"]
    assert {status for status, _, _ in await asyncio.gather(*asked)} == {200}
    assert [heard.headers["x-request-id"] for heard in engine.heard] == ["first", "3", "2", "0", "1"]


async def test_a_full_queue_loses_its_least_important(start: Start) -> None:
    engine = FakeEngine(slowly(0.2))
    client = await start(engine, max_concurrent_requests=1, queue_size=1)
    first = asyncio.create_task(client.post())
    await until(lambda: len(engine.heard) == 1)
    batch = asyncio.create_task(client.post(headers={"x-priority": "9"}))
    await until(lambda: len(client.gateway.dispatcher.queue) == 1)
    chat = asyncio.create_task(client.post())
    status, body, headers = await batch
    assert (status, json.loads(body)["error"]["code"]) == (429, "evicted")
    assert headers["x-llm-d-request-dropped-reason"] == "evicted-priority"
    assert (await client.post(headers={"x-priority": "1"}))[2][
        "x-llm-d-request-dropped-reason"
    ] == "rejected-queue-full"
    assert [(await each)[0] for each in (first, chat)] == [200, 200]


async def test_who_waits_for_one_model_does_not_block_another(start: Start) -> None:
    stuck, free = FakeEngine(never_answers, models=("a",)), FakeEngine(models=("b",))
    client = await start(stuck, free, instance_in_flight_max=1, queue_timeout_s=30, hang_after_s=0)
    waiting = [asyncio.create_task(client.post(body={"model": "a"})) for _ in range(3)]
    await until(lambda: len(client.gateway.dispatcher.queue) == 2)
    busy = asyncio.create_task(client.post(body={"model": "b"}))
    assert (await asyncio.wait_for(client.post(body={"model": "b"}), 5))[0] == 200
    assert (await busy)[0] == 200
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
