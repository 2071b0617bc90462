"""What goes wrong, one row each: how it begins and how it ends. The first member of the fleet is the one it happens to."""

import signal
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from fleet import Member

Step = Callable[[list[Member]], Awaitable[None]]


class Scenario(NamedTuple):
    """``ours``: it concerns predictors, which other routers do not have. ``hits_all``: no share of a bad instance to tell."""

    name: str
    what: str
    begin: Step
    end: Step
    ours: bool = False
    hits_all: bool = False


async def kill(fleet: list[Member]) -> None:
    bad = fleet[0]
    bad.engine.signal(signal.SIGKILL)
    await bad.link.set("closed")
    await bad.engine.kill()


async def revive(fleet: list[Member]) -> None:
    await fleet[0].engine.start()
    await fleet[0].link.set("open")


async def kill_all(fleet: list[Member]) -> None:
    for member in fleet:
        await kill([member])


async def revive_all(fleet: list[Member]) -> None:
    for member in fleet:
        await revive([member])


async def stop(fleet: list[Member]) -> None:
    fleet[0].engine.signal(signal.SIGSTOP)


async def go_on(fleet: list[Member]) -> None:
    fleet[0].engine.signal(signal.SIGCONT)


async def drip(fleet: list[Member]) -> None:
    await fleet[0].link.set("drip")


async def refuse(fleet: list[Member]) -> None:
    await fleet[0].link.set("refuse")


async def blackhole(fleet: list[Member]) -> None:
    await fleet[0].link.set("blackhole")


async def reopen(fleet: list[Member]) -> None:
    fleet[0].link.cut()  # what is open then is of no use
    await fleet[0].link.set("open")


async def errors(fleet: list[Member]) -> None:
    await fleet[0].fault(kind="errors", fraction=1.0)


async def no_errors(fleet: list[Member]) -> None:
    await fleet[0].fault(kind="errors", fraction=0.0)


async def predictor_dead(fleet: list[Member]) -> None:
    await fleet[0].predictor.kill()


async def predictor_back(fleet: list[Member]) -> None:
    await fleet[0].predictor.start()


async def predictor_slow(fleet: list[Member]) -> None:
    fleet[0].predictor.signal(signal.SIGSTOP)


async def predictor_goes_on(fleet: list[Member]) -> None:
    fleet[0].predictor.signal(signal.SIGCONT)


async def predictor_lies(fleet: list[Member]) -> None:
    await fleet[0].lie()


async def predictor_honest(fleet: list[Member]) -> None:
    await fleet[0].be_honest()


SCENARIOS = (
    Scenario("kill", "SIGKILL, back 6 s later", kill, revive),
    Scenario("hang", "SIGSTOP, SIGCONT 6 s later", stop, go_on),
    Scenario("drip", "its answers come at 40 bytes a second", drip, reopen),
    Scenario("refuse", "new connections are refused", refuse, reopen),
    Scenario("errors", "500 to every request", errors, no_errors),
    Scenario("half-open", "takes connections and bytes, answers nothing", blackhole, reopen),
    Scenario("all gone", "all killed, all back 6 s later", kill_all, revive_all, hits_all=True),
    Scenario("predictor dead", "its predictor is killed", predictor_dead, predictor_back, ours=True),
    Scenario("predictor slow", "its predictor is stopped (SIGSTOP)", predictor_slow, predictor_goes_on, ours=True),
    Scenario("predictor lying", "its predictor watches an idle engine", predictor_lies, predictor_honest, ours=True),
)
