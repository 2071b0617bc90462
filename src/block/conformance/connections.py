"""Connections: kept, closed and pipelined as HTTP/1.1 says."""

import asyncio
from typing import Final

from block.conformance.check import RFC9110, RFC9112, Check, expect
from block.conformance.target import CHAT, Target

_NOWHERE: Final = "/v1/no-such-thing"


async def keep_alive(target: Target) -> None:
    async with target.wire() as wire:
        for n in range(3):
            await wire.send(target.post(target.chat()))
            answer = await wire.answer()
            expect(answer.status == 200, f"request {n + 1} of a connection gets {answer.status}")


async def after_stream(target: Target) -> None:
    async with target.wire() as wire:
        await wire.send(target.post(target.chat(stream=True)))
        closes = (await wire.answer()).fields.get("connection", "").lower() == "close"
        await wire.send(target.head("GET", _NOWHERE))
        expect(not closes, "the connection is closed after a stream")
        status = (await wire.answer()).status
        expect(status == 404, f"the request after a stream gets {status} instead of 404")


async def close_honoured(target: Target) -> None:
    async with target.wire() as wire:
        await wire.send(target.head("GET", "/v1/models", "Connection: close"))
        await wire.answer()
        expect(await wire.ends(target.quiet_s * 4), "the connection stays open")


async def http10(target: Target) -> None:
    async with target.wire() as wire:
        await wire.send(target.head("GET", "/v1/models", version="1.0"))
        answer = await wire.answer()
        expect("transfer-encoding" not in answer.fields, "an HTTP/1.0 client gets a chunked answer")
        expect(await wire.ends(target.quiet_s * 4), "the connection stays open")


async def http10_stream(target: Target) -> None:
    async with target.wire() as wire:
        await wire.send(target.post(target.chat(stream=True), version="1.0"))
        expect(await wire.ends(target.timeout_s), "the connection stays open")
        head, _, body = wire.received.partition(b"\r\n\r\n")
    expect(b" 200 " in head.split(b"\r\n")[0], f"it gets {head[:40]!r}")
    expect(b"transfer-encoding" not in head.lower(), "an HTTP/1.0 client gets a chunked stream")
    expect(body.startswith((b"data:", b":", b"event:")) and b"[DONE]" in body[-20:], "the stream is not whole")


async def absolute_target(target: Target) -> None:
    async with target.wire() as wire:
        await wire.send(
            target.head("GET", "/v1/models").replace(b"GET /", b"GET http://%b/" % target.netloc.encode(), 1)
        )
        status = (await wire.answer()).status
    expect(status == 200, f"it gets {status}")


async def pipelined(target: Target) -> None:
    models, nowhere = target.head("GET", "/v1/models"), target.head("GET", _NOWHERE)
    async with target.wire() as wire:
        await wire.send(models + nowhere + models)
        statuses = [answer.status for answer in await wire.read_answers(3)]
        expect(wire.broken is None, wire.broken or "")
    expect(statuses == [200, 404, 200], f"instead of 200, 404, 200 come {statuses}")


async def pipelined_behind_stream(target: Target) -> None:
    async with target.wire() as wire:
        await wire.send(target.post(target.chat(stream=True)) + target.head("GET", _NOWHERE))
        answers = await wire.read_answers(2)
        expect(wire.broken is None, wire.broken or "")
    expect([answer.status for answer in answers] == [200, 404], f"instead of 200, 404 come {wire.statuses}")
    expect(b"[DONE]" in answers[0].body[-20:], "the stream in front is not whole")


async def unread_body(target: Target) -> None:
    hidden = target.head("GET", "/v1/models")
    async with target.wire() as wire:
        await wire.send(target.post(hidden, path=_NOWHERE))
        await wire.read_until_quiet(target.quiet_s)
    expect(
        wire.statuses in ([404], [405], [400], [401]),
        f"a POST to nowhere with a request as its body gets {wire.statuses}",
    )


async def after_error(target: Target) -> None:
    async with target.wire() as wire:
        await wire.send(target.post(b'{"model": '))
        first = await wire.answer()
        if first.fields.get("connection", "").lower() == "close":
            expect(await wire.ends(target.quiet_s * 4), "the answer says close and the connection stays open")
            return
        await wire.send(target.post(target.chat()))
        status = (await wire.answer()).status
        expect(status == 200, f"after an error answer the next request gets {status}")


async def head_method(target: Target) -> None:
    async with target.wire() as wire:
        await wire.send(target.head("HEAD", "/v1/models", "Connection: close"))
        await wire.ends(target.quiet_s * 4)
        head, empty, body = wire.received.partition(b"\r\n\r\n")
    expect(head.startswith(b"HTTP/1.") and empty, "no answer comes")
    expect(not body, f"an answer to HEAD has a body: {body[:60]!r}")


async def chunked_request(target: Target) -> None:
    content = target.post(target.chat()).partition(b"\r\n\r\n")[2]
    head = target.head("POST", CHAT, "Content-Type: application/json", "Transfer-Encoding: chunked")
    half = len(content) // 2
    pieces = b"".join(b"%x;note=1\r\n%b\r\n" % (len(part), part) for part in (content[:half], content[half:]))
    async with target.wire() as wire:
        await wire.send(head + pieces + b"0\r\n\r\n")
        status = (await wire.answer()).status
    expect(status == 200, f"it gets {status}")


async def in_pieces(target: Target) -> None:
    sent = target.post(target.chat())
    async with target.wire() as wire:
        for start in range(0, len(sent), 37):
            await wire.send(sent[start : start + 37])
            await asyncio.sleep(0.002)
        status = (await wire.answer()).status
    expect(status == 200, f"it gets {status}")


CHECKS: Final = (
    Check("keep-alive", "A connection serves one request after the other.", RFC9112 + "9.3", keep_alive),
    Check("keep-alive-after-stream", "It does so after a stream too.", RFC9112 + "9.3", after_stream, required=False),
    Check("keep-alive-after-error", "After an error a connection is of use, or says that it closes.", RFC9112 + "9.6", after_error),
    Check("close-honoured", "A connection whose client says close is closed after the answer.", RFC9112 + "9.6", close_honoured),
    Check("http-1.0", "HTTP/1.0 clients get an unchunked answer and the connection's end.", RFC9112 + "6.1", http10),
    Check("http-1.0-stream", "A stream for an HTTP/1.0 client has no chunks and ends with the connection (nginx asks so).",
          RFC9112 + "6.1", http10_stream, required=False),
    Check("absolute-target", "A target that is a whole URL is taken.", RFC9112 + "3.2.2", absolute_target),
    Check("pipelined", "Requests sent at once are answered in their order.", RFC9112 + "9.3.2", pipelined),
    Check("pipelined-behind-stream", "A request behind a stream waits for its end.", RFC9112 + "9.3.2", pipelined_behind_stream),
    Check("unread-body", "A refused request's body is never taken for the next request.", RFC9112 + "9.3", unread_body),
    Check("head-without-body", "An answer to HEAD has no body.", RFC9110 + "9.3.2", head_method),
    Check("chunked-request", "A chunked request body, with chunk extensions, is taken.", RFC9112 + "7.1", chunked_request),
    Check("in-pieces", "A request that arrives in small pieces is one request.", RFC9112 + "2.2", in_pieces),
)  # fmt: skip
