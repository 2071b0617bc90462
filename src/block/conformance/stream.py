"""Server-sent events: framing, order, end, and that nobody buffers them."""

import json
from time import monotonic
from typing import Any, Final

from block.conformance.check import OPENAI, RFC9112, SSE, Check, FailedError, NotApplicableError, expect
from block.conformance.target import CHAT, Target
from block.conformance.wire import Answer

_BUFFERING_TOKENS: Final = 64
_BUFFERING_SEEN_S: Final = 0.05


async def streamed(target: Target, path: str = CHAT, **fields: Any) -> Answer:
    """A streamed answer read from the socket; FailedError unless it is a whole 200."""
    async with target.wire() as wire:
        await wire.send(target.post(target.chat(stream=True, **fields), path=path))
        answer = await wire.answer()
    expect(answer.status == 200, f"the stream gets {answer.status}: {answer.body[:80]!r}")
    return answer


def payloads(answer: Answer) -> list[str]:
    """What the events carry, in order; comments are left out.

    Raises:
        FailedError: an event is no ``data`` line, or the last one is not ended by an empty line.
    """
    text = answer.body.decode("utf-8", "replace").replace("\r\n", "\n")
    expect(text.endswith("\n\n"), f"the last event is not ended by an empty line: {text[-60:]!r}")
    found = []
    for event in text.split("\n\n"):
        lines = [line for line in event.split("\n") if line and not line.startswith(":")]
        payload = [line for line in lines if line.startswith("data:")]
        if lines and not payload:
            raise FailedError(f"an event without a data line: {event[:80]!r}")
        if payload:
            found.append("\n".join(line.removeprefix("data:").removeprefix(" ") for line in payload))
    return found


def chunks(answer: Answer) -> list[dict[str, Any]]:
    """The JSON of all events except ``[DONE]``."""
    found = []
    for payload in payloads(answer):
        if payload == "[DONE]":
            continue
        try:
            value = json.loads(payload)
        except ValueError:
            raise FailedError(f"an event is not JSON: {payload[:80]!r}") from None
        expect(isinstance(value, dict), f"an event is no object: {payload[:80]!r}")
        found.append(value)
    expect(found, "there is no event")
    return found


async def content_type(target: Target) -> None:
    found = (await streamed(target)).content_type
    expect(found == "text/event-stream", f"it is {found or 'missing'!r}")


async def framing(target: Target) -> None:
    for chunk in chunks(await streamed(target)):
        expect(chunk.get("object") == "chat.completion.chunk", f"object is {chunk.get('object')!r}")
        expect(isinstance(chunk.get("choices"), list), "an event has no choices")


async def done(target: Target) -> None:
    found = payloads(await streamed(target))
    expect(found.count("[DONE]") == 1, f"it comes {found.count('[DONE]')} times")
    expect(found[-1] == "[DONE]", f"after it comes {found[-1][:80]!r}")


async def finish_reason(target: Target) -> None:
    reasons = [c.get("finish_reason") for chunk in chunks(await streamed(target)) for c in chunk.get("choices", [])]
    given = [reason for reason in reasons if reason is not None]
    expect(len(given) == 1 and reasons[-1] is not None, f"finish reasons are {given}, the last choice's {reasons[-1:]}")


async def one_id(target: Target) -> None:
    ids = {str(chunk.get("id")) for chunk in chunks(await streamed(target))}
    expect(len(ids) == 1 and "None" not in ids, f"there are {len(ids)} ids: {sorted(ids)[:3]}")


async def usage(target: Target) -> None:
    last = chunks(await streamed(target, stream_options={"include_usage": True}))[-1]
    expect(isinstance(last.get("usage"), dict), "the last event has no usage")
    expect(last.get("choices") == [], "the event with the usage has choices")
    counted = last["usage"].get("completion_tokens")
    expect(isinstance(counted, int) and 1 <= counted <= 4, f"completion_tokens is {counted!r} of at most 4")


async def completions(target: Target) -> None:
    answer = await streamed(target, "/v1/completions", messages=None, prompt="Say hello.")
    for chunk in chunks(answer):
        texts = [choice.get("text") for choice in chunk.get("choices", [])]
        expect(all(isinstance(text, str) for text in texts), f"a choice has no text: {chunk}")
    expect(payloads(answer)[-1] == "[DONE]", "it does not end with [DONE]")


async def not_buffered(target: Target) -> None:
    began_s = monotonic()
    answer = await streamed(target, max_tokens=_BUFFERING_TOKENS, ignore_eos=True)
    took_s = monotonic() - began_s
    events = [at_s for at_s, part in answer.parts if b"data:" in part]
    expect(events, "there is no event")
    if took_s < _BUFFERING_SEEN_S or answer.body.count(b"data:") < 8:
        raise NotApplicableError(f"the stream is over in {took_s * 1e3:.0f} ms, too quick to tell")
    spread = (events[-1] - events[0]) / took_s
    expect(spread > 0.1, f"all events came in the last {spread:.0%} of {took_s:.2f} s")


async def length_framing(target: Target) -> None:
    fields = (await streamed(target)).fields
    expect("content-length" not in fields, "a stream has a content-length")
    coding = fields.get("transfer-encoding")
    expect(coding == "chunked" or fields.get("connection") == "close", f"its transfer-encoding is {coding!r}")


_STREAM: Final = OPENAI + "api-reference/chat-streaming"
CHECKS: Final = (
    Check("content-type", "A stream's content-type is text/event-stream.", SSE, content_type),
    Check("framing", "Every event is a data line with a JSON chunk, ended by an empty line.", _STREAM, framing),
    Check("done", "A whole stream ends with one data: [DONE] and nothing after it.", _STREAM, done),
    Check("finish-reason", "Exactly one event, the last with a choice, carries a finish_reason.", _STREAM, finish_reason),
    Check("one-id", "All events of a stream carry the same id.", _STREAM, one_id, required=False),
    Check("usage", "With include_usage the last event has the usage and no choices.", _STREAM, usage),
    Check("completions", "/v1/completions streams text choices and ends with [DONE].", _STREAM, completions),
    Check("not-buffered", "Events arrive while the answer is made, not at its end.", SSE, not_buffered),
    Check("stream-framing", "A stream is chunked, or ends with the connection.", RFC9112 + "6.3", length_framing),
)  # fmt: skip
