"""Limits: what is too large, too slow, too deep or too much is refused in good order."""

import asyncio
from typing import Final

from block.conformance.check import CUSTOM, OPENAI, RFC9110, Check, FailedError, NotApplicableError, expect
from block.conformance.target import CHAT, Target

_FLOOD: Final = 64


async def _refused(target: Target, sent: bytes) -> None:
    """The bytes must get a 4xx or a closed connection, and the next request must be served."""
    async with target.wire() as wire:
        await wire.send(sent)
        await wire.read_answers(1)
        expect(wire.answers or wire.closed, "neither an answer nor an end of the connection comes")
        expect(not wire.answers or 400 <= wire.statuses[0] < 500, f"it gets {wire.statuses[:1]}")
    await target.still_serves()


async def large_header(target: Target) -> None:
    await _refused(target, target.head("GET", "/v1/models", "X-Large: " + "a" * 1_000_000))


async def many_headers(target: Target) -> None:
    await _refused(target, target.head("GET", "/v1/models", *(f"X-{n}: 1" for n in range(50_000))))


async def long_target(target: Target) -> None:
    await _refused(target, target.head("GET", "/v1/models?" + "a" * 1_000_000))


async def huge_body(target: Target) -> None:
    await _refused(target, target.head("POST", CHAT, "Content-Length: 1000000000000000"))


async def deep_json(target: Target) -> None:
    depth = 100_000
    content = b'{"model": "m", "messages": ' + b"[" * depth + b"]" * depth + b"}"
    status = (await target.ask("POST", CHAT, content=content)).status
    expect(400 <= status < 500, f"{depth:,} nested lists get {status}")
    await target.still_serves()


async def expect_continue(target: Target) -> None:
    whole = target.post(target.chat(), "Expect: 100-continue")
    head_end = whole.index(b"\r\n\r\n") + 4
    async with target.wire() as wire:
        await wire.send(whole[:head_end])
        for _ in range(20):
            if wire.interim or wire.answers or not await wire.read(target.timeout_s / 20):
                break
        expect(wire.interim or wire.answers, "a client that waits for 100 Continue waits for ever")
        if wire.interim:
            await wire.send(whole[head_end:])
            status = (await wire.answer()).status
            expect(status == 200, f"after 100 Continue the request gets {status}")


async def slow_head(target: Target) -> None:
    if not target.patience_s:
        raise NotApplicableError("it takes long: give --patience SECONDS (more than the gateway's own limit)")
    async with target.wire() as wire:
        await wire.send(b"GET /health HTTP/1.1\r\nHost: a\r\nX-Slow: ")
        waiting = asyncio.create_task(wire.ends(target.patience_s))
        while not waiting.done():
            await wire.send(b"a")
            await asyncio.wait([waiting], timeout=0.5)
        expect(waiting.result(), f"a head that comes byte by byte is waited for {target.patience_s:g} s and more")


async def flood(target: Target) -> None:
    answers = await asyncio.gather(
        *(target.ask("POST", CHAT, target.chat(max_tokens=1)) for _ in range(_FLOOD)), return_exceptions=True
    )
    for answer in answers:
        if isinstance(answer, BaseException):
            raise FailedError(f"one of {_FLOOD} requests at once got no answer: {type(answer).__name__}")
        expect(answer.status in (200, 429, 503), f"one of {_FLOOD} requests at once got {answer.status}")
        if answer.status == 429:
            expect(answer.fields.get("retry-after", "").isdigit(), "a 429 has no Retry-After in seconds")
            answer.json()
    await target.still_serves()


_RFC6585: Final = "https://www.rfc-editor.org/rfc/rfc6585#section-5"
CHECKS: Final = (
    Check("large-header", "A header of 1 MB is refused with a 4xx.", _RFC6585, large_header),
    Check("many-headers", "50,000 headers are refused with a 4xx.", RFC9110 + "5.4", many_headers),
    Check("long-target", "A request target of 1 MB is refused with a 4xx.", RFC9110 + "15.5.15", long_target),
    Check("huge-body", "A body announced as 1 PB is refused before it is sent.", RFC9110 + "15.5.14", huge_body, required=False),
    Check("deep-json", "JSON nested 100,000 deep gets a 4xx and breaks nothing.", CUSTOM, deep_json),
    Check("expect-continue", "A client that waits for 100 Continue gets it, or an answer.", RFC9110 + "10.1.1", expect_continue),
    Check("slow-head", "A head that comes byte by byte is not waited for without end.", CUSTOM, slow_head, required=False),
    Check("flood", "Of 64 requests at once each is served or told 429 with Retry-After.", OPENAI + "guides/rate-limits", flood),
)  # fmt: skip
