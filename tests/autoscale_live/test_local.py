"""Instances as real processes: started, welcomed, drained, stopped, replaced; none is left."""

# ruff: noqa: ASYNC110  (what is waited for happens in another process)

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from autoscale_live.fakes import FakeGateway
from block.autoscale.actuators.local import LocalActuator, LocalKind, LocalSettings
from block.autoscale.actuators.surroundings import Surroundings
from block.autoscale.live.membership import Membership
from block.autoscale.terms import Kind
from block.errors import ActuatorError, ConfigError

ENGINE = [sys.executable, "-S", "-E", str(Path(__file__).with_name("engine.py")), "{port}"]
KINDS = {name: Kind(name=name) for name in ("gpu", "bad")}


async def until(done: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not done():
            await asyncio.sleep(0.02)


def pids() -> set[int]:
    """Engines of these tests that live."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
                ended = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                continue
            if b"autoscale_live/engine.py" in command and f"\0{os.getpid()}".encode() in command and not ended:
                found.add(int(entry.name))
    return found


class Local:
    """An actuator, the gateway that its instances join, and the membership between."""

    def __init__(self, actuator: LocalActuator, membership: Membership, gateway: FakeGateway) -> None:
        self.actuator, self.membership, self.gateway = actuator, membership, gateway

    async def phases(self) -> list[str]:
        return [member.phase.value for member in await self.actuator.members()]

    async def reach(self, *phases: str) -> None:
        async with asyncio.timeout(20):
            while sorted(await self.phases()) != sorted(phases):
                await asyncio.sleep(0.02)


@pytest.fixture
async def local(session: Any, gateways: Any) -> AsyncIterator[Callable[..., Local]]:
    (gateway,) = await gateways()
    made: list[tuple[Local, asyncio.Task[None]]] = []

    def make(**settings: Any) -> Local:
        membership = Membership([gateway.gateway(session)], prefix="test-")
        mark = str(os.getpid())
        given = {"command": [*ENGINE, *settings.pop("words", []), mark], "stop_within_s": 2.0} | settings
        actuator = LocalActuator(LocalSettings(**given), Surroundings("test", KINDS, membership, session))
        beating = asyncio.create_task(_beat(membership))
        made.append((Local(actuator, membership, gateway), beating))
        return made[-1][0]

    yield make
    for one, beating in made:
        beating.cancel()
        await one.actuator.close()
    assert not pids()


async def _beat(membership: Membership) -> None:
    while True:
        await membership.beat()
        await asyncio.sleep(0.05)


async def test_instances_start_join_the_gateway_and_leave_it_drained(local: Any) -> None:
    one = local()
    await one.actuator.scale_to({"gpu": 2})
    assert await one.phases() == ["starting", "starting"]
    await one.reach("ready", "ready")
    await until(lambda: len(one.gateway.instances) == 2)
    assert len(pids()) == 2
    first, second = one.gateway.instances.values()
    first["in_flight"], second["in_flight"] = 3, 1
    await one.membership.beat()
    await one.actuator.scale_to({"gpu": 1})
    await until(lambda: second["state"] == "draining")
    assert first["state"] != "draining", "the one with fewer requests goes"
    await asyncio.sleep(0.3)
    assert len(pids()) == 2, "it still has a request"
    second["in_flight"] = 0
    await one.reach("ready")
    assert len(pids()) == 1
    await until(lambda: list(one.gateway.instances) == [first["name"]])


async def test_an_order_repeated_changes_nothing(local: Any) -> None:
    one = local()
    for _ in range(3):
        await one.actuator.scale_to({"gpu": 1})
    await one.reach("ready")
    await one.actuator.scale_to({"gpu": 1})
    assert len(pids()) == 1


async def test_an_instance_that_dies_is_forgotten_and_replaced(local: Any) -> None:
    one = local()
    await one.actuator.scale_to({"gpu": 1})
    await one.reach("ready")
    await until(lambda: len(one.gateway.instances) == 1)
    (name,) = one.gateway.instances
    os.kill(next(iter(pids())), signal.SIGKILL)
    await one.reach()
    await until(lambda: name not in one.gateway.instances)
    async with asyncio.timeout(10):
        while not await one.phases():
            await one.actuator.scale_to({"gpu": 1})
            await asyncio.sleep(0.1)
    await one.reach("ready")
    assert (await one.actuator.members())[0].id != name


async def trouble_with(one: Local, kind: str, started: set[str] | None = None) -> str:
    """Give the order again and again until it is an error."""
    async with asyncio.timeout(20):
        while True:
            try:
                await one.actuator.scale_to({kind: 1})
            except ActuatorError as error:
                return str(error)
            if started is not None:
                started |= {member.id for member in await one.actuator.members()}
            assert len(pids()) <= 1
            await asyncio.sleep(0.05)


async def test_one_that_never_becomes_ready_is_stopped_and_tried_so_often_and_no_more(local: Any) -> None:
    one, started = local(words=["never"], ready_within_s=0.3, attempts=2), set[str]()
    trouble = await trouble_with(one, "bad", started)
    assert trouble.startswith("2 starts of bad failed in a row (not ready within 0.3 s); next in ")
    assert len(started) == 2
    assert not one.gateway.instances


async def test_one_that_ends_at_once_says_its_last_words(local: Any) -> None:
    assert "ended with code 1: CUDA out of memory" in await trouble_with(local(words=["dies"], attempts=1), "bad")


async def test_a_program_that_is_not_there_is_an_error_and_no_crash(local: Any) -> None:
    trouble = await trouble_with(local(command=["/no/such/program"], attempts=1), "gpu")
    assert "'/no/such/program' cannot be run: No such file" in trouble


async def test_one_kinds_failures_do_not_hold_up_another(local: Any) -> None:
    mark = str(os.getpid())
    one = local(kinds={"bad": LocalKind(command=[*ENGINE, "dies", mark])}, attempts=1)
    await trouble_with(one, "bad")
    with pytest.raises(ActuatorError, match="starts of bad failed"):
        await one.actuator.scale_to({"bad": 1, "gpu": 1})
    await one.reach("ready")


async def test_starting_ones_are_the_first_to_go(local: Any) -> None:
    one = local()
    await one.actuator.scale_to({"gpu": 1})
    await one.reach("ready")
    (kept,) = [member.id for member in await one.actuator.members()]
    await one.actuator.scale_to({"gpu": 2})
    await one.actuator.scale_to({"gpu": 1})
    await one.reach("ready")
    assert [member.id for member in await one.actuator.members()] == [kept]


async def test_closing_takes_all_off_the_gateway_and_stops_them(local: Any) -> None:
    one = local()
    await one.actuator.scale_to({"gpu": 2})
    await one.reach("ready", "ready")
    await until(lambda: len(one.gateway.instances) == 2)
    await one.actuator.close()
    assert not one.gateway.instances
    assert not pids()


async def test_a_predecessors_dead_instances_are_taken_off_the_gateway_and_nobody_elses(local: Any) -> None:
    one = local()
    one.gateway.seat("test-gpu-1-abcd", state="down")
    one.gateway.seat("other-1", state="down")
    await until(lambda: list(one.gateway.instances) == ["other-1"])


def test_settings_for_a_kind_that_is_not_there_are_refused() -> None:
    settings = LocalSettings(kinds={"tpu": LocalKind()})
    with pytest.raises(ConfigError, match=r"actuator.kinds.tpu: there is no such kind"):
        LocalActuator(settings, Surroundings("a", KINDS, None, None))  # type: ignore[arg-type]


def test_words_in_commands_are_filled_in() -> None:
    settings = LocalSettings(
        command=["serve", "--port", "{port}", "--id={name}"], environment={"CUDA_VISIBLE_DEVICES": "{slot}"},
        kinds={"gpu": LocalKind(flags=["--kind", "{kind}", '{"a": 1}'])},
    )  # fmt: skip
    from block.autoscale.actuators.local import _Instance

    async def look() -> None:
        actuator = LocalActuator(settings, Surroundings("a", KINDS, None, None))  # type: ignore[arg-type]
        one = _Instance("a-gpu-1", KINDS["gpu"], 3, 1234, 1235)
        assert actuator._command(one) == ["serve", "--port", "1234", "--id=a-gpu-1", "--kind", "gpu", '{"a": 1}']
        assert actuator._environment(one) == {"CUDA_VISIBLE_DEVICES": "3"}

    asyncio.run(look())


def test_children_end_with_their_parent_whatever_ends_it() -> None:
    program = (
        "import asyncio, sys\n"
        "from block.autoscale.actuators.child import Child\n"
        "async def main():\n"
        "    child = await Child.start([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "    print(child.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("it lives on")
