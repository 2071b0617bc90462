"""Watching the instances: active checks, and suspicion when bytes that are due do not come.

An instance is suspected when every answer that it streams has been silent for ``hang_after_s``, when its own snapshots
say that requests run and nothing moves, or when it owes an answer, is silent, and does not even answer a health check
in that time. Suspicion withdraws new requests while there is somebody else, and ends with the first byte.

A gateway that was kept from running (a machine with too much to do, a long pause) has heard nothing either: what counts is the
time for which it listened.
"""

import asyncio
import logging
from random import Random
from time import monotonic
from typing import Final

import aiohttp
import msgspec

from block.core import InstanceId
from block.gateway.config import GatewayConfig
from block.gateway.deciding.evidence import Evidence
from block.gateway.members.pool import Instance, Pool, State

MODELS_EVERY_S: Final = 30.0
DOWN_CHECK_S: Final = 0.5
LATE_S: Final = 0.2
"""Looks are a tenth of a second apart; who comes later than this was kept from running."""

log = logging.getLogger("block.gateway")


class ModelList(msgspec.Struct):
    """``GET /v1/models`` as OpenAI has it."""

    data: list[msgspec.Raw]


class ModelEntry(msgspec.Struct):
    id: str


class HealthChecks:
    """Checks one instance over and over."""

    def __init__(
        self, instance: Instance, pool: Pool, session: aiohttp.ClientSession, config: GatewayConfig, rng: Random
    ) -> None:
        self._instance, self._pool, self._session, self._config, self._rng = instance, pool, session, config, rng
        self._models_at_s = -MODELS_EVERY_S
        self._probing = False
        self._said: tuple[str, str] | None = None

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self.check()
            state = self._instance.state
            pause_s = (
                self._config.health_check_interval_s
                if state is State.READY
                else min(DOWN_CHECK_S, self._config.health_check_interval_s)
            )
            await asyncio.sleep(pause_s * (0.9 + 0.2 * self._rng.random()))

    async def check(self) -> None:
        """One health check and, now and then, the list of models."""
        instance, now_s = self._instance, monotonic()
        problem = await self._ask_health(self._config.health_check_timeout_s)
        wants_models = instance.state is not State.READY or now_s - self._models_at_s >= MODELS_EVERY_S
        if problem is None and wants_models:
            problem = await self._ask_models()
            self._models_at_s = now_s
        if problem is None:
            self._pool.up(instance)
        else:
            self._pool.check_failed(instance, problem)
        said = (instance.state.value, instance.reason)
        if said != self._said and not (self._said is None and instance.state is State.READY):
            level = logging.INFO if instance.state is State.READY else logging.WARNING
            log.log(level, "instance %s is %s%s", instance.id, said[0], "" if said[0] == said[1] else f": {said[1]}")
        self._said = said

    async def probe(self, timeout_s: float) -> None:
        """It owes an answer and is silent: is it there at all? One probe at a time."""
        if self._probing:
            return
        self._probing, asked_s = True, monotonic()
        try:
            problem = await self._ask_health(timeout_s)
            listened = monotonic() - asked_s < timeout_s + LATE_S
            if problem is not None and listened:
                self._pool.set_suspect(self._instance, f"silent, and its health check {problem}")
        finally:
            self._probing = False

    async def _ask_health(self, timeout_s: float) -> str | None:
        status, _, problem = await self._get(self._config.health_check_path, timeout_s)
        if status in (404, 405):  # an OpenAI server without this route
            status, _, problem = await self._get("/v1/models", timeout_s)
        if problem is not None or status == 200:
            return problem
        return f"answered its health check with status {status}"

    async def _ask_models(self) -> str | None:
        status, body, problem = await self._get("/v1/models", self._config.health_check_timeout_s)
        if problem is not None:
            return problem
        if status in (401, 403):
            self._pool.set_models(self._instance, None)  # it serves only who has its key: take it as it is
            return None
        try:
            entries = msgspec.json.decode(body, type=ModelList).data if status == 200 else None
            models = {msgspec.json.decode(raw, type=ModelEntry).id: bytes(raw) for raw in entries or ()}
        except msgspec.DecodeError:
            entries = None
        if entries is None:
            what = f"status {status}" if status != 200 else "something else"
            return f"answered GET /v1/models with {what}, so it is no OpenAI server"
        self._pool.set_models(self._instance, models)
        return None

    async def _get(self, path: str, timeout_s: float) -> tuple[int, bytes, str | None]:
        """(status, body, problem)."""
        url = f"{self._instance.config.url.rstrip('/')}{path}"
        try:
            async with self._session.get(
                url, timeout=aiohttp.ClientTimeout(total=timeout_s), allow_redirects=False
            ) as answer:
                return answer.status, await answer.content.read(1 << 20), None
        except TimeoutError:
            return 0, b"", f"did not answer within {timeout_s:g} s"
        except aiohttp.ClientConnectorError as error:
            return 0, b"", f"cannot be reached ({error.os_error.strerror or error.os_error})"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return 0, b"", f"answered something that is not HTTP ({type(error).__name__})"


class HangWatch:
    """Looks at all instances every tenth of a second; says who is suspect."""

    def __init__(
        self, pool: Pool, evidence: dict[InstanceId, Evidence], checks: dict[str, HealthChecks], hang_after_s: float
    ) -> None:
        self._pool, self._evidence, self._checks, self._hang_after_s = pool, evidence, checks, hang_after_s
        self._probes: set[asyncio.Task[None]] = set()
        self._looked_s: float | None = None
        self._deaf_until_s = 0.0
        """What came while this process did not run may not have been read before then."""

    def look(self, now_s: float, wall_s: float) -> None:
        """One look."""
        if not self._hang_after_s:
            return
        gap_s = 0.0 if self._looked_s is None else now_s - self._looked_s
        self._looked_s = now_s
        if gap_s > LATE_S:
            self._deaf_until_s = now_s + LATE_S
        for instance in self._pool.instances.values():
            instance.listened(min(gap_s, LATE_S), now_s)
            if instance.state is State.READY:
                self._judge(instance, now_s, wall_s)

    def _judge(self, instance: Instance, now_s: float, wall_s: float) -> None:
        moved = instance.silent_s < self._hang_after_s
        stuck = self._stuck(instance, now_s, wall_s)
        if stuck is not None:
            self._pool.set_suspect(instance, stuck)
        elif instance.suspect is not None and instance.in_flight and moved:
            self._pool.set_suspect(instance, None)  # without requests in flight, a health check says it
        elif (
            instance.in_flight
            and not moved
            and instance.suspect is None
            and instance.streaming == 0
            and instance.id in self._checks
        ):
            self._probe(instance)

    def _stuck(self, instance: Instance, now_s: float, wall_s: float) -> str | None:
        if instance.streaming and instance.silent_s > self._hang_after_s:
            return f"its streams have been silent for {instance.silent_s:.1f} s"
        evidence = self._evidence.get(instance.id)
        stood_s = evidence.silence_s(wall_s) if evidence is not None and now_s >= self._deaf_until_s else None
        if stood_s is not None and stood_s > max(self._hang_after_s, 1.0):
            return f"its engine has stood still for {stood_s:.1f} s"
        return None

    def _probe(self, instance: Instance) -> None:
        task = asyncio.get_running_loop().create_task(self._checks[instance.id].probe(self._hang_after_s))
        self._probes.add(task)
        task.add_done_callback(self._probes.discard)

    def close(self) -> None:
        for task in self._probes:
            task.cancel()
