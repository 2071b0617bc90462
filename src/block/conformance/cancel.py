"""Clients that leave: the engine must stop working for them. Seen in the metrics of the gateway or of its engines."""

import asyncio
from time import monotonic
from typing import Any, Final

from block.conformance.check import CUSTOM, Check, NotApplicableError, expect
from block.conformance.target import Target

_GAUGES: Final = (
    "inflight_requests",
    "num_requests_running",
    "num_running_reqs",
    "running_requests",
    "active_requests",
)
_LONG_TOKENS: Final = 4000
_PACE_EVENTS: Final = 8
_SEEN_S: Final = 2.0
"""How soon after leaving the request must be gone from the metrics."""
_ABORTED: Final = 20


def _long(target: Target, *, stream: bool) -> dict[str, Any]:
    return target.chat(max_tokens=_LONG_TOKENS, ignore_eos=True, stream=stream)


async def _in_flight(target: Target) -> float:
    found = await target.gauge(_GAUGES)
    if found is None:
        where = "the engines'" if target.engines else "the gateway's"
        raise NotApplicableError(f"{where} /metrics shows no requests in flight; name engines with --engine URL")
    return found


async def _remaining_s(target: Target) -> float:
    """How long a long answer would last, from the pace of the events behind its first bytes (which may hold many, where
    something on the way was busy).

    Raises:
        NotApplicableError: too short to tell a cancelled request from one that ended.
    """
    async with target.wire() as wire:
        await wire.send(target.post(_long(target, stream=True)))
        began_s = monotonic()
        first_s, first, events = 0.0, 0, 0
        while events - first < _PACE_EVENTS and monotonic() - began_s < target.timeout_s:
            if not await wire.read(target.timeout_s):
                break
            events = wire.answers[0].body.count(b"data:") if wire.answers else 0
            if events and not first_s:
                first_s, first = monotonic(), events
        ended = bool(wire.answers and wire.answers[0].whole)
        pace_s = (monotonic() - first_s) / max(events - first, 1)
        wire.abort()
    expect(events > 0, "no stream begins")
    remaining_s = pace_s * _LONG_TOKENS
    if ended or remaining_s < 2 * _SEEN_S:
        raise NotApplicableError("answers are made too quickly to see whether they are cancelled")
    return remaining_s


async def _goes_when_client_leaves(target: Target, *, stream: bool) -> None:
    await _in_flight(target)
    await _remaining_s(target)
    await asyncio.sleep(0.2)
    before = await _in_flight(target)
    async with target.wire() as wire:
        await wire.send(target.post(_long(target, stream=stream)))
        if stream:
            await wire.read(target.timeout_s)
        if not await _becomes(target, lambda now: now > before):
            raise NotApplicableError("a running request does not show in the metrics")
        wire.abort()
    gone = await _becomes(target, lambda now: now <= before)
    expect(gone, f"{_SEEN_S:g} s after the client has left its request still runs")


async def _becomes(target: Target, condition: Any) -> bool:
    deadline_s = monotonic() + _SEEN_S
    while monotonic() < deadline_s:
        if condition(await _in_flight(target)):
            return True
        await asyncio.sleep(0.02)
    return False


async def stream_left(target: Target) -> None:
    await _goes_when_client_leaves(target, stream=True)


async def whole_left(target: Target) -> None:
    await _goes_when_client_leaves(target, stream=False)


async def many_left(target: Target) -> None:
    async def leave(n: int) -> None:
        sent = target.post(_long(target, stream=bool(n % 2)))
        async with target.wire() as wire:
            await wire.send(sent[: len(sent) - n % 3 * 20])  # some leave in the middle of their own request
            await wire.read(0.02 * (n % 4) + 0.001)
            wire.abort()

    await asyncio.gather(*(leave(n) for n in range(_ABORTED)))
    await target.still_serves()


CHECKS: Final = (
    Check("stream-left", "A client that leaves its stream stops the engine's work for it.", CUSTOM, stream_left),
    Check("whole-left", "So does a client that leaves before its whole answer comes.", CUSTOM, whole_left),
    Check("many-left", "20 clients that leave at all stages harm nobody else.", CUSTOM, many_left),
)
