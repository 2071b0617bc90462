"""Spans of requests: children of the client's, parents of the instance's, with numbers and without prompts."""

import json
from typing import Any

import pytest

from gateway.conftest import Start, until
from gateway.fakes import FakeEngine, dies_in_stream, fails

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


async def test_without_tracing_the_clients_context_goes_through_as_it_came(start: Start) -> None:
    engine = FakeEngine()
    client = await start(engine)
    await client.post(headers={"traceparent": PARENT, "tracestate": "a=1"})
    assert (engine.heard[0].headers["traceparent"], engine.heard[0].headers["tracestate"]) == (PARENT, "a=1")


@pytest.fixture
def exporter() -> Any:
    sdk = pytest.importorskip(
        "opentelemetry.sdk.trace.export.in_memory_span_exporter",
        reason="needs OpenTelemetry: pip install 'block-llm[otel]'",
    )
    return sdk.InMemorySpanExporter()


async def traced(start: Start, exporter: Any, engine: FakeEngine, **headers: str) -> Any:
    from block.gateway.records.tracing import Tracing

    client = await start(engine)
    tracing = client.gateway.dispatcher.tracing = Tracing(exporter)
    await client.post(body={"stream": True, "messages": [{"role": "user", "content": "a secret"}]}, headers=headers)
    await until(lambda: not client.gateway.dispatcher.active)
    tracing._provider.force_flush()
    (span,) = exporter.get_finished_spans()
    return span


async def test_a_request_is_a_child_of_its_client_and_the_parent_of_its_instance(start: Start, exporter: Any) -> None:
    engine = FakeEngine()
    span = await traced(start, exporter, engine, traceparent=PARENT, tracestate="a=1")
    assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]
    given = engine.heard[0].headers
    assert given["traceparent"] == f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-01"
    assert given["tracestate"] == "a=1"
    assert span.name == "POST /v1/chat/completions"
    assert span.kind.name == "SERVER"
    assert span.status.status_code.name == "UNSET"
    seen = dict(span.attributes)
    assert (seen["block.instance"], seen["block.policy"], seen["http.response.status_code"]) == (
        "e0",
        "round-robin",
        200,
    )
    assert 0 < seen["block.measured_ttft_s"] <= seen["block.measured_e2e_s"]
    assert seen["gen_ai.usage.output_tokens"] > 0
    assert "secret" not in json.dumps(seen)
    assert span.resource.attributes["service.name"] == "block-gateway"


@pytest.mark.parametrize(("behave", "error"), [(fails, None), (dies_in_stream, "stream_broken")])
async def test_what_fails_is_an_error(start: Start, exporter: Any, behave: Any, error: str | None) -> None:
    span = await traced(start, exporter, FakeEngine(behave))
    assert span.status.status_code.name == "ERROR"
    assert span.attributes.get("error.type") == error
