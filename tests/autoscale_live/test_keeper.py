"""The loop under every fault of its actuator, its controller and its observations."""

import asyncio
import math
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from autoscale_live.fakes import FakeActuator, FakeGateway
from block.autoscale.controllers import Guard
from block.autoscale.live.figures import Figures
from block.autoscale.live.keeper import Keeper, Pace, Record
from block.autoscale.live.lock import FileLock, NoLock
from block.autoscale.live.membership import Membership
from block.autoscale.live.observer import Observer
from block.autoscale.terms import Kind, Observation, Plan

KIND = Kind(name="gpu", most=8)


class Says:
    """A controller that wants what a test says."""

    name = "says"
    history_s = 60.0

    def __init__(self, want: int = 2) -> None:
        self.want, self.kinds, self.seen = want, [KIND], [Observation(at_s=0)]
        self.trouble: Exception | None = None
        self.slow_s = 0.0

    def decide(self, window: Sequence[Observation]) -> Plan:
        self.seen = list(window)
        time.sleep(self.slow_s)
        if self.trouble is not None:
            raise self.trouble
        return Plan({"gpu": self.want}, "Because.")


def keeper_of(
    session: aiohttp.ClientSession, fakes: Sequence[FakeGateway], actuator: Any, controller: Says, *, settle_s: float = 0.0,
    least: int = 1, lock: Any = None, dry_run: bool = False, act_within_s: float = 1.0, interval_s: float = 0.05,
) -> Keeper:  # fmt: skip
    reached = [fake.gateway(session) for fake in fakes]
    membership = Membership(reached, "none")

    def make(kinds: Sequence[Kind]) -> Says:
        controller.kinds = list(kinds)
        return controller

    return Keeper(
        Observer(reached, membership, actuator, [KIND], session), make, actuator, [KIND],
        Guard(least=least, most=8, settle_s=settle_s),
        pace=Pace(interval_s=interval_s, act_within_s=act_within_s, unmet_after_s=0.1),
        lock=lock or NoLock(), membership=membership, figures=Figures([KIND]), dry_run=dry_run,
    )  # fmt: skip


async def turns(keeper: Keeper, count: int) -> list[Record]:
    records = []
    for _ in range(count):
        records.append(await keeper.turn())
        await asyncio.sleep(0.02)
    return records


async def test_instances_follow_what_the_controller_wants_both_ways(session: Any, gateways: Any) -> None:
    actuator, says = FakeActuator(), Says(3)
    keeper = keeper_of(session, await gateways(), actuator, says)
    await turns(keeper, 2)
    assert len(actuator.there) == 3
    says.want = 1
    await turns(keeper, 2)
    assert len(actuator.there) == 1
    await keeper.close()


async def test_every_decision_explains_itself(session: Any, gateways: Any) -> None:
    keeper = keeper_of(session, await gateways(), FakeActuator(), Says(2))
    first, second = await turns(keeper, 2)
    assert (first.action, first.want, first.asked, first.reason) == ("ordered", {"gpu": 2}, {"gpu": 2}, "Because.")
    assert second.action in ("kept", "ordered")
    assert (second.number, second.controller, second.in_flight) == (2, "says", 3)
    assert second.members == {"gpu": {"starting": 2}}, "no gateway has found them ready"
    text = keeper._figures.render().decode()
    assert 'block_desired_instances{kind="gpu"} 2.0' in text
    assert 'block_autoscale_decisions_total{action="ordered"}' in text
    await keeper.close()


async def test_an_order_that_fails_is_given_again_after_longer_and_longer_pauses(session: Any, gateways: Any) -> None:
    actuator = FakeActuator()
    actuator.fails = 3
    keeper = keeper_of(session, await gateways(), actuator, Says(2), interval_s=0.03)
    records = []
    for _ in range(100):
        records += await turns(keeper, 1)
        if actuator.there:
            break
    assert len(actuator.there) == 2
    assert len(actuator.orders) < len(records), "it paused"
    assert "no machine is to be had" in {record.trouble for record in records}
    assert "waiting" in {record.action for record in records}
    assert (await turns(keeper, 2))[-1].trouble is None
    await keeper.close()


async def test_a_slow_actuator_never_gets_two_orders_at_once_and_the_loop_goes_on(session: Any, gateways: Any) -> None:
    actuator = FakeActuator()
    actuator.slow_s = 30.0
    keeper = keeper_of(session, await gateways(), actuator, Says(2), act_within_s=0.15)
    records = await turns(keeper, 20)
    assert actuator.at_once_most == 1
    assert "busy" in {record.action for record in records}
    assert any("longer than" in (record.trouble or "") for record in records)
    await keeper.close()


async def test_an_actuator_that_lies_gets_absolute_counts_and_is_seen_through(session: Any, gateways: Any) -> None:
    actuator = FakeActuator()
    actuator.lies = True
    keeper = keeper_of(session, await gateways(), actuator, Says(3))
    await turns(keeper, 12)
    assert {tuple(order.items()) for order in actuator.orders} == {(("gpu", 3),)}, "it never asks for more to make up"
    unmet = [
        line for line in keeper._figures.render().decode().splitlines() if line.startswith("block_autoscale_unmet_s")
    ]
    assert float(unmet[0].split()[-1]) > 0.1
    await keeper.close()


async def test_without_observations_the_counts_hold(session: Any, gateways: Any) -> None:
    (fake,) = await gateways()
    actuator, says = FakeActuator(), Says(4)
    keeper = keeper_of(session, [fake], actuator, says)
    await turns(keeper, 2)
    await fake.stop()
    says.want = 1
    records = await turns(keeper, 4)
    assert [record.want for record in records] == [{"gpu": 4}] * 4
    assert {record.action for record in records} == {"held"}
    assert records[-1].blind == (fake.url,)
    await fake.start()
    await turns(keeper, 2)
    assert len(actuator.there) == 1
    await keeper.close()


async def test_with_one_of_two_gateways_silent_nothing_is_removed(session: Any, gateways: Any) -> None:
    seen, silent = await gateways(2)
    actuator, says = FakeActuator(), Says(4)
    keeper = keeper_of(session, [seen, silent], actuator, says)
    await turns(keeper, 2)
    await silent.stop()
    says.want = 1
    assert (await turns(keeper, 3))[-1].want == {"gpu": 4}
    says.want = 5
    assert (await turns(keeper, 2))[-1].want == {"gpu": 5}, "more may come"
    await keeper.close()


async def test_an_autoscaler_that_starts_anew_begins_with_what_is_there(session: Any, gateways: Any) -> None:
    actuator, says = FakeActuator(), Says(6)
    first = keeper_of(session, fakes := await gateways(), actuator, says)
    await turns(first, 2)
    await first.close()
    says.want = 2
    second = keeper_of(session, fakes, actuator, says, settle_s=60.0)
    assert (await turns(second, 3))[-1].want == {"gpu": 6}, "it has not asked for less long enough"
    await second.close()


async def test_counts_stay_within_the_least_whatever_is_asked(session: Any, gateways: Any) -> None:
    actuator = FakeActuator()
    keeper = keeper_of(session, await gateways(), actuator, Says(0), least=2)
    await turns(keeper, 3)
    assert len(actuator.there) == 2
    await keeper.close()


async def test_a_controller_that_raises_costs_its_turn_and_no_instance(session: Any, gateways: Any) -> None:
    actuator, says = FakeActuator(), Says(2)
    keeper = keeper_of(session, await gateways(), actuator, says)
    await turns(keeper, 2)
    says.trouble = ArithmeticError("a bug")
    task = asyncio.create_task(keeper.run())
    await asyncio.sleep(0.2)
    assert len(actuator.there) == 2
    says.trouble, says.want = None, 3
    await asyncio.sleep(0.3)
    task.cancel()
    assert len(actuator.there) == 3
    await keeper.close()


async def test_of_two_autoscalers_one_acts_and_the_other_takes_over(
    session: Any, gateways: Any, tmp_path: Path
) -> None:
    fakes, actuators = await gateways(), [FakeActuator(), FakeActuator()]
    keepers = [keeper_of(session, fakes, actuator, Says(3), lock=FileLock(tmp_path / "lock")) for actuator in actuators]
    assert (await turns(keepers[0], 2))[0].action == "ordered"
    assert {record.action for record in (await turns(keepers[1], 2))} == {"standby"}
    assert not actuators[1].orders
    await keepers[0].close()
    await turns(keepers[1], 2)
    assert len(actuators[1].there) == 3
    await keepers[1].close()


async def test_a_holder_that_is_stopped_keeps_the_lock_and_one_that_is_killed_lets_it_go(tmp_path: Path) -> None:
    program = (
        "import asyncio, pathlib, sys, time; from block.autoscale.live.lock import FileLock\n"
        "lock = FileLock(pathlib.Path(sys.argv[1])); print(asyncio.run(lock.held()), flush=True); time.sleep(60)"
    )
    holder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(tmp_path / "lock"), stdout=asyncio.subprocess.PIPE
    )
    assert holder.stdout is not None
    assert await holder.stdout.readline() == b"True\n"
    lock = FileLock(tmp_path / "lock")
    holder.send_signal(signal.SIGSTOP)
    assert not await lock.held(), "two must never act; the alert BlockAutoscaleNoLeader tells of it"
    holder.kill()
    await holder.wait()
    assert await lock.held()
    await lock.release()


async def test_a_lock_file_that_was_removed_is_made_and_held_anew(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert await first.held()
    (tmp_path / "lock").unlink()
    assert await second.held()
    assert not await first.held(), "two must never act"
    await second.release()
    assert await first.held()
    await first.release()


async def test_without_a_place_for_the_lock_nobody_acts_and_it_is_said_once(
    session: Any, gateways: Any, tmp_path: Path, caplog: Any
) -> None:
    actuator, folder = FakeActuator(), tmp_path / "folder"
    folder.mkdir()
    keeper = keeper_of(session, await gateways(), actuator, Says(3), lock=FileLock(folder / "lock"))
    assert (await turns(keeper, 2))[-1].action != "standby"
    folder.rename(tmp_path / "other")
    assert (await turns(keeper, 3))[-1].action == "standby"
    assert caplog.text.count("standing by: The lock file") == 1
    folder.mkdir()
    assert (await turns(keeper, 2))[-1].action != "standby"
    await keeper.close()


class RunsOut:
    """A lock that says it is held, but whose time ran out while this process was stopped."""

    def __init__(self) -> None:
        self.sure_until_s = math.inf

    async def held(self) -> bool:
        return True

    async def release(self) -> None:
        return


async def test_one_whose_lease_ran_out_while_it_was_stopped_does_not_act(session: Any, gateways: Any) -> None:
    actuator, lock = FakeActuator(), RunsOut()
    actuator.slow_s = 30.0
    keeper = keeper_of(session, await gateways(), actuator, Says(3), lock=lock, act_within_s=60.0)
    assert (await turns(keeper, 1))[0].action == "ordered"
    order = keeper._act
    lock.sure_until_s = 0.0
    assert (await turns(keeper, 2))[-1].action == "standby"
    assert order is not None
    assert order.cancelled(), "the order under way is given up"
    await keeper.close()


async def test_a_dry_run_leaves_the_lock_to_those_who_act(session: Any, gateways: Any, tmp_path: Path) -> None:
    fakes, actuator = await gateways(), FakeActuator()
    trial = keeper_of(session, fakes, FakeActuator(), Says(3), lock=FileLock(tmp_path / "lock"), dry_run=True)
    acts = keeper_of(session, fakes, actuator, Says(3), lock=FileLock(tmp_path / "lock"))
    await turns(trial, 2)
    assert not trial._membership.leads, "nor does it touch the gateways"
    assert (await turns(acts, 2))[0].action == "ordered"
    await trial.close()
    await acts.close()


@pytest.mark.parametrize("jump_s", [-7200.0, 7200.0])
async def test_a_clock_that_is_set_changes_nothing(
    session: Any, gateways: Any, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    actuator, says = FakeActuator(), Says(4)
    keeper = keeper_of(session, await gateways(), actuator, says, settle_s=1.0)
    await turns(keeper, 2)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_s)
    says.want = 1
    assert (await turns(keeper, 1))[-1].want == {"gpu": 4}, "fewer were not asked for long enough"
    await asyncio.sleep(1.1)
    assert (await turns(keeper, 1))[-1].want == {"gpu": 1}, "and now they were"
    ends_s = [seen.at_s for seen in says.seen]
    assert ends_s == sorted(ends_s)
    assert ends_s[-1] - ends_s[0] < 60.0
    await keeper.close()


async def test_two_autoscalers_without_a_lock_give_the_same_orders_and_do_not_flap(session: Any, gateways: Any) -> None:
    actuator = FakeActuator()
    fakes = await gateways()
    keepers = [keeper_of(session, fakes, actuator, Says(3)) for _ in range(2)]
    for _ in range(4):
        await asyncio.gather(*(keeper.turn() for keeper in keepers))
        await asyncio.sleep(0.02)
    assert len(actuator.there) == 3
    assert {tuple(order.items()) for order in actuator.orders} == {(("gpu", 3),)}
    for keeper in keepers:
        await keeper.close()


async def test_a_dry_run_decides_and_does_nothing(session: Any, gateways: Any) -> None:
    actuator = FakeActuator()
    keeper = keeper_of(session, await gateways(), actuator, Says(3), dry_run=True)
    records = await turns(keeper, 2)
    assert {record.action for record in records} == {"dry-run"}
    assert records[-1].want == {"gpu": 3}
    assert not actuator.orders
    await keeper.close()


async def test_cold_starts_are_measured_from_the_order_and_reach_the_controller(session: Any, gateways: Any) -> None:
    (fake,) = await gateways()
    actuator, says = FakeActuator(), Says(1)
    keeper = keeper_of(session, [fake], actuator, says)
    await turns(keeper, 1)
    fake.seat("gpu-0")
    await keeper._membership.beat()
    record = (await turns(keeper, 1))[-1]
    assert record.members == {"gpu": {"ready": 1}}
    assert record.cold_start_s["gpu"] == pytest.approx(7.0, abs=2.0), "the fake orders seven seconds back"
    assert says.kinds[0].cold_start_s == pytest.approx(record.cold_start_s["gpu"], abs=0.1)
    await keeper.close()


async def test_instances_from_elsewhere_count_and_are_not_started_twice(session: Any, gateways: Any) -> None:
    (fake,) = await gateways()
    fake.seat("static-1")
    actuator = FakeActuator()
    keeper = keeper_of(session, [fake], actuator, Says(3))
    records = await turns(keeper, 2)
    assert len(actuator.there) == 2
    assert records[0].members == {"gpu": {"ready": 1}}
    await keeper.close()
