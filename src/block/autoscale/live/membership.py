"""Keeps every gateway's list of instances the way it should be: level-triggered, so that whatever was missed heals.

``welcome`` and ``forget`` only change what is wanted; ``beat`` compares that with each gateway's own list and mends the
difference. ``retire`` waits until no gateway has a request at the instance. Names that nobody here welcomed stay alone.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Final, Literal

import msgspec

from block.autoscale.live.gateways import Gateway, GatewayError
from block.autoscale.steady import now_s
from block.gateway.config import InstanceConfig
from block.gateway.records.recent import Seen

BEAT_S: Final = 0.5
IDLE_BEATS: Final = 2
"""Beats in a row without a request, so that one on its way to the instance is seen."""
Register = Literal["admin", "file", "none"]

log = logging.getLogger("block.autoscale")


class Membership:
    """``register``: through the gateways' administration, by writing ``file`` (which they watch), or not at all.

    ``prefix``: names that begin so are this autoscaler's; a dead one of them that it does not know (its predecessor
    crashed) is removed.
    """

    def __init__(
        self, gateways: Sequence[Gateway], register: Register = "admin", file: Path | None = None,
        prefix: str | None = None,
    ) -> None:  # fmt: skip
        self.gateways, self._register, self._file, self._prefix = gateways, register, file, prefix
        self.lists: dict[str, dict[str, Seen] | None] = {gateway.url: None for gateway in gateways}
        """The newest list of each gateway; ``None``: it did not answer."""
        self._trouble: dict[str, str] = {}
        self._file_trouble = ""
        self.ready_s: dict[str, float] = {}
        """Wall time at which a gateway first said that an instance is ready and can be predicted."""
        self._wanted: dict[str, InstanceConfig] = {}
        self._at: dict[str, str] = {}
        self._retiring: set[str] = set()
        self._gone: dict[str, float] = {}
        self._idle: dict[str, int] = {}
        self._beaten = asyncio.Event()
        self._beating = asyncio.Lock()
        self._written: bytes | None = None
        self.leads = True

    def welcome(self, config: InstanceConfig) -> None:
        """An instance is there: all gateways shall know it."""
        self._wanted[config.id] = config
        self._at[config.url.rstrip("/")] = config.id
        self._gone.pop(config.id, None)

    def forget(self, name: str) -> None:
        """It is gone: no gateway shall know it."""
        if self._wanted.pop(name, None) is not None or name in self._retiring:
            self._gone[name] = monotonic() + 600.0
        self._at = {url: other for url, other in self._at.items() if other != name}
        self._retiring.discard(name)
        self.ready_s.pop(name, None)
        self._idle.pop(name, None)

    async def retire(self, name: str, within_s: float) -> bool:
        """No new requests to it; True once none is in flight there at any gateway, False after ``within_s``."""
        self._retiring.add(name)
        self._idle[name] = 0
        deadline_s = monotonic() + within_s
        while self._idle.get(name, IDLE_BEATS) < IDLE_BEATS:
            if not self.gateways:
                return True
            if monotonic() > deadline_s:
                return False
            self._beaten.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.01, deadline_s - monotonic())):
                    await self._beaten.wait()
        return True

    def name_of(self, one: Seen) -> str:
        """Our name of an instance: a gateway that found it by itself (by DNS, say) may call the same URL otherwise."""
        return one.name if one.name in self._wanted else self._at.get(one.url.rstrip("/"), one.name)

    def in_flight(self, name: str) -> int:
        """Requests at it, over all gateways that answer."""
        return sum(listed[name].in_flight for listed in self.lists.values() if listed and name in listed)

    def states(self, name: str) -> list[str | None]:
        """What each gateway that answers says of it; ``None``: it does not know it."""
        return [listed[name].state if name in listed else None for listed in self.lists.values() if listed is not None]

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            try:
                await self.beat()
            except Exception:  # the outermost place: a bug here costs this beat, and the next one mends
                log.exception("bug while mending the gateways' lists")
            await asyncio.sleep(BEAT_S)

    async def beat(self) -> None:
        """Compare and mend once."""
        async with self._beating:
            self._write()
            await asyncio.gather(*(self._mend(gateway) for gateway in self.gateways))
            for name in self._retiring:
                known = [listed for listed in self.lists.values() if listed is not None]
                quiet = len(known) == len(self.gateways) and not self.in_flight(name)
                quiet = quiet and all(listed[name].state == "draining" for listed in known if name in listed)
                self._idle[name] = self._idle.get(name, 0) + 1 if quiet else 0
            self._gone = {name: until_s for name, until_s in self._gone.items() if until_s > monotonic()}
            listed_somewhere = {name for listed in self.lists.values() for name in listed or ()}
            if None not in self.lists.values():
                self.ready_s = {name: at_s for name, at_s in self.ready_s.items() if name in listed_somewhere}
        self._beaten.set()

    async def _mend(self, gateway: Gateway) -> None:
        before = self.lists[gateway.url]
        try:
            listed = {self.name_of(one): one for one in (await gateway.instances()).values()}
            self.lists[gateway.url] = listed
            self._trouble.pop(gateway.url, None)
            if before is None:
                log.info("gateway %s answers", gateway.url)
            if self.leads:
                await self._correct(gateway, listed)
        except GatewayError as trouble:
            self.lists[gateway.url] = None
            if self._trouble.get(gateway.url) != str(trouble):
                log.warning("gateway %s does not answer: %s", gateway.url, trouble)
            self._trouble[gateway.url] = str(trouble)
            return
        for name, one in listed.items():
            if one.state != "ready" or name in self.ready_s:
                continue
            config = self._wanted.get(name)
            if one.fresh or config is None or (config.predictor is None and config.profile is None):
                self.ready_s[name] = now_s()

    async def _correct(self, gateway: Gateway, listed: dict[str, Seen]) -> None:
        for name in self._retiring & listed.keys():
            if listed[name].state != "draining":
                await gateway.drain(listed[name].name)
        if self._register != "admin":
            return
        for name, config in list(self._wanted.items()):
            if name not in listed and name not in self._retiring:
                await gateway.join(config)
        for name, one in listed.items():
            stale = (
                self._prefix is not None
                and name.startswith(self._prefix)
                and one.state == "down"
                and name not in self._wanted
                and name not in self._retiring
            )
            if name in self._gone or stale:
                await gateway.leave(name)

    def _write(self) -> None:
        if self._register != "file" or self._file is None or not self.leads:
            return
        names = [name for name in self._wanted if name not in self._retiring]
        text = instances_toml([self._wanted[name] for name in names])
        if text == self._written:
            return
        temporary = self._file.with_name(f".{self._file.name}.new")
        try:
            temporary.write_bytes(text)
            temporary.replace(self._file)
        except OSError as error:
            trouble = f"the gateways' file {self._file} cannot be written: {error.strerror or error}"
            if trouble != self._file_trouble:
                log.error("%s; trying again", trouble)
            self._file_trouble = trouble
            return
        self._written, self._file_trouble = text, ""


def instances_toml(configs: Sequence[InstanceConfig]) -> bytes:
    """Instances as the TOML that ``block serve`` reads."""
    lines = [] if configs else ["instances = []"]
    for config in configs:
        lines.append("[[instances]]")
        fields = msgspec.to_builtins(config)
        lines += [f"{name} = {msgspec.json.encode(value).decode()}" for name, value in fields.items() if value]
        lines.append("")
    return "\n".join(lines).encode()
