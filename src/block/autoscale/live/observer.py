"""Looks: asks every gateway (and, where those do not know, the predictors) and makes one `Observation` of it all.

A look never fails. Who did not answer is named in ``blind``; what came meanwhile is told by the next answer and is put into
the observation of its time. An arrival's output tokens are those expected until it ends and the true ones from then on.
"""

import asyncio
import logging
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, Final

import aiohttp
import msgspec

from block.autoscale.controllers.window import ARRIVALS_MOST, DETAIL_S, thinned
from block.autoscale.live.gateways import Gateway, GatewayError
from block.autoscale.live.membership import Membership
from block.autoscale.steady import now_s
from block.autoscale.terms import Actuator, Arrival, Kind, Member, Observation, Phase, Served
from block.errors import ActuatorError
from block.gateway.records.recent import RecentAnswer, Seen

SLOW_MOST: Final = 64
OPEN_MOST: Final = 50_000
"""Arrivals whose end is waited for."""
UNKNOWN_OUTPUT: Final = 256
"""Output tokens of a request while none has ended that could say more."""
LATE_S: Final = 0.5
"""An arrival so much older than the last look belongs to that one's time."""
PREDICTOR_TIMEOUT_S: Final = 1.0
ACTUATOR_TIMEOUT_S: Final = 10.0

log = logging.getLogger("block.autoscale")


class Observer:
    """Owns the window of observations, newest last."""

    def __init__(
        self, gateways: Sequence[Gateway], membership: Membership, actuator: Actuator, kinds: Sequence[Kind],
        session: aiohttp.ClientSession,
    ) -> None:  # fmt: skip
        self._gateways, self._membership, self._actuator, self._session = gateways, membership, actuator, session
        self._kinds = [kind.name for kind in kinds]
        self._looks: dict[int, Observation] = {}
        self._look = 0
        self._open: dict[tuple[str, int], tuple[int, int]] = {}
        self._outputs = deque[int](maxlen=1000)
        self._members: tuple[Member, ...] = ()
        self.foreign: dict[str, int] = {}
        """Ready instances of each kind that a gateway has and the actuator does not keep."""
        self.blind_wholly = False
        """No gateway answered at the last look."""
        self._actuator_trouble = ""
        self.silent: dict[str, str] = {}
        """Why a gateway did not answer at the last look, by URL."""

    async def look(self, history_s: float, interval_s: float) -> list[Observation]:
        """See what is there now; the window with it."""
        blind: list[str] = []
        answers = dict(
            zip(self._gateways, await asyncio.gather(*(self._ask(g, blind) for g in self._gateways)), strict=True)
        )
        seen = {gateway.url: answer for gateway, answer in answers.items() if answer is not None}
        self.blind_wholly = bool(self._gateways) and not seen
        told = [one for answer in seen.values() for one in answer.instances]
        instances = _freshest([msgspec.structs.replace(one, name=self._membership.name_of(one)) for one in told])
        await self._ask_predictors(instances, blind)
        members = await self._all_members(instances, blind)
        at_s = now_s()
        self._look += 1
        self._looks[self._look] = Observation(
            at_s=at_s, members=members, blind=tuple(blind), **_loads(list(seen.values()), instances)
        )
        first = len(self._looks) == 1
        for url, answer in seen.items():
            self._take(url, answer, at_s, at_s - interval_s if first else 0.0)
        self._thin(history_s)
        return list(self._looks.values())

    async def _ask(self, gateway: Gateway, blind: list[str]) -> RecentAnswer | None:
        try:
            answer = await gateway.recent()
        except GatewayError as error:
            blind.append(gateway.url)
            self.silent[gateway.url] = str(error)
            return None
        self.silent.pop(gateway.url, None)
        return answer

    # Arrivals and ends

    def _take(self, url: str, answer: RecentAnswer, now_s: float, from_s: float) -> None:
        """Put what a gateway told into the observations of its time (its clock is set right by how it differs from ours)."""
        behind_s = now_s - answer.at_s
        if answer.missed:
            log.warning(
                "gateway %s lost %d arrivals before it was asked: set its recent_kept higher", url, answer.missed
            )
        outputs = {end.number: end.output_tokens for end in answer.ends if end.output_tokens}
        self._outputs.extend(outputs.values())
        likely = sum(self._outputs) // len(self._outputs) if self._outputs else UNKNOWN_OUTPUT
        times = [look.at_s for look in self._looks.values()]
        numbers = list(self._looks)
        arrived: dict[int, list[Arrival]] = {}
        for one in answer.arrivals:
            at_s = one.at_s + behind_s
            if at_s < from_s:
                continue
            look = numbers[bisect_left(times, at_s + LATE_S)] if at_s + LATE_S < times[-1] else numbers[-1]
            place = len(self._looks[look].arrivals) + len(arrived.setdefault(look, []))
            arrived[look].append(Arrival(at_s, one.prompt_tokens, likely))
            if len(self._open) < OPEN_MOST:
                self._open[url, one.number] = (look, place)
        for look, added in arrived.items():
            self._change(look, arrivals=(*self._looks[look].arrivals, *added))
        self._learn(url, {one.number: one.output_tokens for one in answer.sent if one.output_tokens})
        for number in self._learn(url, outputs):
            del self._open[url, number]
        slow = [one.predicted_e2e_s for one in answer.sent if one.predicted_e2e_s is not None]
        ttfts = [one.predicted_ttft_s for one in answer.sent if one.predicted_ttft_s is not None]
        newest = self._looks[self._look]
        served = [
            Served(end.at_s + behind_s, end.ttft_s, end.e2e_s) for end in answer.ends if end.at_s + behind_s >= from_s
        ]
        slowest = sorted([*newest.slow_e2e_s, *slow], reverse=True)[:SLOW_MOST]
        self._change(
            self._look, served=(*newest.served, *served), slow_e2e_s=tuple(slowest),
            predicted_e2e_s=slowest[0] if slowest else None,
            predicted_ttft_s=max([*ttfts, *_known(newest.predicted_ttft_s)], default=None),
        )  # fmt: skip

    def _learn(self, url: str, outputs: dict[int, int]) -> list[int]:
        """Output tokens of open requests, estimated or true; the numbers of those that are open."""
        changed: dict[int, list[Arrival]] = {}
        found = [number for number in outputs if (url, number) in self._open]
        for number in found:
            tokens, (look, place) = outputs[number], self._open[url, number]
            if look not in self._looks or place >= len(self._looks[look].arrivals):
                continue
            arrivals = changed.setdefault(look, list(self._looks[look].arrivals))
            arrivals[place] = msgspec.structs.replace(arrivals[place], output_tokens=tokens)
        for look, arrivals in changed.items():
            self._change(look, arrivals=tuple(arrivals))
        return found

    def _change(self, look: int, **fields: object) -> None:
        self._looks[look] = msgspec.structs.replace(self._looks[look], **fields)

    def _thin(self, history_s: float) -> None:
        """Bounded memory: of old looks only counts and tokens are kept, of older ones nothing."""
        now_s, arrivals = self._looks[self._look].at_s, 0
        kept: dict[int, Observation] = {}
        for look, seen in reversed(self._looks.items()):
            if seen.at_s < now_s - max(history_s, DETAIL_S):
                break
            arrivals += len(seen.arrivals)
            if seen.arrivals and look != self._look and (seen.at_s < now_s - DETAIL_S or arrivals > ARRIVALS_MOST):
                seen = thinned(seen)  # noqa: PLW2901
            kept[look] = seen
        self._looks = dict(reversed(kept.items()))
        oldest = next(iter(self._looks))
        if len(self._open) > OPEN_MOST // 2:
            self._open = {key: at for key, at in self._open.items() if at[0] >= oldest}

    # Instances

    async def _all_members(self, instances: dict[str, Seen], blind: list[str]) -> tuple[Member, ...]:
        """The actuator's members as the gateways see them; all that the gateways have where it keeps none."""
        at_s = now_s()
        before = {member.id: member for member in self._members}
        keeps = bool(getattr(self._actuator, "keeps_members", True))
        joins = bool(getattr(self._actuator, "joins_gateways", True))
        kept: Sequence[Member] = ()
        if keeps:
            try:
                async with asyncio.timeout(ACTUATOR_TIMEOUT_S):
                    kept = await self._actuator.members()
                self._check(kept)
                self._actuator_trouble = ""
            except (ActuatorError, TimeoutError) as error:
                trouble = str(error) or f"it took longer than {ACTUATOR_TIMEOUT_S:g} s"
                if trouble != self._actuator_trouble:
                    log.warning("the actuator cannot say what there is: %s", trouble)
                self._actuator_trouble = trouble
                blind.append("actuator")
                kept = self._members
        if not joins:  # what the gateways have are not its members
            self.foreign, self._members = {}, tuple(kept)
            return self._members
        members = [self._seen(member, instances.get(member.id), before.get(member.id)) for member in kept]
        known = {member.id for member in members}
        self.foreign = {}
        for name, one in instances.items():
            if name in known:
                continue
            kind = _kind_of(name, self._kinds)
            phase = Phase(one.state)
            if keeps:
                if phase is Phase.READY:
                    self.foreign[kind] = self.foreign.get(kind, 0) + 1
                else:
                    continue
            old = before.get(name)
            members.append(Member(name, kind, phase, old.since_s if old and old.phase is phase else at_s))
        self._members = tuple(members)
        return self._members

    def _check(self, members: Sequence[Member]) -> None:
        strange = sorted({member.kind for member in members} - set(self._kinds))
        if strange:
            raise ActuatorError(f"it tells of the kind {strange[0]!r}; configured are {', '.join(self._kinds)}.")
        twice = [name for name, count in Counter(member.id for member in members).items() if count > 1]
        if twice:
            raise ActuatorError(f"it tells of {twice[0]!r} more than once.")

    def _seen(self, member: Member, one: Seen | None, old: Member | None) -> Member:
        """A member is ready when a gateway can use it, whatever its actuator says."""
        phase = member.phase
        if phase is Phase.READY and self._gateways and not self.blind_wholly:
            states = [state for state in self._membership.states(member.id) if state is not None]
            if one is not None:
                states.append(one.state)
            if not states or set(states) == {"starting"}:
                phase = Phase.STARTING
            elif "ready" not in states:
                phase = Phase(states[-1])
        if phase is member.phase:
            return member
        since_s = old.since_s if old is not None and old.phase is phase else member.since_s
        return msgspec.structs.replace(member, phase=phase, since_s=since_s)

    async def _ask_predictors(self, instances: dict[str, Seen], blind: list[str]) -> None:
        """What no gateway has fresh evidence of its predictor may still tell."""

        async def ask(one: Seen) -> None:
            timeout = aiohttp.ClientTimeout(total=PREDICTOR_TIMEOUT_S)
            try:
                async with self._session.get(f"{one.predictor}/snapshot", timeout=timeout) as answer:
                    told = await answer.json()
                header, limits = told["header"], told["limits"]
                one.running, one.waiting = int(header["running"]), int(header["waiting_total"])
                one.kv_blocks_free, one.kv_blocks_total = (
                    int(header["kv_blocks_free"]),
                    int(limits["num_gpu_blocks"]) - 1,
                )
            except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError):
                blind.append(f"predictor of {one.name}")

        silent = [one for one in instances.values() if one.predictor and not one.fresh and one.state == "ready"]
        await asyncio.gather(*(ask(one) for one in silent))


def _freshest(told: Sequence[Seen]) -> dict[str, Seen]:
    """One account of each instance, the best informed; requests in flight are summed over the gateways."""
    found: dict[str, Seen] = {}
    for one in sorted(told, key=lambda one: (one.state != "ready", not one.fresh)):
        if one.name in found:
            found[one.name].in_flight += one.in_flight
        else:
            found[one.name] = msgspec.structs.replace(one)
    return found


def _loads(told: Sequence[RecentAnswer], instances: dict[str, Seen]) -> dict[str, Any]:
    """Fields of an observation."""
    if not told:
        return {}
    waiting = [one.waiting for one in instances.values() if one.waiting is not None]
    used = [
        1.0 - one.kv_blocks_free / one.kv_blocks_total
        for one in instances.values()
        if one.kv_blocks_free is not None and one.kv_blocks_total
    ]
    return {
        "in_flight": sum(answer.in_flight for answer in told),
        "queued": sum(answer.queued for answer in told) + sum(waiting),
        "kv_used": sum(used) / len(used) if used else None,
    }


def _known(value: float | None) -> tuple[float, ...]:
    return () if value is None else (value,)


def _kind_of(name: str, kinds: Sequence[str]) -> str:
    """The kind whose name is a part of an instance's name, the longest; the first where there is none."""
    return max((kind for kind in kinds if kind in name), key=len, default=kinds[0])
