"""The emulated engine over real HTTP, with OpenAI's own client where it fits."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import aiohttp
import msgspec
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from block.emulate import tokens
from block.engine.limits import EngineLimits
from block.predict.snapshot import BLOCKS, EXACT, FLAGS, MAX_TOKENS, OUTPUT, PROMPT, decode, request_key
from block.predictor.shared_memory import SnapshotReader

from .served import serving

MESSAGES = [{"role": "user", "content": "How are you?"}]


@contextlib.asynccontextmanager
async def openai_client(url: str, key: str = "none") -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
        yield client


@contextlib.asynccontextmanager
async def served(config, **changes):
    """(URL, HTTP session) of an emulated engine."""
    async with serving(msgspec.structs.replace(config, **changes)) as url, aiohttp.ClientSession(url) as http:
        yield url, http


async def samples(http) -> dict[str, float]:
    """Values of the metrics without labels of their own."""
    async with http.get("/metrics") as answer:
        text = await answer.text()
    return {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples
            if set(s.labels) == {"model_name", "engine"}}  # fmt: skip


async def until(condition, tries=400):
    """Wait for something to become true; asserts that it does."""
    for _ in range(tries):
        if await condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not become true")


async def test_the_openai_client_completes(config):
    async with served(config) as (url, _), openai_client(url) as client:
        done = await client.completions.create(
            model="tiny", prompt="Say something", max_tokens=6, extra_body={"ignore_eos": True}
        )
    assert done.object == "text_completion"
    assert done.choices[0].finish_reason == "length"
    assert len(done.choices[0].text) == 6 * 4
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (4, 6, 10)


async def test_the_openai_client_chats(config):
    async with served(config) as (url, _), openai_client(url) as client:
        done = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_completion_tokens=5, extra_body={"ignore_eos": True}
        )
    assert done.object == "chat.completion"
    assert done.choices[0].message.role == "assistant"
    assert done.usage.completion_tokens == 5
    assert done.usage.prompt_tokens == 3 + 4 + 3


async def test_the_openai_client_streams_a_completion(config):
    async with served(config) as (url, _), openai_client(url) as client:
        stream = await client.completions.create(
            model="tiny", prompt=[1, 2, 3], max_tokens=7, stream=True, stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        chunks = [chunk async for chunk in stream]
        whole = await client.completions.create(
            model="tiny", prompt=[1, 2, 3], max_tokens=7, extra_body={"ignore_eos": True}
        )
    text = "".join(c.choices[0].text for c in chunks if c.choices)
    assert text == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks if c.choices] == [None] * 6 + ["length"]
    assert chunks[-1].choices == []
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 7)
    assert len({c.id for c in chunks}) == 1


async def test_the_openai_client_streams_a_chat_with_the_role_first(config):
    async with served(config) as (url, _), openai_client(url) as client:
        stream = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=4, stream=True, extra_body={"ignore_eos": True}
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [len(c.choices[0].delta.content) for c in chunks] == [0, 4, 4, 4, 4]
    assert [c.choices[0].finish_reason for c in chunks] == [None] * 4 + ["length"]
    assert all(c.usage is None for c in chunks)


async def test_continuous_usage_counts_the_tokens_as_they_come(config):
    body = {"prompt": "Hi", "max_tokens": 5, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True}}  # fmt: skip
    async with served(config) as (_, http), http.post("/v1/completions", json=body) as answer:
        assert answer.content_type == "text/event-stream"
        events = (await answer.text()).strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    counts = [json.loads(e.removeprefix("data: "))["usage"]["completion_tokens"] for e in events[:-1]]
    assert counts == [1, 2, 3, 4, 5, 5]


async def test_a_client_of_http_1_0_gets_the_stream_unframed(config):
    body = json.dumps({"prompt": "Hi", "max_tokens": 3, "ignore_eos": True, "stream": True}).encode()
    async with served(config) as (url, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
    head, _, events = answer.partition(b"\r\n\r\n")
    assert b"200" in head.split(b"\r\n")[0]
    assert [e[:6] for e in events.strip().split(b"\n\n")] == [b"data: "] * 4


async def test_the_experiments_header_decides_the_length_and_max_tokens_caps_it(config):
    async with served(config) as (_, http):
        for wanted, length, reason in (("9", 9, "stop"), ("12", 12, "length"), ("500", 12, "length")):
            body = {"prompt": "Hi", "max_tokens": 12}
            async with http.post("/v1/completions", json=body, headers={"x-emulate-output-tokens": wanted}) as answer:
                done = await answer.json()
            assert (done["usage"]["completion_tokens"], done["choices"][0]["finish_reason"]) == (length, reason)


async def test_a_length_that_nobody_fixed_is_drawn(config):
    async with served(config, output_lengths="fixed:8") as (_, http):
        async with http.post("/v1/chat/completions", json={"messages": MESSAGES}) as answer:
            done = await answer.json()
        async with http.post("/v1/completions", json={"prompt": "Hi"}) as answer:
            sixteen = await answer.json()
        async with http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 3}) as answer:
            three = await answer.json()
    assert (done["usage"]["completion_tokens"], done["choices"][0]["finish_reason"]) == (8, "stop")
    assert sixteen["usage"]["completion_tokens"] == 8
    assert (three["usage"]["completion_tokens"], three["choices"][0]["finish_reason"]) == (3, "length")


async def test_without_max_tokens_a_completion_has_openais_sixteen(config):
    async with (
        served(config) as (_, http),
        http.post("/v1/completions", json={"prompt": "Hi", "ignore_eos": True}) as answer,
    ):
        assert (await answer.json())["usage"]["completion_tokens"] == 16


async def test_parts_of_a_message_that_are_no_text_count_nothing(config):
    parts = [{"type": "text", "text": "How are you?"}, {"type": "image_url", "image_url": {"url": "data:,x"}}]
    async with served(config) as (_, http):
        counts = []
        for content in ("How are you?", parts, None):
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
            async with http.post("/v1/chat/completions", json=body) as answer:
                counts.append((await answer.json())["usage"]["prompt_tokens"])
    assert counts[0] == counts[1]
    assert counts[2] == counts[0] - 3


LONG = "x" * 4 * 200

SAD = {
    "cut JSON": ("/v1/completions", '{"prompt": "a"', 400, "JSON"),
    "no JSON": ("/v1/chat/completions", "hello", 400, "JSON"),
    "not UTF-8": ("/v1/completions", b'{"prompt": "\xff"}', 400, ""),
    "a list": ("/v1/completions", "[]", 400, "Expected `object`"),
    "no prompt": ("/v1/completions", "{}", 400, "prompt"),
    "no messages": ("/v1/chat/completions", "{}", 400, "messages"),
    "empty messages": ("/v1/chat/completions", '{"messages": []}', 400, "messages"),
    "empty prompt": ("/v1/completions", '{"prompt": ""}', 400, "empty"),
    "no tokens": ("/v1/completions", '{"prompt": []}', 400, "empty"),
    "negative token": ("/v1/completions", '{"prompt": [-1]}', 400, "token ids"),
    "two prompts": ("/v1/completions", '{"prompt": ["a", "b"]}', 400, "one by one"),
    "two choices": ("/v1/completions", '{"prompt": "a", "n": 2}', 400, "n = 1"),
    "best of two": ("/v1/completions", '{"prompt": "a", "best_of": 2}', 400, "n = 1"),
    "text for a number": ("/v1/completions", '{"prompt": "a", "max_tokens": "5"}', 400, "max_tokens"),
    "no output": ("/v1/completions", '{"prompt": "a", "max_tokens": 0}', 400, "at least 1"),
    "unknown model": ("/v1/completions", '{"prompt": "a", "model": "gpt-9"}', 404, "gpt-9"),
    "options without stream": ("/v1/completions", '{"prompt": "a", "stream_options": {}}', 400, "stream=True"),
    "priority": ("/v1/completions", '{"prompt": "a", "priority": 3}', 400, "priority"),
    "prompt too long": ("/v1/completions", json.dumps({"prompt": LONG}), 400, "maximum context length is 128"),
    "output too long": ("/v1/completions", '{"prompt": "a", "max_tokens": 128}', 400, "too large"),
    "never fits": (
        "/v1/completions",
        json.dumps({"prompt": "x" * 4 * 60, "max_tokens": 20, "ignore_eos": True}),
        400,
        "KV cache",
    ),
    "no such path": ("/v1/embeddings", "{}", 404, "Not Found"),
}


@pytest.mark.parametrize("case", SAD)
async def test_a_bad_request_gets_openais_error_object(config, case):
    path, body, status, says = SAD[case]
    limits = EngineLimits(max_model_len=128, num_gpu_blocks=5)
    async with served(config, limits=limits) as (_, http), http.post(path, data=body) as answer:
        error = (await answer.json())["error"]
    assert answer.status == status
    assert says in error["message"]
    assert error["code"] == status
    assert set(error) == {"message", "type", "param", "code"}


async def test_a_wrong_method_is_refused_in_the_same_form(config):
    async with served(config) as (_, http), http.get("/v1/completions") as answer:
        assert answer.status == 405
        assert "error" in await answer.json()


async def test_a_length_header_that_is_no_number_is_refused(config):
    async with served(config) as (_, http):
        for wrong in ("0", "many", "-3", "1.5"):
            headers = {"x-emulate-output-tokens": wrong}
            async with http.post("/v1/completions", json={"prompt": "a"}, headers=headers) as answer:
                assert answer.status == 400


async def test_the_openai_client_raises_its_own_errors(config):
    async with served(config) as (url, _), openai_client(url) as client:
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="nope", prompt="a")
        with pytest.raises(openai.BadRequestError):
            await client.completions.create(model="tiny", prompt="a", n=2)


async def test_a_client_that_leaves_frees_its_request_at_once(config):
    body = {"prompt": "Hi", "max_tokens": 8000, "ignore_eos": True, "stream": True}
    async with served(config) as (url, http):
        async with aiohttp.ClientSession(url) as leaving, leaving.post("/v1/completions", json=body) as answer:
            await answer.content.readuntil(b"\n\n")
            assert (await samples(http))["vllm:num_requests_running"] == 1

        async def is_free():
            return (await samples(http))["vllm:num_requests_running"] == 0

        await until(is_free)
        found = await samples(http)
        async with http.get("/load") as answer:
            assert await answer.json() == {"server_load": 0}
    assert found["vllm:kv_cache_usage_perc"] == 0
    assert found["vllm:generation_tokens_total"] < 8000


async def test_two_requests_of_one_id_at_once_are_both_served(config):
    headers = {"X-Request-Id": "twin"}
    async with served(config) as (_, http):

        async def one(tokens, stream):
            body = {"prompt": "Hi", "max_tokens": tokens, "ignore_eos": True, "stream": stream}
            async with http.post("/v1/completions", json=body, headers=headers) as answer:
                return (await answer.text()).count("text"), answer.status

        found = await asyncio.gather(*[one(50, stream) for stream in (True, True, False, False)])
        assert (await samples(http))["vllm:generation_tokens_total"] == 200
    assert [status for _, status in found] == [200] * 4
    assert found[0] == found[1]


async def test_a_waiting_client_that_leaves_is_forgotten(config):
    limits = EngineLimits(max_num_seqs=1)
    long = {"prompt": "Hi", "max_tokens": 8000, "ignore_eos": True}
    async with served(config, limits=limits) as (_, http):
        first = asyncio.create_task(http.post("/v1/completions", json=long))

        async def one_runs():
            return (await samples(http))["vllm:num_requests_running"] == 1

        await until(one_runs)
        second = asyncio.create_task(http.post("/v1/completions", json=long))

        async def waiting(n):
            return (await samples(http))["vllm:num_requests_waiting"] == n

        await until(lambda: waiting(1))
        second.cancel()
        await until(lambda: waiting(0))
        assert (await samples(http))["vllm:num_requests_running"] == 1
        first.cancel()
        await asyncio.gather(first, second, return_exceptions=True)


async def test_metrics_have_vllms_names_and_add_up(config):
    async with served(config) as (_, http):
        for tokens in (1, 5, 10):
            async with http.post(
                "/v1/completions", json={"prompt": "x" * 40, "max_tokens": tokens, "ignore_eos": True}
            ) as answer:
                assert answer.status == 200
        found = await samples(http)
        async with http.get("/metrics") as answer:
            families = {f.name: f for f in text_string_to_metric_families(await answer.text())}
    assert found["vllm:prompt_tokens_total"] == 30
    assert found["vllm:generation_tokens_total"] == 16
    assert found["vllm:time_to_first_token_seconds_count"] == 3
    assert found["vllm:inter_token_latency_seconds_count"] == 13
    assert found["vllm:e2e_request_latency_seconds_count"] == 3
    assert found["vllm:request_generation_tokens_sum"] == 16
    assert found["vllm:iteration_tokens_total_sum"] >= 30 + 13
    assert found["emulate_lateness_seconds_count"] > 0
    assert families["vllm:num_preemptions"].type == "counter"
    assert {"vllm:cache_config_info", "vllm:request_queue_time_seconds", "vllm:request_success"} <= set(families)
    for family in families.values():
        if family.type == "histogram":
            buckets = [s.value for s in family.samples if s.name.endswith("_bucket")]
            assert buckets == sorted(buckets)


async def test_the_small_endpoints_answer(config):
    async with served(config, models=("tiny", "alias")) as (_, http):
        for path in ("/health", "/ping"):
            async with http.get(path) as answer:
                assert answer.status == 200
        async with http.get("/v1/models") as answer:
            cards = (await answer.json())["data"]
        async with http.get("/version") as answer:
            assert "version" in await answer.json()
        async with http.get("/emulate/lateness") as answer:
            assert {"steps", "p50_s", "p99_s", "max_s"} <= set(await answer.json())
        async with http.post("/tokenize", json={"model": "alias", "prompt": "Hello there"}) as answer:
            tokenized = await answer.json()
        async with http.post("/detokenize", json={"tokens": tokenized["tokens"]}) as answer:
            assert await answer.json() == {"prompt": "Hello there"}
        async with http.post("/tokenize", json={"messages": MESSAGES}) as answer:
            chat = await answer.json()
        async with http.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 1}) as answer:
            assert (await answer.json())["usage"]["prompt_tokens"] == chat["count"]
        async with http.post("/emulate/fault", json={"kind": "exit"}) as answer:
            assert answer.status == 404, "faults must be allowed first"
    assert [card["id"] for card in cards] == ["tiny", "alias"]
    assert cards[0]["max_model_len"] == 8192
    assert tokenized["count"] == 3


async def test_the_key_is_wanted_on_v1_only(config):
    async with served(config, api_key="secret") as (url, http):
        async with http.get("/v1/models") as answer:
            assert answer.status == 401
        async with http.get("/health") as answer:
            assert answer.status == 200
        async with openai_client(url, "wrong") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        async with openai_client(url, "secret") as client:
            assert [m.id async for m in client.models.list()] == ["tiny"]


async def test_a_chats_next_turn_finds_the_last_one_in_the_prefix_cache(config):
    limits = EngineLimits(enable_prefix_caching=True)
    first = [{"role": "user", "content": "x" * 4 * 100}]
    async with served(config, limits=limits, prompt_tokens_details=True) as (_, http):

        async def turn(messages):
            body = {"messages": messages, "max_tokens": 64, "ignore_eos": True}
            async with http.post("/v1/chat/completions", json=body) as answer:
                done = await answer.json()
            return done["choices"][0]["message"], done["usage"]

        answer, usage = await turn(first)
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0
        _, usage = await turn([*first, answer, {"role": "user", "content": "And then?"}])
        history = 3 + 100 + 1 + 3 + 63  # the last token of an answer is never computed
        assert usage["prompt_tokens_details"]["cached_tokens"] == history // 16 * 16
        _, usage = await turn([{"role": "user", "content": "y" * 4 * 100}])
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0
        found = await samples(http)
    assert found["vllm:prefix_cache_hits_total"] == history // 16 * 16


async def test_a_fraction_of_requests_fails_when_asked_for(config):
    async with served(config, fail_rate=0.5, seed=3) as (_, http):
        statuses = []
        for _ in range(40):
            async with http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}) as answer:
                statuses.append(answer.status)
                assert ("error" in await answer.json()) == (answer.status == 500)
    assert 8 <= statuses.count(500) <= 32
    assert set(statuses) == {200, 500}


async def test_a_hang_stops_the_tokens_and_not_the_health_check(config):
    body = {"prompt": "Hi", "max_tokens": 200, "ignore_eos": True, "stream": True}
    async with served(config, allow_faults=True) as (_, http), http.post("/v1/completions", json=body) as stream:
        await stream.content.readuntil(b"\n\n")
        async with http.post("/emulate/fault", json={"kind": "hang", "seconds": 2}) as answer:
            assert answer.status == 200
        made = (await samples(http))["vllm:generation_tokens_total"]
        await asyncio.sleep(0.1)
        assert (await samples(http))["vllm:generation_tokens_total"] == made
        async with http.get("/health") as answer:
            assert answer.status == 200
        events = (await stream.text()).strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert len(events) == 200  # one was read before


async def test_broken_streams_end_without_an_end(config):
    body = {"prompt": "Hi", "max_tokens": 5000, "ignore_eos": True, "stream": True}
    async with served(config, allow_faults=True) as (_, http):
        async with http.post("/v1/completions", json=body) as stream:
            await stream.content.readuntil(b"\n\n")
            async with http.post("/emulate/fault", json={"kind": "break"}) as answer:
                assert await answer.json() == {"broken": 1}
            with pytest.raises(aiohttp.ClientError):
                await stream.read()
        assert (await samples(http))["vllm:num_requests_running"] == 0


async def test_faults_can_be_switched_off_again(config):
    async with served(config, allow_faults=True) as (_, http):
        for fraction, status in ((1.0, 500), (0.0, 200)):
            async with http.post("/emulate/fault", json={"kind": "errors", "fraction": fraction}):
                pass
            async with http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}) as answer:
                assert answer.status == status
        async with http.post("/emulate/fault", json={"kind": "slow", "factor": 0}) as answer:
            assert answer.status == 400


async def test_a_reader_that_does_not_read_gets_every_token_in_fewer_events(config, monkeypatch):
    monkeypatch.setattr("block.emulate.answers.BACKLOG_MAX", -1)  # as if the socket were never empty
    body = {
        "prompt": "Hi",
        "max_tokens": 30,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with served(config) as (_, http), http.post("/v1/completions", json=body) as stream:
        events = [json.loads(e.removeprefix("data: ")) for e in (await stream.text()).strip().split("\n\n")[:-1]]
    assert len(events) == 2
    assert len(events[0]["choices"][0]["text"]) == 30 * 4
    assert events[1]["usage"]["completion_tokens"] == 30


async def test_snapshots_show_what_the_client_said_and_never_the_true_length(config, shm_name):
    async with served(config, name=shm_name, limits=EngineLimits(max_num_seqs=2)) as (_, http):
        bodies = [
            {"prompt": "x" * 400, "max_tokens": 3000},
            {"prompt": "y" * 40, "max_tokens": 2000, "ignore_eos": True},
            {"prompt": "z" * 80},
        ]
        asked = []
        for i, body in enumerate(bodies):
            headers = {"X-Request-Id": f"id-{i}", "x-emulate-output-tokens": "1500"}
            asked.append(asyncio.create_task(http.post("/v1/completions", json=body, headers=headers)))
            await asyncio.sleep(0.02)
        reader = SnapshotReader(shm_name)
        found = None

        async def all_there():
            nonlocal found
            frame = reader.read()
            found = decode(frame) if frame else found
            return found is not None and (found.running, found.waiting) == (2, 1) and len(found.steps) == 16

        await until(all_there)
        assert reader.alive()
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        reader.close()
    assert found.keys.tolist() == [request_key(f"id-{i}") for i in range(3)]
    assert found.requests[PROMPT].tolist() == [100, 10, 20]
    assert found.requests[MAX_TOKENS].tolist() == [3000, 2000, 16]
    assert (found.requests[FLAGS] & EXACT).tolist() == [0, EXACT, 0]
    assert found.requests[BLOCKS].sum() == found.limits.blocks_usable - found.kv_blocks_free
    assert found.requests[OUTPUT, 0] > 0
    assert found.requests[OUTPUT, 2] == 0


async def test_the_snapshots_go_when_the_engine_does(config, shm_name):
    reader = SnapshotReader(shm_name)
    async with served(config, name=shm_name):
        assert reader.alive()
        first = decode(reader.read())
        assert (first.running, first.waiting) == (0, 0)

        async def beats():
            frame = reader.read()
            return frame is not None and decode(frame).sequence > first.sequence

        await until(beats)
    assert not reader.alive()
    assert not reader.path.exists()
    reader.close()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_token_ids_are_told_on_request_as_vllm_tells_them(config, path):
    chat = "chat" in path
    body = {"messages": MESSAGES} if chat else {"prompt": "Say something"}
    body |= {"max_tokens": 5, "ignore_eos": True, "return_token_ids": True}
    async with served(config) as (_, http):
        async with http.post(path, json=body) as answer:
            whole = await answer.json()
        async with http.post(path, json=body | {"stream": True}) as answer:
            lines = (await answer.text()).split("\n\n")[:-2]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    choice = whole["choices"][0]
    told = [i for event in events for i in event["choices"][0].get("token_ids", [])]
    assert told == choice["token_ids"]
    text = choice["message"]["content"] if chat else choice["text"]
    assert tokens.text_of(told) == text
    first = events[0] if chat else events[0]["choices"][0]
    assert first["prompt_token_ids"] == (whole if chat else choice)["prompt_token_ids"]
    assert len(first["prompt_token_ids"]) == whole["usage"]["prompt_tokens"]


async def test_who_continues_an_answer_keeps_its_length(config):
    async with served(config) as (_, http):
        body = {"prompt": "Say something", "max_tokens": 50, "stream": False}
        headers = {"x-emulate-output-tokens": "20", "x-block-continued-tokens": "13"}
        async with http.post("/v1/completions", json=body, headers=headers) as answer:
            assert (await answer.json())["usage"]["completion_tokens"] == 7
