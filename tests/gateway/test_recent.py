"""``GET /admin/recent``: what came and ended since a cursor, for those who provision."""

import json
from typing import Any

from gateway.conftest import Start
from gateway.fakes import FakeEngine, Heard, answer

ADMIN: dict[str, Any] = {"headers": {"authorization": "Bearer secret"}}


async def recent(client: Any, cursor: str = "") -> dict[str, Any]:
    status, body = await client.get(f"/admin/recent?after={cursor}", **ADMIN)
    assert status == 200
    told: dict[str, Any] = json.loads(body)
    return told


async def test_arrivals_and_ends_are_told_once_and_in_order(start: Start) -> None:
    client = await start(FakeEngine(), admin_key="secret")
    await client.post(body={"stream": True, "max_tokens": 9})
    first = await recent(client)
    ((number, at_s, prompt_tokens),) = first["arrivals"]
    ((sent, sent_s, expected_tokens, predicted_ttft_s, predicted_e2e_s),) = first["sent"]
    ((ended, ended_s, ttft_s, e2e_s, output_tokens),) = first["ends"]
    assert number == sent == ended == 1
    assert prompt_tokens > 0
    assert at_s <= sent_s <= ended_s <= first["at_s"]
    assert expected_tokens is predicted_ttft_s is predicted_e2e_s is None, "round-robin asks nobody"
    assert 0 < ttft_s <= e2e_s
    assert output_tokens is not None
    assert first["missed"] == 0
    await client.post()
    second = await recent(client, first["cursor"])
    assert [one[0] for one in second["arrivals"]] == [2]
    assert [one[0] for one in second["ends"]] == [2]
    third = await recent(client, second["cursor"])
    assert third["arrivals"] == third["sent"] == third["ends"] == []


async def test_it_says_who_is_ready_and_what_is_in_flight(start: Start) -> None:
    client = await start(FakeEngine(), admin_key="secret")
    told = await recent(client)
    (one,) = told["instances"]
    assert (one["name"], one["state"], one["in_flight"], one["fresh"]) == ("e0", "ready", 0, False)
    assert (told["in_flight"], told["queued"]) == (0, 0)


async def test_a_failed_request_has_no_latency_and_a_wrong_one_no_end(start: Start) -> None:
    async def fail(_engine: FakeEngine, heard: Heard, writer: Any) -> None:
        wrong = heard.json.get("max_tokens") == 1
        writer.write(answer(b"{}", "400 Bad Request" if wrong else "500 Internal Server Error"))

    client = await start(FakeEngine(fail), admin_key="secret", retries=0)
    await client.post(body={"max_tokens": 1})
    await client.post(body={"max_tokens": 2})
    told = await recent(client)
    assert len(told["arrivals"]) == 2
    assert [(end[0], end[2], end[3]) for end in told["ends"]] == [(2, None, None)]


async def test_the_rings_are_bounded_and_what_they_lost_is_counted(start: Start) -> None:
    client = await start(FakeEngine(), admin_key="secret", recent_kept=3)
    for _ in range(5):
        await client.post()
    told = await recent(client)
    assert [one[0] for one in told["arrivals"]] == [3, 4, 5]
    assert told["missed"] == 2


async def test_it_needs_the_admin_key_and_a_cursor_that_is_one(start: Start) -> None:
    client = await start(FakeEngine(), admin_key="secret")
    assert (await client.get("/admin/recent"))[0] == 401
    assert (await client.get("/admin/recent?after=nonsense", **ADMIN))[0] == 400
    assert (await recent(client, "00000000.9.9.9"))["arrivals"] == [], "a cursor of another process counts as none"
