"""What clients send in headers and get in them: targets, priority, client, predictions with intervals, when to come again."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from block.core import Request
from block.gateway.deciding.residuals import LEAST
from gateway.conftest import Client, Start, until
from gateway.fakes import (
    STREAM_HEAD,
    FakeEngine,
    FakePredictor,
    Heard,
    answer,
    chunk,
    encoded,
    event,
    slowly,
    snapshot,
)


class Engines:
    """One engine with a predictor that says ``running`` and ``waiting`` requests are there."""

    def __init__(self, behave: Any = None) -> None:
        self.engine = FakeEngine(behave)
        self.running = self.waiting = 0
        self.predictor = FakePredictor(lambda: snapshot(running=self.running, waiting=self.waiting))

    async def gateway(self, start: Start, **options: Any) -> Client:
        await self.predictor.start()
        options = {"policy": "block-k"} | options  # keeps no request for later
        client = await start(self.engine, predictors={0: self.predictor.url}, **options)
        await self.seen(client)
        return client

    async def seen(self, client: Client) -> None:
        evidence = client.gateway.decider.evidence["e0"]  # type: ignore[index]
        await until(lambda: evidence.frames > 0)
        frames = evidence.frames
        await until(lambda: evidence.frames > frames + 1)
        await until(lambda: evidence.problem is None or evidence.fresh(time.time()))


Make = Callable[..., Engines]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[Engines] = []

    def one(behave: Any = None) -> Engines:
        made.append(Engines(behave))
        return made[-1]

    yield one
    for engines in made:
        await engines.predictor.stop()


def requests_of(client: Client) -> list[Request]:
    """Every request that the gateway takes in from now on."""
    taken: list[Request] = []
    dispatcher = client.gateway.dispatcher
    begin = dispatcher.start

    def start(exchange: Any) -> None:
        taken.append(exchange.request)
        begin(exchange)

    dispatcher.start = start  # type: ignore[method-assign]
    return taken


@pytest.mark.parametrize(
    ("headers", "body", "fields"),
    [
        ({}, {}, {"priority": 0, "slo": None, "session": None, "client": None}),
        ({"x-slo-ttft-ms": "250"}, {}, {"slo": [0.25, None, None]}),
        (
            {"x-llm-d-slo-ttft-ms": "250", "x-llm-d-slo-tpot-ms": "20.5", "x-slo-e2e-ms": "9000"},
            {},
            {"slo": [0.25, 0.0205, 9.0]},
        ),
        ({"x-priority": "-3"}, {}, {"priority": -3}),
        ({"x-priority": "-3"}, {"priority": 5}, {"priority": 5}),
        ({"x-llm-d-inference-objective": "batch"}, {}, {"priority": 9}),
        ({"x-gateway-inference-objective": "unheard-of"}, {}, {"priority": 0}),
        ({"x-session-id": "s1"}, {}, {"session": "s1"}),
        ({"x-smg-routing-key": "s2"}, {}, {"session": "s2"}),
    ],
)
async def test_headers_reach_the_request(
    start: Start, headers: dict[str, str], body: dict[str, Any], fields: dict[str, Any]
) -> None:
    client = await start(FakeEngine(), objectives={"batch": 9})
    taken = requests_of(client)
    assert (await client.post(body=body, headers=headers))[0] == 200
    (request,) = taken
    for name, value in fields.items():
        found = getattr(request, name)
        assert (found and [found.ttft_s, found.tpot_s, found.e2e_s] if name == "slo" else found) == value


async def test_clients_are_told_apart_by_hashes_of_what_they_are_called(start: Start) -> None:
    client = await start(FakeEngine(), api_keys=["sk-1 team-a", "sk-2"])
    taken = requests_of(client)
    for key in ("sk-1", "sk-2"):
        for body in ({}, {"user": "jane"}, {"user": None}, {"user": "jane"}):
            assert (await client.post(body=body, headers={"authorization": f"Bearer {key}"}))[0] == 200
    assert (await client.post(headers={"x-api-key": "sk-1", "x-llm-d-inference-fairness-id": "tenant"}))[0] == 200
    assert (await client.post(headers={"x-api-key": "sk-3"}))[0] == 401
    seen = [request.client for request in taken]
    assert seen[1] == seen[3] == seen[5] == seen[7]
    assert seen[0] == seen[2] != seen[4] == seen[6]
    assert len(set(seen)) == 4
    assert not any(name in json.dumps(seen) for name in ("jane", "team-a", "sk-", "tenant"))


@pytest.mark.parametrize(
    ("header", "value"),
    [("x-slo-ttft-ms", "soon"), ("x-slo-e2e-ms", "-1"), ("x-slo-tpot-ms", "nan"), ("x-priority", "1e3")],
)
async def test_a_header_that_makes_no_sense_is_a_clear_400(start: Start, header: str, value: str) -> None:
    status, body, _ = await (await start(FakeEngine())).post(headers={header: value})
    assert (status, json.loads(body)["error"]["param"]) == (400, header)


async def test_a_null_is_no_prompt(start: Start) -> None:
    client = await start(FakeEngine())
    taken = requests_of(client)
    for fields in ({"messages": None}, {"messages": None, "input": None}):
        body = {"model": "fake", "prompt": [1, 2, 3, 4, 5]} | fields
        async with client.session.post(client.url + "/v1/completions", json=body) as got:
            assert got.status == 200
    assert [request.prompt_tokens for request in taken] == [5, 5]


# Predictions and their intervals


async def test_answers_carry_predictions_with_intervals_once_enough_was_measured(start: Start, make: Make) -> None:
    client = await make().gateway(start)
    _, _, first = await client.post(body={"stream": True})
    assert "x-predicted-ttft-ms" in first
    assert "x-predicted-ttft-interval-ms" not in first
    for _ in range(LEAST):
        await client.post(body={"stream": True})
    await client.get("/metrics")  # who reads the books settles them
    _, _, headers = await client.post(body={"stream": True}, headers={"x-request-id": "r"})
    assert headers["x-prediction-confidence"] == "0.9"
    for what in ("ttft", "e2e"):
        low, high = (float(text) for text in headers[f"x-predicted-{what}-interval-ms"].split("-"))
        assert 0 <= low <= high
    why = json.loads((await client.get("/v1/decisions/r"))[1])
    assert why["interval"]["level"] == 0.9
    assert why["interval"]["ttft_low_s"] <= why["interval"]["ttft_high_s"]
    assert 0 <= await client.metric("block_prediction_interval_coverage_ratio") <= 2
    assert await client.metric("block_prediction_bias_ratio") > 0


async def test_the_first_event_of_v1_responses_is_no_token(start: Start, make: Make) -> None:
    async def responds(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + chunk(b'event: response.created\ndata: {"type":"response.created"}\n\n'))
        usage = {"response": {"usage": {"input_tokens": 9, "output_tokens": 4}}}
        writer.write(chunk(b"event: response.completed\ndata: " + encoded(usage) + b"\n\n") + b"0\r\n\r\n")

    client = await make(responds).gateway(start)
    body = {"input": "say something", "max_output_tokens": 40, "stream": True, "messages": None}
    status, text, _ = await client.post("/v1/responses", body, headers={"x-request-id": "r"})
    assert (status, text.count(b"event: ")) == (200, 2)
    why = json.loads((await client.get("/v1/decisions/r"))[1])["request"]
    assert (why["max_tokens"], why["prompt_tokens"]) == (40, 3)
    rings = client.gateway.dispatcher.lessons.residuals.instances["e0"]  # type: ignore[index]
    assert (rings.ttft.count, rings.e2e.count) == (0, 1)
    assert await client.metric("block_request_output_tokens_total") == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_what_refers_to_a_response_goes_where_it_was_made(start: Start, stream: bool) -> None:
    def makes(name: str) -> Any:
        async def responds(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
            made = {"id": f"resp_{name}{len(engine.heard)}", "object": "response"}
            if heard.json.get("stream"):
                created = encoded({"type": "response.created", "response": made})
                writer.write(STREAM_HEAD + chunk(b"event: response.created\ndata: " + created + b"\n\n") + b"0\r\n\r\n")
            else:
                writer.write(answer(encoded(made)))

        return responds

    engines = [FakeEngine(makes("a")), FakeEngine(makes("b"))]
    client = await start(*engines)
    for _ in range(2):
        await client.post("/v1/responses", {"input": "x", "stream": stream, "messages": None})
    for n, name in ((0, "resp_a1"), (1, "resp_b1")):
        for _ in range(3):
            _, _, headers = await client.post(f"/v1/responses/{name}/cancel")
            assert headers["x-gateway-destination-endpoint"] == f"e{n}"
            body = {"input": "y", "messages": None, "previous_response_id": name}
            _, _, headers = await client.post("/v1/responses", body)
            assert headers["x-gateway-destination-endpoint"] == f"e{n}"
    assert (await client.post("/v1/responses/resp_unheard-of/cancel"))[0] == 200


async def test_embeddings_go_through_untouched_and_need_no_prediction(start: Start, make: Make) -> None:
    async def embeds(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(encoded({"data": [{"embedding": [0.5, 0.25]}], "usage": {"prompt_tokens": 2}})))

    engines = make(embeds)
    client = await engines.gateway(start)
    body = {"input": ["a", "b"], "encoding_format": "float"}
    status, text, headers = await client.post("/v1/embeddings", body)
    assert (status, json.loads(text)["data"][0]["embedding"]) == (200, [0.5, 0.25])
    assert "x-predicted-e2e-ms" not in headers
    assert engines.engine.heard[0].json["input"] == ["a", "b"]
    assert engines.engine.heard[0].path == "/v1/embeddings"


async def test_a_client_may_say_how_long_its_answer_will_be(start: Start, make: Make) -> None:
    client = await make().gateway(start)

    async def e2e_s(**body: Any) -> float:
        told = json.loads((await client.post("/v1/decisions", body))[1])
        return float(told["candidates"][0]["prediction"]["e2e_s"])

    short, long = await e2e_s(nvext={"agent_hints": {"osl": 10}}), await e2e_s(nvext={"agent_hints": {"osl": 1000}})
    assert short < long / 10
    assert await e2e_s(nvext={"agent_hints": {"osl": 1000}}, max_tokens=10) == pytest.approx(short, rel=0.2)
    assert (await client.post(body={"nvext": {"agent_hints": {"osl": 3}}, "stream": True}))[0] == 200
    assert (await client.post(body={"nvext": None}))[0] == 200


async def test_where_a_request_would_go_is_told_without_sending_it(start: Start, make: Make) -> None:
    engines = make()
    client = await engines.gateway(start, api_keys=["k"])
    key = {"authorization": "Bearer k"}
    body = {"max_tokens": 50, "ignore_eos": True}
    status, text, headers = await client.post("/v1/decisions", body, headers=key | {"x-slo-ttft-ms": "100"})
    told = json.loads(text)
    assert (status, told["chosen"], told["outcome"]) == (200, "e0", None)
    assert told["id"] == headers["x-request-id"]
    assert told["request"]["max_tokens"] == 50
    quiet = told["candidates"][0]["prediction"]
    engines.running, engines.waiting = 8, 150
    await engines.seen(client)
    _, text, _ = await client.post("/v1/decisions", body, headers=key)
    assert json.loads(text)["candidates"][0]["prediction"]["ttft_s"] > quiet["ttft_s"]
    _, text, _ = await client.post("/v1/decisions", body, headers=key | {"routing-strategy": "round_robin"})
    assert json.loads(text)["policy"] == "round-robin"
    status, text, _ = await client.post(
        "/v1/decisions", body, headers=key | {"x-gateway-destination-endpoint-subset": "e9"}
    )
    assert (status, json.loads(text)["error"]["code"]) == (503, "no_ready_endpoint")
    assert (await client.post("/v1/decisions", body))[0] == 401
    assert (await client.post("/v1/decisions", {"model": "other"}, headers=key))[0] == 404
    assert engines.engine.heard == []
    assert not client.gateway.dispatcher.active
    assert (await client.get(f"/v1/decisions/{told['id']}", headers=key))[0] == 404


# Refusals


async def test_what_no_instance_can_do_in_time_is_refused_with_an_honest_time(start: Start, make: Make) -> None:
    engines = make()
    client = await engines.gateway(start, admission="deadline")
    assert (await client.post(headers={"x-slo-ttft-ms": "5000"}))[0] == 200
    engines.running, engines.waiting = 8, 150
    await engines.seen(client)
    assert (await client.post())[0] == 200  # no target: it waits like everybody
    status, body, headers = await client.post(headers={"x-slo-ttft-ms": "100"})
    assert (status, json.loads(body)["error"]["code"]) == (429, "slo_infeasible")
    assert headers["x-llm-d-request-dropped-reason"] == "rejected-slo-infeasible"
    late_ms = float(headers["retry-after-ms"])
    assert int(headers["retry-after"]) == math.ceil(late_ms / 1e3)
    assert (await client.post(headers={"x-slo-ttft-ms": str(100 + late_ms * 0.5)}))[0] == 429
    assert (await client.post(headers={"x-slo-ttft-ms": str(100 + late_ms * 2)}))[0] == 200
    assert (await client.post(headers={"x-slo-e2e-ms": "100"}))[0] == 429
    assert len(engines.engine.heard) == 3


async def test_what_cannot_be_done_in_time_is_refused_before_the_policy_keeps_it(start: Start, make: Make) -> None:
    engines = make()
    engines.running, engines.waiting = 8, 150
    client = await engines.gateway(start, admission="deadline", policy="block")
    started_s = time.monotonic()
    assert (await client.post(headers={"x-slo-ttft-ms": "100"}))[0] == 429
    assert time.monotonic() - started_s < 5
    assert engines.engine.heard == []


async def test_who_is_shed_is_told_when_the_next_request_is_predicted_to_end(start: Start, make: Make) -> None:
    engines = make(slowly(0.3))
    client = await engines.gateway(start, max_concurrent_requests=1, queue_size=0)
    first = asyncio.create_task(client.post(body={"max_tokens": 400, "ignore_eos": True}))
    await until(lambda: bool(engines.engine.heard))
    (exchange,) = client.gateway.dispatcher.active
    assert exchange.prediction is not None
    status, _, headers = await client.post()
    assert status == 429
    assert float(headers["retry-after-ms"]) == pytest.approx(exchange.prediction.e2e_s * 1e3, rel=0.3)
    await first


# Silence


async def test_a_silent_stream_gets_comments_between_its_events_and_only_there(start: Start) -> None:
    async def halting(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
        whole = chunk(event(" t0"))
        writer.write(STREAM_HEAD)
        await asyncio.sleep(0.6)
        writer.write(whole[:40])
        await asyncio.sleep(0.6)
        writer.write(whole[40:])
        await asyncio.sleep(0.6)
        writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    client = await start(FakeEngine(halting), sse_keep_alive_s=0.2, hang_after_s=0)
    status, body, _ = await client.post(body={"stream": True})
    events = body.split(b"\n\n")
    assert status == 200
    assert events[0] == b": keep-alive"
    assert [e for e in events if not e.startswith(b":")] == [event(" t0")[:-2], b"data: [DONE]", b""]


# The admin surface


async def test_the_live_page_needs_the_door_but_not_the_key_and_holds_no_data(start: Start) -> None:
    client = await start(FakeEngine(), admin_port=0, admin_key="k")
    page = f"http://127.0.0.1:{client.gateway.admin_port}/admin/dashboard"
    async with client.session.get(page) as got:
        assert (got.status, got.content_type) == (200, "text/html")
        assert "default-src 'none'" in got.headers["content-security-policy"]
        text = await got.text()
    assert "recent?after=" in text, "what it shows it asks for, with the key"
    assert "://" not in text, "it loads nothing from elsewhere"
    assert (await client.get("/admin/dashboard"))[0] == 404, "administration has a port of its own here"
    other = await start(FakeEngine())
    assert (await other.get("/admin/dashboard"))[0] == 404, "no key and no port: no administration"


async def test_the_admin_port_is_the_only_door_to_administration(start: Start) -> None:
    client = await start(FakeEngine(), admin_port=0)
    admin = f"http://127.0.0.1:{client.gateway.admin_port}"
    assert (await client.get("/admin/instances"))[0] == 404
    async with client.session.get(admin + "/admin/instances") as got:
        assert (got.status, (await got.json())["data"][0]["origin"]) == (200, "config")
    for path, status in (
        ("/metrics", 200),
        ("/readyz", 200),
        ("/readiness", 200),
        ("/v1/models", 404),
        ("/v1/decisions/x", 404),
    ):
        async with client.session.get(admin + path) as got:
            assert got.status == status, path
    async with client.session.post(admin + "/v1/chat/completions", json={"model": "fake"}) as got:
        assert got.status == 404
    async with client.session.get(admin + "/admin/instances", headers={"origin": "https://evil.example"}) as got:
        assert got.status == 403


async def test_the_admin_port_wants_the_key_where_one_is_set(start: Start) -> None:
    client = await start(FakeEngine(), admin_port=0, admin_key="k")
    admin = f"http://127.0.0.1:{client.gateway.admin_port}"
    for path in ("/admin/instances", "/admin/recent", "/v1/decisions/x"):
        async with client.session.get(admin + path) as got:
            assert got.status == 401, path
    async with client.session.get(admin + "/admin/instances", headers={"authorization": "Bearer k"}) as got:
        assert got.status == 200
    async with client.session.get(admin + "/metrics") as got:
        assert got.status == 200


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("http://10.1.2.3:8000", 201),
        ("http://10.2.0.1:8000", 403),
        ("http://gpu7.cluster.local:8000", 201),
        ("http://GPU7.Cluster.Local:8000", 201),
        ("http://cluster.local.evil.example:8000", 403),
        ("http://169.254.169.254/latest", 403),
        ("http://[::ffff:169.254.169.254]/", 403),
        ("http://[fe80::1]:80", 403),
        ("file:///etc/passwd", 400),
        ("gopher://10.1.2.3:8000", 400),
        ("http://10.1.2.3:8000/a b", 400),
        ("http://user:secret@10.1.2.3", 400),
    ],
)
async def test_only_allowed_hosts_can_be_added(start: Start, url: str, status: int) -> None:
    client = await start(FakeEngine(), admin_key="k", instance_allow=["10.1.0.0/16", "*.cluster.local"])
    for field in ("url", "predictor"):
        body = {"url": "http://10.1.0.1:1", "name": f"n-{field}", field: url}
        async with client.session.post(
            client.url + "/admin/instances", json=body, headers={"authorization": "Bearer k"}
        ) as got:
            assert got.status == status, await got.text()


async def test_a_name_cannot_break_out_of_a_header(start: Start) -> None:
    client = await start(FakeEngine(), admin_key="k")
    body = {"url": "http://127.0.0.1:1", "name": "a\r\nset-cookie: x=1"}
    async with client.session.post(
        client.url + "/admin/instances", json=body, headers={"authorization": "Bearer k"}
    ) as got:
        assert got.status == 400
