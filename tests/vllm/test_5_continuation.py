"""Streams that go on, and vLLM's other routes: of two real instances behind the gateway one stops or dies in mid-stream,
and no client sees it.

In float32, because in bfloat16 the two best tokens are often equal to the last bit, and which one wins may then depend on
whether a token was computed alone or with its prompt.
"""

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from live import BLOCK, Program, VllmServer, free_port, wait_healthy

TOKENS = 500
STREAMS = 6
PROMPTS = [f"a request number {n} enters the queue of an engine and waits until" for n in range(STREAMS)]
LIMITS = ("--max-model-len", "1024", "--max-num-seqs", "16", "--num-gpu-blocks-override", "600", "--dtype", "float32")


class Pair(NamedTuple):
    url: str
    servers: list[VllmServer]


class Answer(NamedTuple):
    """A streamed answer as a client sees it."""

    text: str
    ids: set[str]
    finish: list[str]
    usage: dict[str, int] | None
    tokens: list[int]
    error: Any
    done: bool


@pytest.fixture(scope="module")
def pair(python: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    programs: list[Program] = []
    try:
        servers = []
        for core in (0, 1):
            name = f"test-{os.getpid()}-goes-on-{core}"
            server = VllmServer(
                python,
                model,
                folder / f"{core}.log",
                name=name,
                core=core,
                plugin=False,
                arguments=LIMITS,
                environment={"VLLM_ENABLE_RESPONSES_API_STORE": "1"},
            )
            programs.append(server)
            servers.append(server)
        for server in servers:
            server.wait()
        port = free_port()
        instances = [f"--instance={server.url},name=e{n}" for n, server in enumerate(servers)]
        command = [
            *BLOCK, "serve", *instances, "--policy", "round-robin", "--continue-streams", "3", "--port", str(port),
        ]  # fmt: skip
        programs.append(Program(command, folder / "gateway.log", {}))
        wait_healthy(programs[-1], f"http://127.0.0.1:{port}", "/v1/models", within_s=30)
        yield Pair(f"http://127.0.0.1:{port}", servers)
    finally:
        for program in reversed(programs):
            program.stop()


class Under(NamedTuple):
    """A stream under way: by which instance, and how many events came."""

    instance: str
    events: int


async def stream(session: aiohttp.ClientSession, url: str, n: int, *, chat: bool, under: dict[int, Under]) -> Answer:
    """One greedy answer; ``under[n]`` says how far it is, while it is under way."""
    body: dict[str, Any] = {
        "model": "tiny", "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True}, "return_token_ids": n == 0,
    }  # fmt: skip
    body |= {"messages": [{"role": "user", "content": PROMPTS[n]}]} if chat else {"prompt": PROMPTS[n]}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    text, ids, finish, tokens = "", set(), [], []
    usage, error, done = None, None, False
    async with session.post(url + path, json=body) as answer:
        assert answer.status == 200, await answer.text()
        instance = answer.headers.get("x-gateway-destination-endpoint", "")
        async for line in answer.content:
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                done = True
                continue
            event = json.loads(line[6:])
            if "error" in event:
                error = event["error"]
                break
            ids.add(event["id"])
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                text += (choice["delta"].get("content") or "") if chat else choice["text"]
                tokens += choice.get("token_ids") or []
                finish += [choice["finish_reason"]] if choice["finish_reason"] else []
            under[n] = Under(instance, under[n].events + 1 if n in under else 1)
    under.pop(n, None)
    return Answer(text, ids, finish, usage, tokens, error, done)


async def all_streams(url: str, *, chat: bool, under: dict[int, Under] | None = None) -> list[Answer]:
    under = {} if under is None else under
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=240)) as session:
        return await asyncio.gather(*(stream(session, url, n, chat=chat, under=under) for n in range(STREAMS)))


async def disturbed(pair: Pair, *, chat: bool, how: Any) -> tuple[list[Answer], float, list[int]]:
    """The answers when ``how`` happens to instance e1 while streams of it are under way; the seconds they took, and how far
    those streams were."""
    await both_ready(pair)
    began_s = time.monotonic()
    under: dict[int, Under] = {}
    answers = asyncio.create_task(all_streams(pair.url, chat=chat, under=under))
    while not (at := [each.events for each in under.values() if each.instance == "e1"]) or max(at) < 50:
        assert not answers.done(), await answers
        await asyncio.sleep(0.002)
    how()
    return await answers, time.monotonic() - began_s, at


async def both_ready(pair: Pair) -> None:
    """Until the gateway trusts both again, at most half a minute."""
    async with aiohttp.ClientSession() as session:
        for _ in range(300):
            async with session.get(pair.url + "/ready") as answer:
                if (await answer.json())["ready_endpoints"] == 2:
                    return
            await asyncio.sleep(0.1)


async def continued(pair: Pair) -> float:
    async with aiohttp.ClientSession() as session, session.get(pair.url + "/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("block_stream_continued_total{"))


def check_same(answers: list[Answer], undisturbed: list[Answer]) -> None:
    for n, (got, wanted) in enumerate(zip(answers, undisturbed, strict=True)):
        assert got.error is None, (n, got.error)
        assert got.tokens == wanted.tokens, (n, _differ(got.tokens, wanted.tokens))
        assert got.text == wanted.text, (n, _differ(got.text, wanted.text))
        assert (got.finish, got.done, got.usage) == (["length"], True, wanted.usage), n
        assert len(got.ids) == 1, n
    assert len(answers[0].tokens) == TOKENS


def _differ(got: Any, wanted: Any) -> str:
    at = next((n for n, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))
    return f"of {len(got)} and {len(wanted)} the first {at} are equal; then {got[at : at + 12]!r}, not {wanted[at : at + 12]!r}"


def signal_all(server: VllmServer, number: int) -> None:
    for pid in server.members():
        os.kill(pid, number)


async def test_the_other_routes_of_vllm_go_through(pair: Pair) -> None:
    """Responses are kept by the instance that made them; reading one finds it there."""
    message = {"model": "tiny", "max_tokens": 8, "messages": [{"role": "user", "content": "a request enters"}]}
    async with aiohttp.ClientSession(pair.url, timeout=aiohttp.ClientTimeout(total=60)) as session:

        async def ask(method: str, path: str, body: Any = None) -> tuple[int, Any]:
            async with session.request(method, path, json=body) as answer:
                return answer.status, await answer.json(content_type=None)

        asked = {"model": "tiny", "input": "a request enters", "max_output_tokens": 8, "temperature": 0}
        for _ in range(3):
            status, made = await ask("POST", "/v1/responses", asked)
            assert (status, made["object"]) == (200, "response"), made
            for _ in range(3):
                status, found = await ask("GET", f"/v1/responses/{made['id']}")
                assert (status, found["id"]) == (200, made["id"]), found
        async with session.post("/v1/responses", json=asked | {"stream": True}) as answer:
            assert b"response.completed" in await answer.read()
        status, told = await ask("POST", "/v1/messages", message)
        assert (status, told["type"]) == (200, "message"), told
        status, told = await ask("POST", "/tokenize", {"model": "tiny", "prompt": "a request enters"})
        assert (status, told["count"]) == (200, len(told["tokens"]))
        assert (await ask("GET", "/version"))[0] == 200
        status, told = await ask("POST", "/v1/embeddings", {"model": "tiny", "input": "x"})
        assert 400 <= status < 500, told  # this model makes none, and says so itself
        assert (await ask("POST", "/pause"))[0] == 404  # what changes an engine is not passed on


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
async def test_streams_of_an_instance_that_hangs_go_on_as_if_nothing_had_happened(
    pair: Pair, report: dict[str, Any], chat: bool
) -> None:
    undisturbed = await all_streams(pair.servers[1].url, chat=chat)
    assert len({answer.text for answer in undisturbed}) == STREAMS
    before = await continued(pair)
    hung = pair.servers[1]
    try:
        answers, took_s, at = await disturbed(pair, chat=chat, how=lambda: signal_all(hung, signal.SIGSTOP))
    finally:
        signal_all(hung, signal.SIGCONT)
    check_same(answers, undisturbed)
    moved = await continued(pair) - before
    report[f"hung in mid-stream, {'chat' if chat else 'completions'}"] = {
        "streams": STREAMS, "continued": moved, "at_events": at, "seconds": round(took_s, 1), "of_tokens": TOKENS,
    }  # fmt: skip
    assert moved >= 1
    wait_healthy(hung, hung.url, within_s=60)


async def test_streams_of_an_instance_that_is_killed_go_on_as_if_nothing_had_happened(
    pair: Pair, report: dict[str, Any]
) -> None:
    undisturbed = await all_streams(pair.servers[0].url, chat=False)
    before = await continued(pair)
    answers, took_s, at = await disturbed(pair, chat=False, how=pair.servers[1].kill)
    check_same(answers, undisturbed)
    moved = await continued(pair) - before
    report["killed in mid-stream"] = {
        "streams": STREAMS, "continued": moved, "at_events": at, "seconds": round(took_s, 1), "of_tokens": TOKENS,
    }  # fmt: skip
    assert moved >= 1
