"""Instances as processes of this machine: emulated engines, vLLM, or any command; a predictor beside each.

Each instance has one task, which is its whole life:

    start ──> healthy ──> welcomed at the gateways ──> watched ──┬─ to be removed: drained, then SIGTERM
      │ not within ready_within_s                                └─ died or not healthy: forgotten, stopped
      └──> stopped, counted as a failed start

Nothing is adopted: what this process did not start it neither counts nor stops, and its children end with it.
A kind whose starts fail in a row is tried again after longer and longer pauses, and after ``attempts`` only every
``GIVE_UP_S``; ``scale_to`` then says so by an error.
"""

import asyncio
import logging
import os
import secrets
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from time import monotonic
from typing import Final, Literal

import aiohttp
import msgspec

from block.autoscale.actuators.child import Child
from block.autoscale.actuators.surroundings import Surroundings
from block.autoscale.steady import now_s
from block.autoscale.terms import Kind, Member, Phase
from block.errors import ActuatorError, ConfigError
from block.gateway.config import InstanceConfig
from block.steptime.profile import load_profile

GIVE_UP_S: Final = 300.0
HEALTH_EVERY_S: Final = 1.0
HEALTH_TIMEOUT_S: Final = 2.0

log = logging.getLogger("block.autoscale")


class LocalKind(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is special to one kind; ``flags`` are added to the engine's command."""

    command: list[str] = []
    flags: list[str] = []
    environment: dict[str, str] = {}


class LocalSettings(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="local"
):
    """``command`` starts an engine (empty: ``block emulate`` with the kind's profile and limits), ``predictor`` the predictor
    beside it (``auto``: ``block predictor`` where the engine is emulated). In both, in ``flags`` and in ``environment`` stand
    ``{host} {port} {name} {kind} {profile} {slot} {predictor_port}``; ``slot`` is the lowest number from 0 that no living
    instance has (a GPU's index, say). ``evidence = "profile"``: the gateways model the engine by the kind's profile and limits.
    """

    command: list[str] = []
    flags: list[str] = []
    predictor: Literal["auto", "none"] | list[str] = "auto"
    evidence: Literal["predictor", "profile", "none"] = "predictor"
    environment: dict[str, str] = {}
    kinds: dict[str, LocalKind] = {}
    model: str = "emulated"
    host: str = "127.0.0.1"
    health_path: str = "/health"
    ready_within_s: float = 600.0
    drain_within_s: float = 600.0
    stop_within_s: float = 10.0
    unhealthy_after_s: float = 30.0
    attempts: int = 5

    def __post_init__(self) -> None:
        for name in ("ready_within_s", "stop_within_s", "unhealthy_after_s", "attempts"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"actuator.{name} must be above 0, not {getattr(self, name)}.")


class _Instance:
    """One instance and where it is in its life. Written by its own task, and ``leaving`` by the actuator."""

    def __init__(self, name: str, kind: Kind, slot: int, port: int, predictor_port: int) -> None:
        self.name, self.kind, self.slot, self.port, self.predictor_port = name, kind, slot, port, predictor_port
        self.ordered_s = now_s()
        self.phase, self.since_s = Phase.STARTING, self.ordered_s
        self.leaving = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.engine: Child | None = None
        self.has_predictor = False

    def enter(self, phase: Phase) -> None:
        self.phase, self.since_s = phase, now_s()

    @property
    def alive(self) -> bool:
        """It serves, or will."""
        return self.phase in (Phase.STARTING, Phase.READY) and not self.leaving.is_set()


class _Failures:
    """Failed starts of one kind in a row."""

    def __init__(self) -> None:
        self.count, self.until_s, self.why = 0, 0.0, ""


class LocalActuator:
    """Owns the children."""

    keeps_members = True

    def __init__(self, settings: LocalSettings, surroundings: Surroundings) -> None:
        self._settings, self._around = settings, surroundings
        unknown = sorted(set(settings.kinds) - set(surroundings.kinds))
        if unknown:
            raise ConfigError(f"actuator.kinds.{unknown[0]}: there is no such kind.")
        for kind in surroundings.kinds.values():
            if not (settings.command or settings.kinds.get(kind.name, LocalKind()).command):
                load_profile(kind.profile)  # what is emulated needs one
        self._instances: dict[str, _Instance] = {}
        self._failures = {name: _Failures() for name in surroundings.kinds}
        self._number = 0

    async def scale_to(self, want: Mapping[str, int]) -> None:
        """Start what is lacking, let go what is too much.

        Raises:
            ActuatorError: starts of a kind fail again and again; the others were seen to.
        """
        trouble = []
        for kind, count in want.items():
            if kind not in self._around.kinds:
                raise ActuatorError(f"There is no kind {kind!r}.")
            mine = [one for one in self._instances.values() if one.kind.name == kind and one.alive]
            failures = self._failures[kind]
            if len(mine) < count and monotonic() < failures.until_s:
                if failures.count >= self._settings.attempts:
                    wait_s = failures.until_s - monotonic()
                    trouble.append(
                        f"{failures.count} starts of {kind} failed in a row ({failures.why}); next in {wait_s:.0f} s"
                    )
                continue
            for _ in range(count - len(mine)):
                self._start(self._around.kinds[kind])
            for one in sorted(mine, key=self._cost_of_leaving)[: max(0, len(mine) - count)]:
                log.info("%s is to be removed", one.name)
                one.leaving.set()
        if trouble:
            raise ActuatorError("; ".join(trouble) + ".")

    async def members(self) -> Sequence[Member]:
        return [
            Member(one.name, one.kind.name, Phase.DRAINING if one.leaving.is_set() else one.phase, one.since_s)
            for one in self._instances.values()
        ]

    @property
    def ordered_s(self) -> Mapping[str, float]:
        """Wall time at which each instance was ordered."""
        return {one.name: one.ordered_s for one in self._instances.values()}

    async def close(self) -> None:
        """Take all children off the gateways, then stop them."""
        for name in self._instances:
            self._around.membership.forget(name)
        if self._instances:
            await self._around.membership.beat()
        tasks = [one.task for one in self._instances.values() if one.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _cost_of_leaving(self, one: _Instance) -> tuple[bool, int, float]:
        """Who goes first: those not serving yet, then those with the fewest requests, then the youngest."""
        return one.phase is Phase.READY, self._around.membership.in_flight(one.name), -one.since_s

    # One instance's life

    def _start(self, kind: Kind) -> None:
        self._number += 1
        slots = {one.slot for one in self._instances.values()}
        slot = next(n for n in range(len(slots) + 1) if n not in slots)
        name = f"{self._around.name}-{kind.name}-{self._number}-{secrets.token_hex(2)}"
        one = _Instance(name, kind, slot, *_free_ports(self._settings.host, 2))
        self._instances[name] = one
        one.task = asyncio.create_task(self._live(one), name=name)
        log.info("starting %s on port %d", name, one.port)

    async def _live(self, one: _Instance) -> None:
        children: list[Child] = []
        membership = self._around.membership
        try:
            await self._begin(one, children)
            if not one.leaving.is_set():
                one.enter(Phase.READY)
                self._failures[one.kind.name] = _Failures()
                membership.welcome(self._config(one))
                await self._watch(one, children)
            if one.leaving.is_set() and one.phase is Phase.READY:
                one.enter(Phase.DRAINING)
                if not await membership.retire(one.name, self._settings.drain_within_s):
                    log.warning("%s was not empty after %g s", one.name, self._settings.drain_within_s)
        except (ActuatorError, TimeoutError) as error:
            self._failed(one, str(error) or f"not ready within {self._settings.ready_within_s:g} s", children)
        finally:
            one.phase = Phase.DOWN
            membership.forget(one.name)
            await asyncio.gather(*(child.stop(self._settings.stop_within_s) for child in children))
            self._instances.pop(one.name, None)
            log.info("%s is gone", one.name)

    async def _begin(self, one: _Instance, children: list[Child]) -> None:
        """Until it is ready, or shall leave."""
        async with asyncio.timeout(self._settings.ready_within_s):
            one.engine = await Child.start(self._command(one), environment=self._environment(one))
            children.append(one.engine)
            predictor = self._predictor_command(one)
            if predictor:
                children.append(await Child.start(predictor, environment=self._environment(one)))
                one.has_predictor = True
            pause_s = 0.02
            while not one.leaving.is_set() and not await self._healthy(one, children):
                await asyncio.sleep(pause_s)
                pause_s = min(1.0, pause_s * 1.2)

    async def _healthy(self, one: _Instance, children: Sequence[Child]) -> bool:
        """Engine and predictor answer.

        Raises:
            ActuatorError: one of them has ended.
        """
        for child in children:
            if child.ended:
                raise ActuatorError(f"{one.name} ended with code {await child.wait()}: {child.last_words()}")
        urls = [self._url(one.port) + self._settings.health_path]
        if one.has_predictor and one.phase is Phase.STARTING:
            urls.append(self._url(one.predictor_port) + "/health")
        return all([await self._answers(url) for url in urls])

    async def _answers(self, url: str) -> bool:
        try:
            async with self._around.session.get(url, timeout=aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def _watch(self, one: _Instance, children: list[Child]) -> None:
        """Until it shall leave.

        Raises:
            ActuatorError: its engine died, or has not been healthy for ``unhealthy_after_s``.
        """
        well_s = monotonic()
        while not one.leaving.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(one.leaving.wait(), HEALTH_EVERY_S)
                return
            if one.has_predictor and children[-1].ended:
                log.warning("the predictor of %s ended (%s): starting another", one.name, children[-1].last_words())
                await children.pop().stop(0.1)
                children.append(await Child.start(self._predictor_command(one), environment=self._environment(one)))
                await asyncio.sleep(HEALTH_EVERY_S)
            if await self._healthy(one, children[:1]):
                well_s = monotonic()
            elif monotonic() - well_s > self._settings.unhealthy_after_s:
                raise ActuatorError(f"{one.name} was not healthy for {self._settings.unhealthy_after_s:g} s")

    def _failed(self, one: _Instance, why: str, children: Sequence[Child]) -> None:
        words = children[0].last_words() if children and one.phase is Phase.STARTING else ""
        log.warning("%s failed: %s%s", one.name, why, "" if why.endswith(words) else f" ({words})")
        failures = self._failures[one.kind.name]
        failures.count += 1
        failures.why = why
        failures.until_s = monotonic() + (
            GIVE_UP_S if failures.count >= self._settings.attempts else 2.0 ** (failures.count - 1)
        )

    # Words

    def _config(self, one: _Instance) -> InstanceConfig:
        """How the gateways are told of it."""
        url = self._url(one.port)
        if one.has_predictor:
            return InstanceConfig(url=url, predictor=self._url(one.predictor_port), name=one.name)
        if self._settings.evidence != "profile":
            return InstanceConfig(url=url, name=one.name)
        limits = one.kind.limits
        return InstanceConfig(
            url=url, name=one.name, profile=one.kind.profile, max_num_seqs=limits.max_num_seqs,
            num_gpu_blocks=limits.num_gpu_blocks, max_num_batched_tokens=limits.max_num_batched_tokens,
            block_size=limits.block_size, max_model_len=limits.max_model_len,
        )  # fmt: skip

    def _command(self, one: _Instance) -> list[str]:
        own = self._settings.kinds.get(one.kind.name, LocalKind())
        command = own.command or self._settings.command or self._emulated(one.kind)
        return [self._filled(part, one) for part in [*command, *self._settings.flags, *own.flags]]

    def _emulated(self, kind: Kind) -> list[str]:
        limits = kind.limits
        return [
            sys.executable, "-m", "block", "emulate", "--host", "{host}", "--port", "{port}", "--name", "{name}",
            "--model", self._settings.model, "--profile", kind.profile, "--max-num-seqs", str(limits.max_num_seqs),
            "--max-num-batched-tokens", str(limits.max_num_batched_tokens), "--num-gpu-blocks", str(limits.num_gpu_blocks),
            "--block-size", str(limits.block_size), "--max-model-len", str(limits.max_model_len),
        ]  # fmt: skip

    def _predictor_command(self, one: _Instance) -> list[str]:
        given = self._settings.predictor
        emulated = not (self._settings.command or self._settings.kinds.get(one.kind.name, LocalKind()).command)
        if given == "none" or self._settings.evidence != "predictor" or (given == "auto" and not emulated):
            return []
        if isinstance(given, list):
            return [self._filled(part, one) for part in given]
        flags = ["--source", f"emulate:{one.name}", "--profile", one.kind.profile, "--port", str(one.predictor_port)]
        return [sys.executable, "-m", "block", "predictor", "--host", self._settings.host, *flags]

    def _environment(self, one: _Instance) -> dict[str, str]:
        own = self._settings.kinds.get(one.kind.name, LocalKind()).environment
        return {name: self._filled(text, one) for name, text in {**self._settings.environment, **own}.items()}

    def _filled(self, text: str, one: _Instance) -> str:
        words = {
            "host": self._settings.host, "port": one.port, "name": one.name, "kind": one.kind.name,
            "profile": one.kind.profile, "slot": one.slot, "predictor_port": one.predictor_port,
        }  # fmt: skip
        for word, value in words.items():
            text = text.replace("{" + word + "}", str(value))
        return text

    def _url(self, port: int) -> str:
        return f"http://{self._settings.host}:{port}"


def _free_ports(host: str, count: int) -> list[int]:
    """Ports that are free now. (Another process may take one first: then the start fails and is tried again.)"""
    bound = [socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(count)]
    try:
        for one in bound:
            one.bind((host, 0))
        return [int(one.getsockname()[1]) for one in bound]
    except OSError as error:
        raise ActuatorError(f"No free port on {host}: {os.strerror(error.errno or 0)}.") from error
    finally:
        for one in bound:
            one.close()
