"""What clients tell a scheduler and hear from it: targets, sessions, traces, predictions; and doors that must be closed."""

from typing import Final

from block.conformance.check import CUSTOM, OPENAI, Check, FailedError, expect
from block.conformance.failures import check_error
from block.conformance.target import CHAT, Target
from block.conformance.wire import Answer

_TRACE: Final = "https://www.w3.org/TR/trace-context/"
_TRACEPARENTS: Final = (
    "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "00-00000000000000000000000000000000-0000000000000000-00",
    "ff-nonsense",
)
_WITHIN: Final = {
    "x-slo-ttft-ms": "60000", "x-slo-tpot-ms": "1000", "x-slo-e2e-ms": "600000",
    "x-llm-d-slo-ttft-ms": "60000", "x-llm-d-slo-tpot-ms": "1000",
}  # fmt: skip
_DOORS: Final = ("/admin/instances", "/admin/recent", "/admin/changes", "/workers", "/v1/load_lora_adapter")


async def _chat(target: Target, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await target.ask("POST", CHAT, target.chat(), headers=named)


async def targets(target: Target) -> None:
    status = (await _chat(target, **_WITHIN)).status
    expect(status == 200, f"generous latency targets get {status}")


async def odd_targets(target: Target) -> None:
    for value in ("soon", "-1", "nan", "1e999", ""):
        answer = await _chat(target, x_slo_ttft_ms=value)
        expect(answer.status < 500, f"x-slo-ttft-ms: {value!r} gets {answer.status}")
        if answer.status != 200:
            check_error(answer, 400, 422)


async def session(target: Target) -> None:
    answers = [await _chat(target, x_session_id="conformance", x_priority="0") for _ in range(2)]
    statuses = [answer.status for answer in answers]
    expect(statuses == [200, 200], f"two requests of a session get {statuses}")


async def traces(target: Target) -> None:
    for value in _TRACEPARENTS:
        status = (await _chat(target, traceparent=value, tracestate="conformance=1")).status
        expect(status == 200, f"traceparent {value!r} gets {status}")


async def destination(target: Target) -> None:
    found = (await _chat(target)).fields.get("x-gateway-destination-endpoint")
    expect(found, "no x-gateway-destination-endpoint says who answered")


async def predictions(target: Target) -> None:
    fields = (await _chat(target)).fields
    try:
        told = {name: [float(part) for part in value.split("-")] for name, value in fields.items() if _predicted(name)}
    except ValueError as error:
        raise FailedError(f"a prediction is no number of milliseconds: {error}") from None
    wrong = [name for name, values in told.items() if values != sorted(values) or values[0] < 0]
    expect(not wrong, f"{' and '.join(wrong)} is no time or no interval")
    ttft, e2e = told.get("x-predicted-ttft-ms"), told.get("x-predicted-e2e-ms")
    expect(ttft is None or e2e is None or ttft <= e2e, "the first token is predicted after the last")


def _predicted(name: str) -> bool:
    return name.startswith("x-predicted-") and name.endswith("-ms")


async def _passed_or_refused(target: Target, path: str, body: dict[str, object]) -> None:
    answer = await target.ask("POST", path, {"model": target.model} | body)
    if answer.status == 200:
        expect(answer.content_type == "application/json", f"it is {answer.content_type!r}")
        expect(isinstance(answer.json(), dict), "it is no object")
    else:
        check_error(answer, 400, 404, 405, 422, 501)


async def embeddings(target: Target) -> None:
    await _passed_or_refused(target, "/v1/embeddings", {"input": ["one", "two"]})


async def responses(target: Target) -> None:
    await _passed_or_refused(target, "/v1/responses", {"input": "Say hello.", "max_output_tokens": 16})


async def doors(target: Target) -> None:
    for path in _DOORS:
        for method in ("GET", "POST"):
            status = (await target.ask(method, path, {"url": "http://127.0.0.1:9"}, key=None)).status
            expect(status >= 400, f"{method} {path} without a key gets {status}")


CHECKS: Final = (
    Check("targets", "Latency targets in headers are taken.", CUSTOM, targets),
    Check("targets-odd", "Targets that make no sense are ignored or refused, never a 5xx.", CUSTOM, odd_targets),
    Check("session", "Session and priority headers do no harm.", CUSTOM, session),
    Check("traceparent", "A trace context is taken, and a broken one ignored.", _TRACE, traces),
    Check("destination", "Answers say which engine made them.", CUSTOM, destination, required=False),
    Check("predictions", "Predictions, where they are told, are milliseconds, their intervals in order.", CUSTOM, predictions),
    Check("embeddings", "/v1/embeddings is served, or refused in OpenAI's words.", OPENAI + "api-reference/embeddings", embeddings),
    Check("responses", "/v1/responses is served, or refused in OpenAI's words.", OPENAI + "api-reference/responses", responses),
    Check("doors", "Nobody administers the gateway without a key.", CUSTOM, doors),
)  # fmt: skip
