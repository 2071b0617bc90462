"""Headers: ids, types, caching, and tolerance for what is not known."""

from typing import Final

from block.conformance.check import CUSTOM, OPENAI, RFC9110, RFC9112, Check, expect
from block.conformance.failures import NO_MODEL
from block.conformance.stream import streamed
from block.conformance.target import CHAT, Target

_ID: Final = "conformance-4f1c.77"


async def id_kept(target: Target) -> None:
    found = (await target.ask("POST", CHAT, target.chat(), headers={"x-request-id": _ID})).fields.get("x-request-id")
    expect(found == _ID, f"{_ID} was sent, {found!r} came back")


async def id_made(target: Target) -> None:
    ids = [(await target.ask("POST", CHAT, target.chat())).fields.get("x-request-id") for _ in range(2)]
    expect(all(ids), "an answer has no x-request-id")
    expect(ids[0] != ids[1], f"two answers have the same id {ids[0]!r}")


async def id_on_errors(target: Target) -> None:
    answer = await target.ask("POST", CHAT, target.chat(model=NO_MODEL), headers={"x-request-id": _ID})
    found = answer.fields.get("x-request-id")
    expect(found == _ID, f"the {answer.status} answer has x-request-id {found!r}")


async def allowed_methods(target: Target) -> None:
    answer = await target.ask("DELETE", CHAT)
    expect(answer.status in (404, 405), f"DELETE gets {answer.status}")
    if answer.status == 405:
        expect("post" in answer.fields.get("allow", "").lower(), f"Allow is {answer.fields.get('allow')!r}")


async def long_id(target: Target) -> None:
    status = (await target.ask("POST", CHAT, target.chat(), headers={"x-request-id": "a" * 4000})).status
    expect(status < 500, f"an id of 4,000 characters gets {status}")
    await target.still_serves()


async def json_type(target: Target) -> None:
    answer = await target.ask("POST", CHAT, target.chat())
    expect(answer.status == 200, f"a plain request gets {answer.status}")
    expect(answer.content_type == "application/json", f"it is {answer.content_type!r}")
    body = answer.json()
    kind = body.get("object") if isinstance(body, dict) else None
    expect(kind == "chat.completion", f"object is {kind!r}")
    expect(isinstance(body.get("usage"), dict), "the answer has no usage")


async def unknown_header(target: Target) -> None:
    status = (await target.ask("POST", CHAT, target.chat(), headers={"x-nobody-knows-this": "1"})).status
    expect(status == 200, f"it gets {status}")


async def unknown_field(target: Target) -> None:
    status = (await target.ask("POST", CHAT, target.chat(nobody_knows_this=1))).status
    expect(status == 200, f"it gets {status}")


async def no_cache(target: Target) -> None:
    found = (await streamed(target)).fields.get("cache-control", "")
    expect("no-cache" in found or "no-store" in found, f"cache-control is {found!r}")


async def accel(target: Target) -> None:
    found = (await streamed(target)).fields.get("x-accel-buffering")
    expect(found == "no", f"it is {found!r}")


async def one_length(target: Target) -> None:
    async with target.wire() as wire:
        await wire.send(target.post(target.chat()))
        answer = await wire.answer()
    both = {"content-length", "transfer-encoding"} & answer.fields.keys()
    expect(len(both) < 2, "an answer has a content-length and a transfer-encoding")
    twice = answer.duplicates & {"content-length", "transfer-encoding", "content-type", "date", "x-request-id"}
    expect(not twice, f"an answer has more than one {', '.join(sorted(twice))}")


_CHAT_OBJECT: Final = OPENAI + "api-reference/chat/object"
CHECKS: Final = (
    Check("json-type", "A whole answer is application/json, a chat.completion with usage.", _CHAT_OBJECT, json_type),
    Check("request-id-kept", "The x-request-id that a client sends comes back.", CUSTOM, id_kept, required=False),
    Check("request-id-made", "Without one each answer gets an id of its own.", CUSTOM, id_made, required=False),
    Check("request-id-on-errors", "Errors carry the client's x-request-id too.", CUSTOM, id_on_errors, required=False),
    Check("request-id-long", "A very long x-request-id never causes a 5xx.", CUSTOM, long_id),
    Check("allow", "Who uses a method that is not allowed is told which are.", RFC9110 + "15.5.6", allowed_methods, required=False),
    Check("unknown-header", "A header that nobody knows does no harm.", RFC9110 + "5.1", unknown_header),
    Check("unknown-field", "A body field that the gateway does not know does no harm.", CUSTOM, unknown_field, required=False),
    Check("no-cache", "Streams forbid caching.", CUSTOM, no_cache, required=False),
    Check("accel-buffering", "Streams carry x-accel-buffering: no.", CUSTOM, accel, required=False),
    Check("one-length", "An answer never has two lengths, nor doubled singleton headers.", RFC9112 + "6.2", one_length),
)  # fmt: skip
