"""The API as an OpenAPI document: ``GET /openapi.json``. Of the bodies only what the gateway itself reads is said."""

from typing import Any, Final

import msgspec

from block import __version__

_WHOLE: Final = {"type": ["integer", "null"]}
_YES_NO: Final = {"type": ["boolean", "null"]}
_NAME: Final = {"type": ["string", "null"]}
_LIMITS: Final = {
    "max_tokens": _WHOLE,
    "max_completion_tokens": _WHOLE,
    "max_output_tokens": _WHOLE,
    "priority": _WHOLE,
}
_READ: Final = {"model": _NAME, "stream": _YES_NO, "ignore_eos": _YES_NO, **_LIMITS}
_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": _NAME, "code": _NAME},
        }
    },
}
_MILLISECONDS: Final = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e9}
_GENERATING: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "/v1/chat/completions": ("Answer a chat", {"messages": {"type": "array"}}),
    "/v1/completions": ("Complete a prompt", {"prompt": {"type": ["string", "array", "null"]}}),
    "/v1/responses": ("Answer (Responses API)", {"input": {"type": ["string", "array", "null"]}}),
    "/v1/messages": ("Answer (Messages API)", {"messages": {"type": "array"}}),
}


def document() -> bytes:
    """The document as JSON."""
    paths: dict[str, Any] = {path: {"post": _generating(what, prompt)} for path, (what, prompt) in _GENERATING.items()}
    paths["/v1/models"] = {"get": _getting("The models of all instances")}
    paths["/v1/models/{name}"] = {"get": _getting("One model", parameter="name", missing="no such model")}
    paths["/v1/decisions/{id}"] = {
        "get": _getting("Why a request went where it went", parameter="id", missing="not kept, or never made")
    }
    paths["/v1/decisions"] = {"post": _generating("Where a request would go now; nothing is sent", {"prompt": {}})}
    for path, what in (("/health", "The process is there"), ("/live", "The same"), ("/metrics", "Prometheus")):
        paths[path] = {"get": _getting(what, plain=True)}
    paths["/ready"] = {
        "get": {"summary": "Requests can be answered", "responses": {"200": _said("yes"), "503": _said("no")}}
    }
    found = {
        "openapi": "3.1.0",
        "info": {"title": "Block", "version": __version__, "description": "OpenAI's API in front of several engines."},
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }
    return msgspec.json.encode(found)


def _generating(what: str, prompt: dict[str, Any]) -> dict[str, Any]:
    headers = [
        {"name": name, "in": "header", "schema": _MILLISECONDS, "description": f"Target for {of}."}
        for name, of in (
            ("x-slo-ttft-ms", "the first token"),
            ("x-slo-tpot-ms", "a token"),
            ("x-slo-e2e-ms", "the whole"),
        )
    ]
    body = {"type": "object", "properties": _READ | prompt, "additionalProperties": True}
    answers = {
        "200": {
            "description": "The instance's answer; with stream events of it.",
            "content": {"application/json": {}, "text/event-stream": {}},
        },
        "400": _said("not understood", error=True),
        "401": _said("the key is missing or wrong", error=True),
        "404": _said("no such model", error=True),
        "429": _said("too much at once; Retry-After says when", error=True),
    }
    return {
        "summary": what,
        "parameters": headers,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": answers | {"5XX": _said("no instance could answer", error=True)},
        "security": [{}, {"key": []}],
    }


def _getting(
    what: str, *, parameter: str | None = None, missing: str | None = None, plain: bool = False
) -> dict[str, Any]:
    answers: dict[str, Any] = {"200": {"description": what} if plain else _said(what)}
    if not plain:
        answers["401"] = _said("the key is missing or wrong", error=True)
    if missing is not None:
        answers["404"] = _said(missing, error=True)
    found: dict[str, Any] = {"summary": what, "responses": answers}
    if parameter is not None:
        found["parameters"] = [
            {"name": parameter, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ]
    return found


def _said(what: str, *, error: bool = False) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Error"} if error else {"type": "object"}
    return {"description": what, "content": {"application/json": {"schema": schema}}}
