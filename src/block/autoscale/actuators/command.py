"""The operator's own command as actuator (``type = "exec"``).

It runs with the order as JSON on its standard input, ``{"want": {"KIND": N}, "total": N}``, and in its environment
(``BLOCK_WANT`` the same JSON, ``BLOCK_WANT_KIND`` each count with the kind in capitals, ``BLOCK_WANT_TOTAL``). Exit code 0
means done or under way. It runs when the order changes and then every ``repeat_s``, so it must be idempotent.
"""

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from math import inf
from time import monotonic
from typing import Final

import msgspec

from block.autoscale.actuators.child import Child
from block.autoscale.actuators.surroundings import Surroundings
from block.autoscale.terms import Member
from block.errors import ActuatorError, ConfigError

MEMBERS_BYTES_MAX: Final = 4 << 20


class ExecSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="exec"):
    """``members``: a command that prints what there is as JSON, ``[{"id", "kind", "phase", "since_s"}]``; without one the
    gateways' lists are all that is known."""

    command: list[str]
    members: list[str] = []
    timeout_s: float = 60.0
    repeat_s: float = 60.0

    def __post_init__(self) -> None:
        if not self.command or not self.command[0]:
            raise ConfigError("actuator.command must name a program.")
        if not (0 < self.timeout_s < inf and 0 < self.repeat_s < inf):
            raise ConfigError("actuator.timeout_s and actuator.repeat_s must be above 0 and finite.")


class ExecActuator:
    """Runs one command at a time; one that is too slow is killed with all that it started."""

    def __init__(self, settings: ExecSettings, surroundings: Surroundings) -> None:
        self._settings = settings
        self.keeps_members = bool(settings.members)
        self._done: dict[str, int] | None = None
        self._done_s = 0.0

    async def scale_to(self, want: Mapping[str, int]) -> None:
        """Run the command.

        Raises:
            ActuatorError: it cannot be run, ran too long, or ended with another code than 0.
        """
        if dict(want) == self._done and monotonic() - self._done_s < self._settings.repeat_s:
            return
        self._done = None
        total = sum(want.values())
        order = json.dumps({"want": dict(want), "total": total})
        environment = {"BLOCK_WANT": order, "BLOCK_WANT_TOTAL": str(total)}
        for kind, count in want.items():
            environment["BLOCK_WANT_" + re.sub(r"\W", "_", kind).upper()] = str(count)
        await self._run(self._settings.command, environment, order.encode())
        self._done, self._done_s = dict(want), monotonic()

    async def members(self) -> Sequence[Member]:
        """What the members command prints.

        Raises:
            ActuatorError: it failed, or printed something else.
        """
        if not self._settings.members:
            return ()
        told = await self._run(self._settings.members, {}, b"")
        try:
            return msgspec.json.decode(told, type=list[Member])
        except msgspec.DecodeError as error:
            raise ActuatorError(f"{self._settings.members[0]} did not print a list of members: {error}.") from error

    async def close(self) -> None:
        return

    async def _run(self, command: Sequence[str], environment: Mapping[str, str], given: bytes) -> bytes:
        child = await Child.start(command, environment=environment, keep_stdout=True, keep_stdin=True)
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                await child.tell(given)
                told = await child.stdout.read(MEMBERS_BYTES_MAX)
                while part := await child.stdout.read(MEMBERS_BYTES_MAX):
                    told = (told + part)[:MEMBERS_BYTES_MAX]
                code = await child.wait()
        except TimeoutError:
            raise ActuatorError(f"{command[0]} took longer than {self._settings.timeout_s:g} s.") from None
        finally:
            if not child.ended:
                child.kill()
            await child.stop(1.0)
        if code:
            raise ActuatorError(f"{command[0]} ended with code {code}: {child.last_words()}.")
        return told
