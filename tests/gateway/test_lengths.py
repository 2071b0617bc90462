"""The length estimator in the gateway: its figures, its clients, the log that it is trained from."""

import asyncio
import json
import stat
from pathlib import Path

import pytest

from block.errors import BadInputError, ConfigError
from block.gateway.records.metrics import Metrics
from block.gateway.records.requestlog import RequestLog
from block.length.data.sets import read_records
from gateway.conftest import Client, Start, until
from gateway.fakes import FakeEngine, Heard, answer, encoded

LONG = "Write a detailed essay about {0}, please, with many examples of {0}"
SHORT = "Answer in one word: is {0} old?"
TOPICS = [f"{a} {b}" for a in ("the sea", "iron", "bread", "law", "moss", "rust") for b in ("ships", "songs", "tools")]


async def essays_are_long(engine: FakeEngine, heard: Heard, writer: asyncio.StreamWriter) -> None:
    """400-odd tokens for an essay, 4 for a word, thrice as many for a chatty key."""
    text = heard.json["messages"][0]["content"] if "messages" in heard.json else heard.json["prompt"]
    tokens = (400 if "essay" in text else 4) + len(text) % 7
    if heard.headers.get("authorization") == "Bearer chatty":
        tokens *= 3
    usage = {"prompt_tokens": 12, "completion_tokens": tokens, "total_tokens": tokens + 12}
    body = {"id": "x", "object": "chat.completion", "created": 1, "model": "fake", "usage": usage, "choices": []}
    writer.write(answer(encoded(body)))


async def ask(client: Client, text: str, **options: object) -> None:
    messages = [{"role": "user", "content": text}]
    status, _, _ = await client.post(body={"messages": messages, **options.pop("body", {})}, **options)  # type: ignore[arg-type, dict-item]
    assert status == 200


async def offer(client: Client) -> None:
    for topic in TOPICS:
        for form in (LONG, SHORT):
            await ask(client, form.format(topic))


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sizes_in(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in folder.iterdir()}


async def test_where_estimates_come_from_and_how_good_they_are_is_in_the_metrics(start: Start) -> None:
    client = await start(FakeEngine(essays_are_long), policy="least-outstanding")
    for _ in range(3):
        await ask(client, SHORT)
        _, text = await client.get("/metrics")  # who reads the books settles them
    assert b'block_length_estimates_total{source="prior"} 1.0' in text
    assert b'block_length_estimates_total{source="history"} 2.0' in text
    assert b'block_length_error_tokens{model="fake"}' in text
    assert b'block_length_coverage_fraction{model="fake"}' in text
    assert await client.metric("block_length_bias_tokens") > 0


async def test_requests_are_logged_without_their_prompts_unless_asked(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    client = await start(FakeEngine(essays_are_long), policy="least-outstanding", log_requests=str(path))
    await ask(client, "a secret", body={"max_tokens": 900, "user": "jane"})
    await until(lambda: path.stat().st_size > 0)
    (row,) = rows_of(path)
    assert (row["model"], row["max_tokens"], row["output_tokens"]) == ("fake", 900, 4 + 1)
    assert "secret" not in path.read_text()
    assert "jane" not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert await client.metric("block_request_log_rows_total") == 1


@pytest.mark.parametrize("prompts", ["features", "full"])
async def test_an_estimator_trained_on_the_log_knows_an_essay_from_a_word(
    start: Start, tmp_path: Path, prompts: str
) -> None:
    pytest.importorskip("lightgbm", reason="training needs LightGBM: pip install 'block-llm[length]'")
    from block.length.learn.train import fit

    path, engine = tmp_path / "requests.jsonl", FakeEngine(essays_are_long)
    client = await start(engine, policy="least-outstanding", log_requests=str(path), log_prompts=prompts)
    await offer(client)
    await offer(client)
    await until(lambda: path.read_text().count("\n") == 4 * len(TOPICS))
    assert ("essay" in path.read_text()) == (prompts == "full")
    fit(read_records([path]), rounds=20).save(tmp_path / "lengths.npz")

    learned = await start(engine, policy="least-outstanding", length_estimator=f"learned:{tmp_path / 'lengths.npz'}")
    expected = []
    for text in (LONG.format("an unseen thing"), SHORT.format("an unseen thing")):
        exchange_id = f"r{len(expected)}"
        await ask(learned, text, headers={"x-request-id": exchange_id})
        estimator = learned.gateway.decider.estimator
        expected.append(estimator.accuracy.error_tokens)
    assert await learned.metric("block_length_estimates_total") == 2
    assert await learned.metric("block_length_error_tokens") < 60
    _, text = await learned.get("/metrics")
    assert b'block_length_estimates_total{source="learned"} 2.0' in text


async def test_clients_are_told_apart_and_corrected_each_on_its_own(start: Start) -> None:
    client = await start(FakeEngine(essays_are_long), policy="least-outstanding", length_estimator="learned")
    seen: set[str | None] = set()
    estimator = client.gateway.decider.estimator
    told = estimator.estimate

    def noting(request):  # type: ignore[no-untyped-def]
        seen.add(request.client)
        return told(request)

    estimator.estimate = noting
    for headers, body in (
        ({}, {"user": "joe"}), ({}, {"user": "jane"}), ({}, {"user": ["odd"]}), ({}, {"user": None}), ({}, {}),
    ):  # fmt: skip
        await ask(client, SHORT, headers=headers, body=body)
        await ask(client, SHORT, headers=headers, body=body)
    seen.discard(None)
    assert len(seen) == 3
    assert not any("joe" in one or "jane" in one for one in seen if one)
    await client.get("/metrics")  # who reads the books settles them
    drift = {one: estimator.drift_of("fake", one) for one in seen}
    assert all(d is not None and d.observed == 2 for d in drift.values())


async def test_full_files_are_set_aside_and_the_oldest_goes(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    client = await start(
        FakeEngine(essays_are_long), policy="least-outstanding", log_requests=str(path), log_requests_bytes_max=700,
        log_requests_files_max=3,
    )  # fmt: skip
    for n in range(10):
        await ask(client, f"{SHORT} {n}")
        await until(lambda n=n: client.gateway.metrics.log_rows.labels("written")._value.get() == n + 1)  # type: ignore[misc]
    sizes = sizes_in(tmp_path)
    assert sorted(sizes) == ["requests.1.jsonl", "requests.2.jsonl", "requests.jsonl"]
    assert max(sizes.values()) <= 700
    assert read_records([path])


async def test_a_disk_that_takes_nothing_costs_rows_and_no_request(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    client = await start(
        FakeEngine(essays_are_long), policy="least-outstanding", log_requests=str(folder / "requests.jsonl")
    )
    (folder / "requests.jsonl").unlink()
    folder.rmdir()
    await ask(client, SHORT)
    await until(lambda: client.gateway.metrics.log_rows.labels("failed")._value.get() == 1)
    await ask(client, SHORT)


def test_a_log_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        RequestLog(str(tmp_path / "no" / "requests.jsonl"), Metrics())


def test_rows_without_prompts_are_read_but_say_that_there_is_nothing_to_learn(tmp_path: Path) -> None:
    pytest.importorskip("lightgbm", reason="training needs LightGBM: pip install 'block-llm[length]'")
    from block.length.learn.train import fit

    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(json.dumps({"model": "m", "output_tokens": n + 1}) for n in range(100)))
    with pytest.raises(BadInputError, match="log-prompts"):
        fit(read_records([path]))
