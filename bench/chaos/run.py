"""Chaos: what clients see while an instance misbehaves, for this gateway and whatever peers are installed.

    python bench/chaos/run.py [--scenario kill] [--router 'block serve'] [--vllm-router PATH] [--sglang-router PATH] [--json]

Three emulated engines (`block emulate`) behind one router each time, 30 requests a second, half of them streamed, 80 tokens
each; the right text of every answer is known. The first engine misbehaves from second 4 to second 10, the load goes on to
second 20. Lost: an error, a timeout (25 s) or nothing at all instead of an answer; broken: a stream that began and did not
end, or not as it should. Share: of the requests from a second after the begin to its end, those that went to the bad
instance (a third is fair). Back: from the end of the misbehaviour to the first request there. P99: of whole answers, added
to that before. Routers run with their defaults; HAProxy with health checks every second and all its retries.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "gateway"))

from fleet import Member
from load import Outcome, drive
from rig import heading
from routers import Running, Start, found, haproxy_path, two_gateways
from scenarios import SCENARIOS, Scenario

RATE, BEFORE_S, FAULT_S, AFTER_S, ENGINES = 30.0, 4.0, 6.0, 10.0, 3


class Row(NamedTuple):
    router: str
    scenario: str
    offered: int
    lost: int
    broken: int
    streams: int
    share: float | None
    back_s: float | None
    p99_added_s: float | None
    what: dict[str, int]


async def run(name: str, start: Start, scenario: Scenario) -> Row:
    fleet = [Member() for _ in range(ENGINES)]
    try:
        await asyncio.gather(*(member.start() for member in fleet))
        with ExitStack() as stack:
            running = await asyncio.to_thread(start, stack, fleet)
            await asyncio.sleep(1.0)
            load = asyncio.create_task(drive([running.url], rate=RATE, seconds=BEFORE_S + FAULT_S + AFTER_S))
            await asyncio.sleep(BEFORE_S)
            began_s = time.monotonic()
            await scenario.begin(fleet)
            await asyncio.sleep(max(0.0, FAULT_S - (time.monotonic() - began_s)))
            await scenario.end(fleet)
            ended_s = time.monotonic()
            outcomes = await load
        return judged(name, scenario, outcomes, fleet[0], began_s, ended_s)
    finally:
        await asyncio.gather(*(member.close() for member in fleet))


async def run_gateway_killed(path: str) -> Row:
    """Two gateways behind HAProxy in TCP mode; one is killed and stays dead."""
    scenario = Scenario("gateway killed", "", _nothing, _nothing, hits_all=True)

    def start(stack: ExitStack, fleet: list[Member]) -> Running:
        return two_gateways(path, "--policy", "block", "--continue-streams", "3")(stack, fleet)

    fleet = [Member() for _ in range(ENGINES)]
    try:
        await asyncio.gather(*(member.start() for member in fleet))
        with ExitStack() as stack:
            running = await asyncio.to_thread(start, stack, fleet)
            load = asyncio.create_task(drive([running.url], rate=RATE, seconds=BEFORE_S + FAULT_S))
            await asyncio.sleep(BEFORE_S)
            began_s = time.monotonic()
            os.kill(running.pids[0], signal.SIGKILL)
            outcomes = await load
        return judged("2 x block serve, HAProxy (TCP)", scenario, outcomes, fleet[0], began_s, began_s)
    finally:
        await asyncio.gather(*(member.close() for member in fleet))


async def _nothing(_: list[Member]) -> None:
    pass


def judged(
    name: str, scenario: Scenario, outcomes: list[Outcome], bad: Member, began_s: float, ended_s: float
) -> Row:  # fmt: skip
    before = [o.ended_s - o.sent_s for o in outcomes if o.whole and o.ended_s < began_s]
    during = [o for o in outcomes if o.ended_s >= began_s]
    lost = [o for o in during if not o.whole and not o.began]
    broken = [o for o in during if not o.whole and o.began]
    share = back_s = None
    window = (began_s + 1.0, ended_s)
    if not scenario.hits_all:
        offered = sum(window[0] <= o.sent_s < window[1] for o in outcomes)
        share = sum(window[0] <= at_s < window[1] for at_s in bad.link.requests) / max(offered, 1)
    if not scenario.ours and ended_s > began_s:
        back_s = min((at_s - ended_s for at_s in bad.link.requests if at_s >= ended_s), default=None)
    times = [o.ended_s - o.sent_s for o in during if o.whole]
    added_s = p99(times) - p99(before) if times and before else None
    streams = sum(o.stream for o in during)
    what = dict(Counter(o.what for o in during if not o.whole))
    return Row(name, scenario.name, len(during), len(lost), len(broken), streams, share, back_s, added_s, what)


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]


async def run_all(options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    routers = {n: s for n, s in found(options).items() if not options.router or n in options.router}
    for scenario in SCENARIOS:
        if options.scenario and scenario.name not in options.scenario:
            continue
        for name, start in routers.items():
            if scenario.ours and name != "block serve":
                continue
            try:
                rows.append(await run(name, start, scenario))
            except SystemExit as error:
                print(f"{name}, {scenario.name}: {error}", file=sys.stderr)
                continue
            print(line(rows[-1]), file=sys.stderr, flush=True)
    path = haproxy_path()
    if path and (not options.scenario or "gateway killed" in options.scenario) and not options.router:
        rows.append(await run_gateway_killed(path))
        print(line(rows[-1]), file=sys.stderr, flush=True)
    return rows


TITLES = (
    "scenario",
    "router",
    "offered",
    "lost",
    "broken",
    "of streams",
    "share to it",
    "back s",
    "P99 added s",
    "what clients saw",
)


def cells(row: Row) -> list[str]:
    return [
        row.scenario, row.router, str(row.offered), str(row.lost), str(row.broken), str(row.streams),
        "-" if row.share is None else f"{row.share:.1%}",
        "-" if row.back_s is None else f"{row.back_s:.1f}",
        "-" if row.p99_added_s is None else f"{row.p99_added_s:+.2f}",
        ", ".join(f"{n} {what}" for what, n in sorted(row.what.items())),
    ]  # fmt: skip


def line(row: Row) -> str:
    return "| " + " | ".join(cells(row)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", action="append", help="only this; repeatable")
    parser.add_argument("--router", action="append", help="only this; repeatable")
    parser.add_argument("--vllm-router", help="its path; by default looked up on PATH")
    parser.add_argument("--sglang-router", help="its path; by default looked up on PATH")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    top = heading()
    rows = asyncio.run(run_all(options))
    if options.json:
        found_rows: list[dict[str, Any]] = [row._asdict() for row in rows]
        print(json.dumps({"heading": top, "rows": found_rows}, indent=1))
        return
    print(top + "\n\n| " + " | ".join(TITLES) + " |\n|" + "---|" * len(TITLES))
    for row in rows:
        print(line(row))


if __name__ == "__main__":
    main()
