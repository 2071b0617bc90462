"""A stream whose instance dies goes on elsewhere: the client sees one answer, token for token the one it would have got."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from block.core import Request
from block.emulate import tokens
from block.emulate.config import EmulateConfig
from block.engine.limits import EngineLimits
from block.gateway.wire.continuation import TOKENS_MAX, Tape, tape_of
from emulate.conftest import profile
from emulate.served import serving
from gateway.conftest import Client, Start, until
from gateway.fakes import STREAM_HEAD, Behave, FakeEngine, Heard, chunk

__all__ = ["profile"]
TOKENS = 120
SLOW = 0.1
"""Steps of 15 ms: on a busy host, too, an order to break comes before a stream's end."""


class Emulated:
    """An emulated engine as ``start`` wants its engines."""

    def __init__(self, profile: str, speed: float = 1.0) -> None:
        self._config = EmulateConfig(
            limits=EngineLimits(), profile=profile, speed=speed, models=("fake",), allow_faults=True
        )
        self._stack = contextlib.AsyncExitStack()
        self.port = 0
        self.url = ""

    async def start(self) -> "Emulated":
        self.url = await self._stack.enter_async_context(serving(self._config))
        self.port = int(self.url.rsplit(":", 1)[1])
        return self

    async def stop(self) -> None:
        await self._stack.aclose()

    async def fault(self, **fault: Any) -> None:
        async with aiohttp.ClientSession() as session, session.post(self.url + "/emulate/fault", json=fault) as answer:
            assert answer.status == 200


def completion(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"prompt": "Once upon a time", "temperature": 0, **fields}


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {
        "messages": [{"role": "user", "content": "Tell me more"}],
        "temperature": 0,
        **fields,
    }


ASKED = {
    "completion": completion(max_tokens=TOKENS),
    "completion of ids": completion(prompt=[5, 6, 7, 8], max_tokens=TOKENS),
    "completion with seed and usage": completion(
        max_tokens=TOKENS, temperature=0.7, seed=11, stream_options={"include_usage": True}
    ),
    "chat": chat(max_completion_tokens=TOKENS),
    "chat with usage in every event": chat(
        max_tokens=TOKENS, stream_options={"include_usage": True, "continuous_usage_stats": True}
    ),
}


async def streamed(
    url: str, path: str, body: dict[str, Any], after: Callable[[int], Awaitable[None]] | None = None
) -> tuple[list[dict[str, Any]], bytes]:
    """The events of an answer and its raw bytes; ``after`` is told how many events have come."""
    body = {"model": "fake", "stream": True, "ignore_eos": True, **body}
    raw = b""
    async with aiohttp.ClientSession() as session, session.post(url + path, json=body) as answer:
        assert answer.status == 200, await answer.read()
        async for part in answer.content.iter_any():
            raw += part
            if after is not None:
                await after(raw.count(b"data:"))
    *events, done, rest = raw.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    return [json.loads(event.removeprefix(b"data: ")) for event in events], raw


async def undisturbed(profile: str, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of the answer that no engine breaks off."""
    engine = await Emulated(profile).start()
    try:
        return (await streamed(engine.url, path, body))[0]
    finally:
        await engine.stop()


def seen(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client makes of the events of one answer."""
    choices = [choice for event in events for choice in event["choices"]]
    text = "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)
    return {
        "text": text,
        "indices": {choice["index"] for choice in choices},
        "finish": [choice["finish_reason"] for choice in choices if choice["finish_reason"]],
        "objects": {event["object"] for event in events},
        "roles": [c["delta"]["role"] for c in choices if "role" in c.get("delta", {})],
        "usage": [event["usage"] for event in events if event.get("usage")][-1:],
    }


class Breaker:
    """Breaks the streams of the engine that has some, each time that so many events more have come."""

    def __init__(self, client: Client, engines: list[Emulated], every: int, times: int) -> None:
        self._pool = client.gateway.pool
        self._engines, self._every, self._left, self._next = engines, every, times, every

    async def __call__(self, events: int) -> None:
        if self._left and events >= self._next:
            self._left -= 1
            self._next = events + self._every
            busy = next(i for i in self._pool.instances.values() if i.in_flight)
            await next(e for e in self._engines if e.url == busy.config.url).fault(kind="break")


@pytest.mark.parametrize("name", ASKED)
async def test_a_broken_stream_goes_on_elsewhere_as_if_nothing_had_happened(
    start: Start, profile: str, name: str
) -> None:
    path, body = ASKED[name]
    engines = [Emulated(profile, SLOW), Emulated(profile, SLOW)]
    client = await start(*engines, continue_streams=3, cb_failure_threshold=100)
    whole = await undisturbed(profile, path, body)
    got, raw = await streamed(client.url, path, body, Breaker(client, engines, 10, 3))
    assert seen(got) == seen(whole)
    assert len({event["id"] for event in got}) == len({event["created"] for event in got}) == 1
    assert b"token_ids" not in raw.replace(b'"token_ids":null', b"").replace(b'"prompt_token_ids":null', b"")
    assert await client.metric("block_stream_continued_total") == 3
    assert await client.metric("block_stream_broken_total") == 0


async def test_a_client_that_wants_token_ids_gets_them_all(start: Start, profile: str) -> None:
    engines = [Emulated(profile, SLOW), Emulated(profile, SLOW)]
    client = await start(*engines, continue_streams=1)
    path, body = completion(max_tokens=60, return_token_ids=True)
    whole = await undisturbed(profile, path, body)
    got, _ = await streamed(client.url, path, body, Breaker(client, engines, 10, 1))

    def ids(events: list[dict[str, Any]]) -> list[int]:
        return [i for event in events for choice in event["choices"] for i in choice["token_ids"]]

    assert ids(got) == ids(whole)
    assert len(ids(got)) == 60
    assert got[0]["choices"][0]["prompt_token_ids"] == whole[0]["choices"][0]["prompt_token_ids"]


@pytest.mark.parametrize(
    "fields",
    [{"stop": ["x"]}, {"n": 2}, {"logprobs": 1}, {"echo": True}, {"frequency_penalty": 0.5}, {"guided_json": {}},
     {"tools": [{}]}, {"response_format": {"type": "json_object"}}, {"prompt": ["a", "b"]}, {"unheard_of": 1},
     {"max_tokens": "16"}, {"min_tokens": 2.0}],
)  # fmt: skip
def test_what_cannot_be_exact_is_not_continued(fields: dict[str, Any]) -> None:
    _, body = completion(**fields)
    assert (
        tape_of(b"/v1/completions", json.dumps(body).encode(), Request(id="x", arrived_s=0.0, prompt_tokens=4)) is None
    )


async def test_a_stream_that_cannot_be_continued_ends_with_an_error_event(start: Start, profile: str) -> None:
    engines = [Emulated(profile, SLOW), Emulated(profile, SLOW)]
    client = await start(*engines, continue_streams=3)
    breaker = Breaker(client, engines, 10, 1)
    path, body = completion(max_tokens=TOKENS, presence_penalty=1.0)
    with pytest.raises(AssertionError, match="instance_failed"):
        await streamed(client.url, path, body, breaker)


async def test_continuation_is_bounded_a_stream(start: Start, profile: str) -> None:
    engines = [Emulated(profile, SLOW), Emulated(profile, SLOW)]
    client = await start(*engines, continue_streams=2, cb_failure_threshold=100)
    path, body = completion(max_tokens=TOKENS)
    with pytest.raises(AssertionError, match="instance_failed"):
        await streamed(client.url, path, body, Breaker(client, engines, 10, 3))
    assert await client.metric("block_stream_broken_total") == 1


async def test_off_it_changes_nothing_on_the_way(start: Start) -> None:
    engine = FakeEngine()
    await complete(await start(engine))
    assert "return_token_ids" not in engine.heard[0].json


def told(ids: list[int], text: str = "a", finish: str | None = None, prompt: list[int] | None = None) -> bytes:
    """An event as vLLM writes it."""
    choice = {
        "index": 0,
        "text": text,
        "logprobs": None,
        "finish_reason": finish,
        "stop_reason": None,
        "token_ids": ids,
    }
    if prompt is not None:
        choice["prompt_token_ids"] = prompt
    return (
        b"data: "
        + json.dumps({"id": "c", "object": "text_completion", "created": 1, "choices": [choice]}).encode()
        + b"\n\n"
    )


async def dies_after_two(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD + chunk(told([1], "one ", prompt=[9, 9])) + chunk(told([2], "two ")))
    await writer.drain()
    await asyncio.sleep(0.02)
    writer.transport.abort()


async def ends_it(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD + chunk(told([3], "three", "stop", prompt=[9, 9, 1, 2])) + chunk(b"data: [DONE]\n\n"))
    writer.write(b"0\r\n\r\n")


def one_after_the_other(*behaviours: Behave) -> tuple[FakeEngine, FakeEngine]:
    """Two engines, whichever is asked first: the n-th request to either meets the n-th behaviour."""
    left = list(behaviours)

    async def behave(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
        await left.pop(0)(engine, heard, writer)

    return FakeEngine(behave), FakeEngine(behave)


async def complete(client: Client, **fields: Any) -> bytes:
    """The bytes of a streamed completion."""
    body = {"model": "fake", "prompt": "x", "stream": True, **fields}
    async with client.session.post(client.url + "/v1/completions", json=body) as answer:
        return await answer.read()


def text_of(body: bytes) -> str:
    events = [json.loads(e[5:]) for e in body.split(b"\n\n") if e.startswith(b"data: {")]
    return "".join(choice["text"] for event in events for choice in event["choices"])


async def test_the_rest_is_asked_for_by_token_ids_and_with_less_to_generate(start: Start) -> None:
    engines = one_after_the_other(dies_after_two, ends_it)
    body = await complete(await start(*engines, continue_streams=1), max_tokens=10, min_tokens=3)
    assert text_of(body) == "one two three"
    assert body.endswith(b"data: [DONE]\n\n")
    first, rest = sorted((engine.heard[0] for engine in engines), key=lambda heard: heard.json["min_tokens"] == 1)
    assert (rest.json["prompt"], rest.json["max_tokens"], rest.json["min_tokens"]) == ([9, 9, 1, 2], 8, 1)
    assert rest.headers["x-block-continued-tokens"] == "2"
    assert rest.headers["x-request-id"] == first.headers["x-request-id"]


@pytest.mark.parametrize(
    "end",
    [b'data: {"error":{"message":"EngineDeadError"}}\n\n', told([], "", "abort"), b""],
    ids=["error", "abort", "end"],
)
async def test_an_instance_that_gives_up_in_good_form_is_replaced_too(start: Start, end: bytes) -> None:
    async def gives_up(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + chunk(told([1], "one ", prompt=[9, 9])) + chunk(told([2], "two ")))
        writer.write((chunk(end) + chunk(b"data: [DONE]\n\n") if end else b"") + b"0\r\n\r\n")

    client = await start(*one_after_the_other(gives_up, ends_it), continue_streams=1)
    assert text_of(await complete(client)) == "one two three"


async def test_an_instance_that_dies_behind_its_last_token_costs_nothing(start: Start) -> None:
    async def forgets_the_end(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + chunk(told([1], "one", "stop", prompt=[9, 9])))
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.transport.abort()

    client = await start(*one_after_the_other(forgets_the_end), continue_streams=1)
    got = await complete(client, stream_options={"include_usage": True})
    *_, usage, done, _ = got.split(b"\n\n")
    assert (text_of(got), done) == ("one", b"data: [DONE]")
    assert json.loads(usage[5:])["usage"] == {"prompt_tokens": 2, "total_tokens": 3, "completion_tokens": 1}


async def test_an_answer_at_its_limit_whose_end_is_missing_gets_it_whole(start: Start) -> None:
    client = await start(*one_after_the_other(dies_after_two), continue_streams=1)
    got = await complete(client, max_tokens=2, stream_options={"include_usage": True})
    *_, finish, usage, done, _ = got.split(b"\n\n")
    assert (text_of(got), done) == ("one two ", b"data: [DONE]")
    assert json.loads(finish[5:])["choices"][0]["finish_reason"] == "length"
    assert json.loads(usage[5:])["usage"] == {"prompt_tokens": 2, "total_tokens": 4, "completion_tokens": 2}


async def test_a_stream_waits_for_an_instance_to_come_back(start: Start) -> None:
    engine = FakeEngine(dies_after_two)
    client = await start(engine, continue_streams=1)
    post = asyncio.create_task(complete(client))
    await until(lambda: len(engine.heard) == 1)
    engine.behave = ends_it
    await asyncio.sleep(0.05)
    await engine.stop()
    await asyncio.sleep(0.1)
    await engine.start()
    assert text_of(await post) == "one two three"


async def test_what_waits_at_an_instance_that_hangs_moves(start: Start) -> None:
    async def hangs_after_two(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + chunk(told([1, 2], "one two ", prompt=[9, 9])))
        while not writer.is_closing() and not heard.gone():  # noqa: ASYNC110  a stream reader has no event for it
            await asyncio.sleep(0.01)
        engine.left += 1

    engines = one_after_the_other(hangs_after_two, ends_it)
    client = await start(*engines, continue_streams=1, hang_after_s=0.1, continue_silent_s=0.3)
    assert text_of(await complete(client)) == "one two three"
    await until(lambda: sum(engine.left for engine in engines) == 1)


@pytest.mark.parametrize("shown", [False, True])
async def test_half_a_character_that_was_not_shown_is_generated_again(start: Start, shown: bool) -> None:
    """An engine keeps back the text of a token that is half a character; the next one would not say it."""

    async def keeps_back(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
        for ids, text in (([1], "one "), ([2], ""), ([3], "two "), ([4], ""), ([5], "")):
            writer.write((STREAM_HEAD if text == "one " else b"") + chunk(told(ids, text, prompt=[9, 9])))
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.transport.abort()

    engines = one_after_the_other(keeps_back, ends_it)
    client = await start(*engines, continue_streams=1)
    assert text_of(await complete(client, max_tokens=10, return_token_ids=shown)) == "one two three"
    (rest,) = [heard.json for engine in engines for heard in engine.heard if isinstance(heard.json["prompt"], list)]
    seen = [1, 2, 3, 4, 5] if shown else [1, 2, 3]
    assert (rest["prompt"], rest["max_tokens"]) == ([9, 9, *seen], 10 - len(seen))


async def test_an_engine_that_tells_no_ids_is_served_unchanged(start: Start) -> None:
    client = await start(FakeEngine(), continue_streams=1)
    plain = await complete(await start(FakeEngine()))
    body = await complete(client)
    assert body == plain


def test_memory_is_bounded_a_stream() -> None:
    tape = _tape()
    tape.feed(chunk(told([1], prompt=[1] * 10)))
    many = chunk(told([7] * 4096))
    for _ in range(TOKENS_MAX // 4096 + 2):
        tape.feed(many)
    assert (tape.can_continue, tape.count) == (False, 0)
    assert "tokens" in str(tape.problem)


def test_events_cut_anywhere_make_the_same_stream() -> None:
    text = (
        told([1], "one ", prompt=[9])
        + told([2], 'say "token_ids":[4] ')
        + told([3], "three", "stop")
        + b"data: [DONE]\n\n"
    )
    whole = _tape().feed(chunk(text) + b"0\r\n\r\n")
    for size in (1, 7, 50, 113):
        tape = _tape()
        parts = [text[at : at + size] for at in range(0, len(text), size)]
        got = b"".join(tape.feed(chunk(part)) for part in parts) + tape.feed(b"0\r\n\r\n")
        assert _plain(got) == _plain(whole)
        assert tape.count == 3


def _tape() -> Tape:
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    tape = tape_of(b"/v1/completions", body, Request(id="x", arrived_s=0.0, prompt_tokens=1))
    assert tape is not None
    return tape


def _plain(chunked: bytes) -> bytes:
    out = b""
    while chunked:
        size, _, rest = chunked.partition(b"\r\n")
        out += rest[: int(size, 16)]
        chunked = rest[int(size, 16) + 2 :]
    return out


def test_an_emulated_answer_depends_on_the_tokens_before_it_alone() -> None:
    seed = tokens.answer_seed(tokens.of_text("what is it?"))
    whole = tokens.answer(seed, 0, 300)
    for cut in (1, 2, 100, 256, 299):
        so_far = tokens.of_text("what is it?") + whole[: cut * tokens.TOKEN_BYTES]
        assert tokens.answer(tokens.answer_seed(so_far, 5), 0, 300 - cut) == whole[cut * tokens.TOKEN_BYTES :]


async def test_a_stream_that_was_kept_alive_by_comments_still_goes_on(start: Start) -> None:
    async def dies_with_a_head(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD)
        await writer.drain()
        await asyncio.sleep(0.6)
        writer.transport.abort()

    client = await start(
        *one_after_the_other(dies_with_a_head, dies_after_two, ends_it),
        continue_streams=2,
        sse_keep_alive_s=0.1,
        hang_after_s=0,
    )
    body = await complete(client)
    assert body.startswith(b": keep-alive")
    assert text_of(body) == "one two three"
