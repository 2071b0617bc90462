"""The gateway's own routes, errors, keys, administration and reload."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from block.errors import ClientError, ConfigError
from block.gateway.config import GatewayConfig, InstanceConfig, load_config
from block.gateway.serve import Gateway
from block.gateway.wire.http1 import HttpRequest
from gateway.conftest import QUICK, Start, until
from gateway.fakes import FakeEngine


def error_of(body: bytes) -> Any:
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        ("/v1/chat/completions", b'{"model": "fake", ', 400, "invalid_json", None),
        ("/v1/chat/completions", b"", 400, "invalid_json", None),
        ("/v1/chat/completions", b"[1]", 400, None, None),
        ("/v1/chat/completions", b'{"model": 7}', 400, None, "model"),
        ("/v1/chat/completions", b'{"model": "fake", "max_tokens": "many"}', 400, None, "max_tokens"),
        ("/v1/chat/completions", b"[" * 100_000, 400, None, None),
        ("/v1/chat/completions", b'{"model": "fake", "prompt": "\xff"', 400, "invalid_json", None),
        ("/v1/completions", b'{"model": "other"}', 404, "model_not_found", "model"),
        ("/v1/models", b"{}", 405, "method_not_allowed", None),
        ("/nowhere", b"{}", 404, "not_found", None),
        ("/admin/instances", b"{}", 404, "not_found", None),
    ],
)
async def test_bad_requests_get_openais_error_object(
    start: Start, path: str, body: bytes, status: int, code: str | None, param: str | None
) -> None:
    engine = FakeEngine()
    client = await start(engine)
    async with client.session.post(client.url + path, data=body, headers={"x-request-id": "r1"}) as answer:
        assert answer.status == status
        assert answer.content_type == "application/json"
        assert answer.headers["x-request-id"] == "r1"
        error = error_of(await answer.read())
    assert (error["code"], error["param"]) == (code, param)
    assert engine.heard == []


@pytest.mark.parametrize(
    "body", [b'{"model":"fake","max_tokens":"16"}', b'{"model":"fake","max_tokens":16.0,"stream":0}']
)
async def test_numbers_that_an_engine_would_take_are_taken(start: Start, body: bytes) -> None:
    engine = FakeEngine()
    client = await start(engine, continue_streams=1)
    async with client.session.post(client.url + "/v1/completions", data=body, headers={"x-request-id": "r"}) as answer:
        assert answer.status == 200
    assert engine.heard[0].body == body
    assert json.loads((await client.get("/v1/decisions/r"))[1])["request"]["max_tokens"] == 16


async def test_reads_of_generating_routes_are_not_allowed(start: Start) -> None:
    client = await start(FakeEngine())
    assert (await client.get("/v1/chat/completions"))[0] == 405


async def test_health_and_readiness_have_the_names_people_use(start: Start) -> None:
    client = await start(FakeEngine())
    for path in ("/health", "/live", "/liveness", "/livez", "/healthz", "/ready", "/readiness", "/readyz"):
        assert (await client.get(path))[0] == 200, path
    async with client.session.head(client.url + "/health") as answer:
        assert (answer.status, await answer.read()) == (200, b"")


async def test_a_gateway_that_cannot_predict_says_it_is_not_ready(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await start(FakeEngine(), policy="block")
    assert (await client.get("/ready"))[0] == 200
    client.gateway.app.self_test = "predictions make no sense"
    status, body = await client.get("/ready")
    assert (status, json.loads(body)["reason"]) == (503, "predictions make no sense")
    assert (await client.post())[0] == 200


async def test_keys_are_wanted_where_they_are_set(start: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# for the tests\nfirst\n\nsecond\n")
    client = await start(FakeEngine(), api_key_file=str(keys), api_keys=["third"])
    for key, status in (
        ("first", 200),
        ("second", 200),
        ("third", 200),
        ("fourth", 401),
        ("", 401),
        ("# for the tests", 401),
    ):
        got, body, _ = await client.post(headers={"authorization": f"Bearer {key}"})
        assert got == status, key
        if status == 401:
            assert error_of(body)["code"] == "invalid_api_key"
    for path in ("/v1/models", "/v1/decisions/x", "/tokenize"):
        assert (await client.get(path))[0] == 401
    assert (await client.get("/health"))[0] == 200


async def test_instances_are_added_drained_and_removed_with_the_admin_key(start: Start) -> None:
    first, second = FakeEngine(), await FakeEngine().start()
    client = await start(first, admin_key="secret")
    admin: dict[str, Any] = {"headers": {"authorization": "Bearer secret"}}
    assert (await client.get("/admin/instances"))[0] == 401
    assert (await client.get("/admin/instances", headers={"authorization": "Bearer wrong"}))[0] == 401

    async def ask(method: str, path: str, body: Any = None) -> tuple[int, Any]:
        async with client.session.request(method, client.url + path, json=body, **admin) as answer:
            return answer.status, json.loads(await answer.read())

    status, added = await ask("POST", "/admin/instances", {"url": second.url, "name": "new"})
    assert (status, added["state"]) == (201, "starting")
    assert (await ask("POST", "/admin/instances", {"url": second.url, "name": "new"}))[0] == 409
    assert (await ask("POST", "/admin/instances", {"url": "file:///etc/passwd"}))[0] == 400
    assert (await ask("POST", "/admin/instances", {"uri": "x"}))[0] == 400
    await until(lambda: len(client.gateway.pool.ready()) == 2)
    assert (await ask("POST", "/admin/instances/e0/drain"))[1]["state"] == "draining"
    for _ in range(3):
        await client.post()
    assert (len(first.heard), len(second.heard)) == (0, 3)
    assert (await ask("DELETE", "/admin/instances/e0"))[0] == 200
    assert [i["name"] for i in (await ask("GET", "/admin/instances"))[1]["data"]] == ["new"]
    assert (await ask("DELETE", "/admin/instances/e0"))[0] == 404
    await second.stop()


async def test_an_unknown_decision_is_not_found_and_the_ring_is_bounded(start: Start) -> None:
    client = await start(FakeEngine(), decisions_kept=3)
    for n in range(5):
        await client.post(headers={"x-request-id": f"r{n}"})
    assert [(await client.get(f"/v1/decisions/r{n}"))[0] for n in range(5)] == [404, 404, 200, 200, 200]
    why = json.loads((await client.get("/v1/decisions/r4"))[1])
    assert (why["policy"], why["evidence"], why["outcome"]["attempts"]) == ("round-robin", "nothing", 1)
    assert "hello" not in json.dumps(why)


async def test_prompt_tokens_are_exact_for_ids_and_learned_for_text(start: Start) -> None:
    engine = FakeEngine()
    client = await start(engine)

    async def estimate(body: dict[str, Any]) -> int:
        await client.post("/v1/completions", body, headers={"x-request-id": "r"})
        return int(json.loads((await client.get("/v1/decisions/r"))[1])["request"]["prompt_tokens"])

    assert await estimate({"prompt": [1, 2, 3, 4, 5], "messages": None}) in (1, 5)
    body = {"model": "fake", "prompt": list(range(100))}
    async with client.session.post(
        client.url + "/v1/completions", json=body, headers={"x-request-id": "ids"}
    ) as answer:
        assert answer.status == 200
    assert json.loads((await client.get("/v1/decisions/ids"))[1])["request"]["prompt_tokens"] == 100
    ratio = client.gateway.ratio
    for _ in range(100):
        ratio.observe("fake", 2000, 1000)
    assert ratio.of("fake") == pytest.approx(2.0)
    assert ratio.of("another") == 4.0


async def test_metrics_have_the_names_that_dashboards_expect(start: Start) -> None:
    client = await start(FakeEngine())
    await client.post(body={"stream": True})
    _, text = await client.get("/metrics")
    for name in (
        "request_total", "request_error_total", "request_duration_seconds", "request_ttft_seconds",
        "request_streaming_tpot_seconds",
        "request_predicted_ttft_seconds", "request_ttft_prediction_duration_seconds", "request_slo_violation_total",
        "scheduler_e2e_duration_seconds", "flow_control_queue_size", "flow_control_request_queue_duration_seconds",
        "ready_endpoints", "inflight_requests", "inflight_tokens", "info", "worker_cb_state", "worker_health",
        "worker_retries_total", "event_loop_delay_seconds", "router_overhead_seconds", "prediction_error_ratio",
        "prediction_stale_seconds", "fallback_total",
    ):  # fmt: skip
        assert f"# HELP block_{name.removesuffix('_total')}" in text.decode(), name
    assert await client.metric("block_request_total") == 1
    assert await client.metric("block_request_output_tokens_total") == 4 - 1  # no usage: events but the role's
    assert await client.metric("block_ready_endpoints") == 1


async def test_a_model_beyond_the_bound_counts_as_other(start: Start) -> None:
    client = await start(FakeEngine(models=()), FakeEngine(models=("m",)))
    metrics = client.gateway.metrics
    for n in range(300):
        metrics.model(f"m{n}").requests.inc()
    _, text = await client.get("/metrics")
    assert text.count(b"block_request_total{") <= 202


async def test_a_reload_changes_instances_and_policy_and_a_wrong_one_changes_nothing(
    start: Start, tmp_path: Path
) -> None:
    first, second = await FakeEngine().start(), await FakeEngine().start()
    file = tmp_path / "gateway.toml"

    def write(policy: str, *engines: FakeEngine) -> None:
        tables = [f'[[instances]]\nurl = "{engine.url}"\n' for engine in engines]
        file.write_text(f'policy = "{policy}"\n' + "".join(tables))

    def load() -> GatewayConfig:
        return load_config({n: v for n, v in QUICK.items() if n != "policy"}, file=str(file), environment={})

    write("round-robin", first)
    gateway = Gateway(load(), load)
    await gateway.start()
    try:
        await until(lambda: len(gateway.pool.ready()) == 1)
        write("least-outstanding", second)
        gateway.reload()
        await until(lambda: len(gateway.pool.ready()) == 1)
        assert [i.config.url for i in gateway.pool.instances.values()] == [second.url]
        assert gateway.decider.policy.name == "least-outstanding"
        for wrong in ('polcy = "x"', 'policy = "no-such"', "instances = 7", "port = [", 'api_key_file = "/nowhere"'):
            file.write_text(wrong)
            gateway.reload()
            assert gateway.decider.policy.name == "least-outstanding"
        assert b'block_config_reload_total{result="invalid"} 5.0' in gateway.metrics.render()
        assert b'block_config_reload_total{result="ok"} 1.0' in gateway.metrics.render()
    finally:
        await gateway.close()
        await first.stop()
        await second.stop()
    await asyncio.sleep(0)


async def test_a_port_in_use_is_one_clear_sentence(start: Start) -> None:
    client = await start(FakeEngine())
    second = Gateway(GatewayConfig(port=client.gateway.port, instances=[InstanceConfig(url="http://127.0.0.1:1")]))
    with pytest.raises(ConfigError, match=rf"Port {client.gateway.port} on 127\.0\.0\.1 is in use"):
        await second.start()
    await second.close()


async def test_concurrent_streams_all_arrive_whole(start: Start) -> None:
    client = await start(FakeEngine(), FakeEngine(), policy="power-of-two")
    answers = await asyncio.gather(*(client.post(body={"stream": True}) for _ in range(200)))
    assert all(status == 200 and body.endswith(b"data: [DONE]\n\n") for status, body, _ in answers)


async def test_a_file_of_keys_is_read_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("block.gateway.serve.FILE_CHECK_S", 0.02)
    file = tmp_path / "keys"
    file.write_text("old\n")
    config = GatewayConfig(**(QUICK | {"api_key_file": str(file)}))
    gateway = Gateway(config, lambda: config)
    await gateway.start()
    try:

        def known(key: bytes) -> bool:
            http = HttpRequest()
            http.fields = {b"authorization": b"Bearer " + key}
            try:
                return gateway.app._keys.name_of(http) is not None
            except ClientError:
                return False

        assert (known(b"old"), known(b"new")) == (True, False)
        file.write_text("new key\n")
        await until(lambda: known(b"new"))
        assert not known(b"old")
        file.unlink()
        await asyncio.sleep(0.1)
        assert known(b"new")
    finally:
        await gateway.close()


Break = Callable[[FakeEngine], None]


async def test_under_random_faults_every_request_ends_and_nothing_leaks(start: Start) -> None:
    """Law L1 for the gateway: whatever the engines do, each request has exactly one end (the fixture checks the counts)."""
    import random

    from gateway import fakes

    rng = random.Random(5)
    kinds = [
        fakes.well,
        fakes.dies_unanswered,
        fakes.dies_in_stream,
        fakes.dies_in_chunk,
        fakes.speaks_garbage,
        fakes.fails,
    ]

    async def moody(engine: FakeEngine, heard: fakes.Heard, writer: asyncio.StreamWriter) -> None:
        await rng.choice(kinds)(engine, heard, writer)

    client = await start(FakeEngine(moody), FakeEngine(moody), FakeEngine(), policy="power-of-two", cb_open_s=0.05)
    statuses = []
    for _ in range(6):
        batch = [client.post(body={"stream": rng.random() < 0.5}) for _ in range(50)]
        statuses += [
            r if isinstance(r, Exception) else r[0] for r in await asyncio.gather(*batch, return_exceptions=True)
        ]
    assert len(statuses) == 300
    assert statuses.count(200) > 200
