"""Errors: the right status, and OpenAI's error object with it."""

from typing import Any, Final

from block.conformance.check import CUSTOM, OPENAI, RFC9110, Check, FailedError, NotApplicableError, expect
from block.conformance.target import CHAT, Target
from block.conformance.wire import Answer

NO_MODEL: Final = "no-such-model-0b5e"


def check_error(answer: Answer, *statuses: int) -> None:
    """Raise FailedError unless the answer has one of these statuses and OpenAI's error object."""
    wanted = " or ".join(map(str, statuses))
    expect(answer.status in statuses, f"it gets {answer.status} instead of {wanted}")
    expect(answer.content_type == "application/json", f"its content-type is {answer.content_type or 'missing'!r}")
    body = answer.json()
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        raise FailedError(f'no {{"error": {{...}}}} in {answer.body[:80]!r}')
    for name in ("message", "type"):
        expect(isinstance(error.get(name), str) and error[name], f"error.{name} is missing or no text")
    missing = [name for name in ("param", "code") if name not in error]
    expect(not missing, f"error.{' and error.'.join(missing)} is missing")


async def invalid_json(target: Target) -> None:
    check_error(await target.ask("POST", CHAT, content=b'{"model": '), 400)


async def not_an_object(target: Target) -> None:
    check_error(await target.ask("POST", CHAT, content=b"[1, 2]"), 400, 422)


async def not_utf8(target: Target) -> None:
    content = b'{"model": "\xff\xfe", "messages": []}'
    check_error(await target.ask("POST", CHAT, content=content), 400, 404, 422)


async def wrong_type(target: Target) -> None:
    check_error(await target.ask("POST", CHAT, target.chat(messages=7)), 400, 422)


async def messages_missing(target: Target) -> None:
    check_error(await target.ask("POST", CHAT, target.chat(messages=None)), 400, 422)


async def bad_limit(target: Target) -> None:
    check_error(await target.ask("POST", CHAT, target.chat(max_tokens=-1)), 400, 422)


async def unknown_model(target: Target) -> None:
    check_error(await target.ask("POST", CHAT, target.chat(model=NO_MODEL)), 404)


async def unknown_model_code(target: Target) -> None:
    error: Any = (await target.ask("POST", CHAT, target.chat(model=NO_MODEL))).json()
    code = error["error"].get("code") if isinstance(error, dict) and isinstance(error.get("error"), dict) else None
    expect(code == "model_not_found", f"error.code is {code!r}")


async def unknown_model_streamed(target: Target) -> None:
    check_error(await target.ask("POST", CHAT, target.chat(model=NO_MODEL, stream=True)), 404)


async def unknown_path(target: Target) -> None:
    status = (await target.ask("GET", "/v1/no-such-thing")).status
    expect(status == 404, f"it gets {status}")


async def unknown_path_object(target: Target) -> None:
    check_error(await target.ask("GET", "/v1/no-such-thing"), 404)


async def wrong_method(target: Target) -> None:
    status = (await target.ask("DELETE", CHAT)).status
    expect(status in (404, 405), f"DELETE {CHAT} gets {status}")


async def key_missing(target: Target) -> None:
    if target.api_key is None:
        raise NotApplicableError("no --api-key was given")
    check_error(await target.ask("POST", CHAT, target.chat(), key=None), 401)


async def key_wrong(target: Target) -> None:
    if target.api_key is None:
        raise NotApplicableError("no --api-key was given")
    for wrong in (target.api_key + "x", target.api_key[:-1], "x"):
        check_error(await target.ask("POST", CHAT, target.chat(), key=wrong), 401)


_OBJECT: Final = OPENAI + "guides/error-codes"
CHECKS: Final = (
    Check("invalid-json", "A body that is not JSON gets 400 and an error object.", _OBJECT, invalid_json),
    Check("not-an-object", "A JSON body that is no object gets 400 or 422 and an error object.", _OBJECT, not_an_object),
    Check("not-utf8", "A body that is not UTF-8 gets a 4xx and an error object, never a 500.", _OBJECT, not_utf8),
    Check("wrong-type", "A field of the wrong type gets 400 or 422 and an error object.", _OBJECT, wrong_type),
    Check("messages-missing", "A chat request without messages gets 400 or 422.", _OBJECT, messages_missing),
    Check("bad-limit", "A negative max_tokens gets 400 or 422 and an error object.", _OBJECT, bad_limit),
    Check("unknown-model", "A model that nobody serves gets 404 and an error object.", _OBJECT, unknown_model),
    Check("unknown-model-code", "Its error.code is model_not_found.", _OBJECT, unknown_model_code, required=False),
    Check("unknown-model-streamed", "So it is for a streamed request: no stream begins.", _OBJECT, unknown_model_streamed),
    Check("unknown-path", "A path that does not exist gets 404.", RFC9110 + "15.5.5", unknown_path),
    Check("unknown-path-object", "With an error object.", CUSTOM, unknown_path_object, required=False),
    Check("wrong-method", "A method that a route does not have gets 405 or 404.", RFC9110 + "15.5.6", wrong_method),
    Check("key-missing", "Without the API key a request gets 401 and an error object.", _OBJECT, key_missing),
    Check("key-wrong", "With a wrong API key, be it nearly right, it gets 401.", _OBJECT, key_wrong),
)  # fmt: skip
