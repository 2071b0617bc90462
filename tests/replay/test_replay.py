"""The load generator against a small OpenAI server of our own."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from click.testing import CliRunner

from block.cli.replay import command
from block.core import Request
from block.errors import ConfigError, UserError
from block.metrics import Row, read_rows
from block.replay import ReplayOptions, replay
from block.replay.prompts import WORDS, prompt_text
from block.replay.sse import AnswerReader
from block.workload import Offered, PromptBlocks, WorkloadConfig, offer

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def offered(count: int, gap_s: float = 0.0, output_tokens: int = 3) -> list[Offered]:
    return [Offered(Request(id=f"r{i}", arrived_s=i * gap_s, prompt_tokens=4), output_tokens) for i in range(count)]


async def streamed(request: web.Request) -> web.StreamResponse:
    """Streams as many tokens as asked for, with usage, as vLLM does."""
    body = await request.json()
    tokens = int(request.headers.get("x-emulate-output-tokens", body["max_tokens"]))
    if not body["stream"]:
        return web.json_response({"choices": [{"text": "x" * tokens}], "usage": {"completion_tokens": tokens}})
    answer = web.StreamResponse(headers={"x-gateway-destination-endpoint": "a", "x-predicted-e2e-ms": "1250"})
    await answer.prepare(request)
    for i in range(tokens):
        choice = {"delta": {"content": f"{i} "}} if "messages" in body else {"text": f"{i} "}
        await answer.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
    usage = {"choices": [], "usage": {"completion_tokens": tokens}}
    await answer.write(b"data: " + json.dumps(usage).encode() + b"\n\ndata: [DONE]\n\n")
    return answer


@asynccontextmanager
async def server(handler: Handler) -> AsyncIterator[str]:
    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/{endpoint:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
@pytest.mark.parametrize("stream", [True, False])
async def test_every_request_offered_becomes_a_row_in_order(endpoint: str, stream: bool) -> None:
    async with server(streamed) as url:
        options = ReplayOptions(endpoint=endpoint, stream=stream, policy="p")
        rows = await replay(offered(20, 0.002), f"{url}/v1/", options)
    assert [row.id for row in rows] == [f"r{i}" for i in range(20)]
    for row in rows:
        assert (row.status, row.output_tokens, row.policy) == ("finished", 3, "p")
        assert row.intended_s <= row.sent_s <= row.finished_s
        if stream:
            assert row.sent_s <= row.first_token_s <= row.finished_s
            assert row.ttft_s == row.first_token_s - row.intended_s
            assert (row.instance, row.predicted_e2e_s) == ("a", 1.25)
        else:
            assert row.ttft_s is None


async def test_the_client_sends_what_the_length_mode_says() -> None:
    seen: list[tuple[dict[str, object], str | None]] = []

    async def record(request: web.Request) -> web.StreamResponse:
        seen.append((await request.json(), request.headers.get("x-emulate-output-tokens")))
        return await streamed(request)

    async with server(record) as url:
        for mode in ("exact", "header", "natural"):
            await replay(offered(1), url, ReplayOptions(length_mode=mode, max_tokens=7))
    (exact, none), (header, told), (natural, nothing) = seen
    assert (exact["max_tokens"], exact["min_tokens"], exact["ignore_eos"], none) == (3, 3, True, None)
    assert (header["max_tokens"], told, "ignore_eos" in header) == (7, "3", False)
    assert (natural["max_tokens"], nothing) == (7, None)
    assert len(exact["prompt"]) == 4 * 4
    assert exact["model"] == "m"


async def test_latency_counts_from_the_intended_time_even_if_all_is_late() -> None:
    async def slow(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.15)
        return await streamed(request)

    async with server(slow) as url:
        late = [Offered(Request(id="r", arrived_s=-1.0, prompt_tokens=1), 1)]
        (row,) = await replay(late, url, ReplayOptions(model="m"))
    assert row.ttft_s >= 1.1
    assert row.sent_s - row.intended_s >= 0.95


async def test_the_load_is_open_loop() -> None:
    """Requests that are answered only when all have arrived would stop a closed loop for ever."""
    arrived, all_there = 0, asyncio.Event()

    async def together(request: web.Request) -> web.StreamResponse:
        nonlocal arrived
        arrived += 1
        if arrived == 30:
            all_there.set()
        await all_there.wait()
        return await streamed(request)

    async with server(together) as url:
        rows = await replay(offered(30, 0.001), url, ReplayOptions(timeout_s=20))
    assert {row.status for row in rows} == {"finished"}


async def _error_400(request: web.Request) -> web.StreamResponse:
    return web.json_response({"error": {"message": "no such model", "type": "x"}}, status=400)


async def _busy(request: web.Request) -> web.StreamResponse:
    return web.Response(text="try later", status=503)


async def _cut(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse()
    await answer.prepare(request)
    await answer.write(b'data: {"choices":[{"text":"a"}]}\n\n')
    request.transport.close()
    return answer


async def _unfinished(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse()
    await answer.prepare(request)
    await answer.write(b'data: {"choices":[{"text":"a"}]}\n\n')
    return answer


async def _error_event(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse()
    await answer.prepare(request)
    await answer.write(b'data: {"choices":[{"text":"a"}]}\n\ndata: {"error":{"message":"engine died"}}\n\n')
    return answer


async def _hang(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(30)
    raise AssertionError


async def _not_openai(request: web.Request) -> web.StreamResponse:
    return web.Response(text="data: hello\n\n")


@pytest.mark.parametrize(
    ("handler", "status", "said"),
    [
        (_error_400, "failed", "HTTP 400: no such model"),
        (_busy, "rejected", "HTTP 503: try later"),
        (_cut, "failed", "ClientPayloadError"),
        (_unfinished, "failed", "without [DONE] after 1 tokens"),
        (_error_event, "failed", "engine died"),
        (_hang, "failed", "no whole answer within 0.3 s"),
        (_not_openai, "failed", "not JSON"),
    ],
)
async def test_a_failure_is_a_row_with_its_reason(handler: Handler, status: str, said: str) -> None:
    async with server(handler) as url:
        rows = await replay(offered(2), url, ReplayOptions(model="m", timeout_s=0.3))
    assert len(rows) == 2
    for row in rows:
        assert row.status == status
        assert said in row.error
        assert row.e2e_s is None


async def test_requests_beyond_the_bound_in_flight_fail_unsent() -> None:
    async with server(_hang) as url:
        rows = await replay(offered(5), url, ReplayOptions(model="m", timeout_s=0.3, in_flight_max=3))
    assert sum("not sent" in row.error for row in rows) == 2


async def test_cancelling_leaves_a_row_for_what_was_in_flight() -> None:
    seen: list[Row] = []
    async with server(_hang) as url:
        task = asyncio.create_task(replay(offered(4), url, ReplayOptions(model="m"), on_row=seen.append))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert [row.error for row in seen] == ["interrupted"] * 4


async def test_a_server_that_is_not_there_is_one_clear_sentence() -> None:
    with pytest.raises(ConfigError, match="cannot be reached"):
        await replay(offered(1), "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="is not a URL"):
        await replay(offered(1), "localhost:8000")
    rows = await replay(offered(1), "http://127.0.0.1:9", ReplayOptions(model="m"))
    assert "ClientConnectorError" in rows[0].error


CHAT = (
    b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n: keep-alive\n\n'
    b'data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: {"choices":[{"delta":{"content":"b"}}]}\n\n'
    b'data: {"choices":[],"usage":{"completion_tokens":9}}\n\ndata: [DONE]\n\n'
)


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("cut", [1, 2, 3, 7, 40, 1000])
def test_a_stream_reads_the_same_however_it_is_cut(cut: int, newline: bytes) -> None:
    stream = CHAT.replace(b"\n", newline)
    reader, first_at = AnswerReader(), None
    for at in range(0, len(stream), cut):
        reader.feed(stream[at : at + cut])
        if reader.first_token_in_chunk:
            assert first_at is None
            first_at = at
    assert reader.done
    assert reader.output_tokens == 9
    content = stream.index(b'"content":"a"')
    assert first_at >= content - cut, "a role alone is not a token"
    counted = AnswerReader()
    counted.feed(CHAT.replace(b'data: {"choices":[],"usage":{"completion_tokens":9}}', b": no usage"))
    assert counted.output_tokens == 2


def test_prompts_have_the_length_asked_for_and_share_what_should_be_shared() -> None:
    request = Request(id="a", arrived_s=0.0, prompt_tokens=1000)
    text = prompt_text(Offered(request, 1), 1)
    assert len(text.split()) == 1000
    assert all(len(word) == 4 for word in WORDS)
    one = prompt_text(Offered(request, 1, PromptBlocks(512, (7, 8))), 1)
    two = prompt_text(Offered(Request(id="b", arrived_s=0.0, prompt_tokens=800), 1, PromptBlocks(512, (7, 9))), 1)
    assert one[: 512 * 4] == two[: 512 * 4]
    assert one[512 * 4 :][:400] != two[512 * 4 :][:400]
    assert len(two) == 800 * 4
    assert prompt_text(Offered(Request(id="c", arrived_s=0.0, prompt_tokens=5, prompt="own"), 1), 1) == "own"


async def start(*arguments: str) -> asyncio.subprocess.Process:
    code = "from block.cli import main; main()"
    pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    return await asyncio.create_subprocess_exec(sys.executable, "-c", code, "replay", *arguments, **pipes)


async def block(*arguments: str) -> tuple[int | None, bytes, bytes]:
    process = await start(*arguments)
    out, err = await process.communicate()
    return process.returncode, out, err


async def test_the_command_prints_json_and_writes_rows(tmp_path: Path) -> None:
    async with server(streamed) as url:
        arguments = [url, "--rate", "200", "--requests", "30", "--slo-ttft", "5", "--json", "--max-tokens", "9"]
        arguments += ["--length-mode", "natural", "--out", f"{tmp_path}/rows.csv", "--chart", f"{tmp_path}/c.svg"]
        code, out, _ = await block(*arguments)
    assert code == 0
    summary = json.loads(out)
    assert (summary["requests"], summary["failed"], summary["slo_attainment_fraction"]) == (30, 0, 1.0)
    assert len(read_rows(tmp_path / "rows.csv")) == 30
    assert (tmp_path / "c.svg").exists()


async def test_ctrl_c_ends_the_command_with_the_rows_it_has(tmp_path: Path) -> None:
    async with server(streamed) as url:
        rows = tmp_path / "rows.csv"
        process = await start(url, "--rate", "20", "--requests", "2000", "--json", "--out", str(rows))
        for _ in range(400):
            await asyncio.sleep(0.05)
            if rows.exists() and rows.read_text().count("\n") > 5:  # the last line may be half written
                break
        process.send_signal(signal.SIGINT)
        out, _ = await process.communicate()
    assert process.returncode == 130
    assert json.loads(out)["interrupted"] is True
    assert json.loads(out)["requests"] == len(read_rows(rows)) >= 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["localhost:1"], "is not a URL"),
        (["http://127.0.0.1:9", "--requests", "1"], "cannot be reached"),
        (["http://127.0.0.1:9", "--arrivals", "trace"], "needs --trace"),
        (["http://127.0.0.1:9", "--header", "x"], "NAME:VALUE"),
        (["http://127.0.0.1:9", "--prompt-tokens", "3"], "go together"),
        (["http://127.0.0.1:9", "--duration", "0.00001"], "No request falls"),
        (["http://127.0.0.1:9", "--chart", "c.pdf"], ".png or .svg"),
        (["http://127.0.0.1:9", "--rate", "0"], "above 0 requests/s"),
        (["http://127.0.0.1:9", "--rate", "nan", "--duration", "4"], "above 0 requests/s"),
        (["http://127.0.0.1:9", "--duration", "nan"], "--duration must be above 0"),
        (["http://127.0.0.1:9", "--seed", "-1"], "must not be negative"),
    ],
)
def test_wrong_arguments_are_one_clear_sentence(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(command, arguments)
    assert isinstance(result.exception, UserError)
    assert said in str(result.exception)


def test_a_workload_goes_out_as_it_was_offered() -> None:
    assert len(offer(WorkloadConfig(rate_rps=100.0, requests=10), 1)) == 10
