"""Health, readiness, models, metrics."""

from typing import Final

from block.conformance.check import CUSTOM, OPENAI, Check, expect
from block.conformance.target import Target


async def _any_answers_200(target: Target, *paths: str) -> None:
    statuses = {path: (await target.ask("GET", path)).status for path in paths}
    bad = {path: status for path, status in statuses.items() if status != 200}
    expect(not bad, ", ".join(f"{path} gets {status}" for path, status in bad.items()))


async def health(target: Target) -> None:
    await _any_answers_200(target, "/health")


async def live(target: Target) -> None:
    await _any_answers_200(target, "/live", "/livez", "/healthz")


async def ready(target: Target) -> None:
    await _any_answers_200(target, "/ready", "/readyz")


async def health_needs_no_key(target: Target) -> None:
    status = (await target.ask("GET", "/health", key=None)).status
    expect(status == 200, f"without a key /health gets {status}")


async def models(target: Target) -> None:
    answer = await target.ask("GET", "/v1/models")
    expect(answer.status == 200, f"it gets {answer.status}")
    body = answer.json()
    listed = isinstance(body, dict) and body.get("object") == "list" and isinstance(body.get("data"), list)
    expect(listed, f"not a list object: {answer.body[:80]!r}")
    bad = [m for m in body["data"] if not isinstance(m, dict) or m.get("object") != "model" or not m.get("id")]
    expect(body["data"] and not bad, f"an entry is no model object: {bad[:1] or body['data']}")


async def metrics(target: Target) -> None:
    answer = await target.ask("GET", "/metrics")
    expect(answer.status == 200, f"it gets {answer.status}")
    expect(b"# TYPE " in answer.body, f"not Prometheus text: {answer.body[:60]!r}")


CHECKS: Final = (
    Check("health", "GET /health answers 200 while the gateway runs.", CUSTOM, health),
    Check("health-without-key", "GET /health needs no API key.", CUSTOM, health_needs_no_key, required=False),
    Check("live", "GET /live, /livez and /healthz answer 200.", CUSTOM, live, required=False),
    Check("ready", "GET /ready and /readyz answer 200 while an engine is ready.", CUSTOM, ready, required=False),
    Check("models", "GET /v1/models lists model objects.", OPENAI + "api-reference/models/list", models),
    Check("metrics", "GET /metrics answers Prometheus text.", CUSTOM, metrics, required=False),
)
