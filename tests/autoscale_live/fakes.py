"""A gateway's administration over real HTTP, and an actuator that does, delays or denies what it is told."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
from aiohttp import web

from block.autoscale.live.gateways import Gateway
from block.autoscale.terms import Member, Phase
from block.errors import ActuatorError

KEY = "secret"


class FakeGateway:
    """Speaks ``/admin`` as ``block serve`` does. Instances that join are ready after ``ready_after`` listings."""

    def __init__(self) -> None:
        self.instances: dict[str, dict[str, Any]] = {}
        self.arrivals: list[list[Any]] = []
        self.sent: list[list[Any]] = []
        self.ends: list[list[Any]] = []
        self.ready_after = 0
        self.silent = False
        self.calls: list[str] = []
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> "FakeGateway":
        app = web.Application(middlewares=[self._guard])
        app.router.add_post("/admin/instances", self._join)
        app.router.add_post("/admin/instances/{name}/drain", self._drain)
        app.router.add_delete("/admin/instances/{name}", self._leave)
        app.router.add_get("/admin/recent", self._recent)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def arrive(self, count: int, *, prompt: int = 100, output: int | None = 50, e2e_s: float = 1.0) -> None:
        """Requests that come now."""
        for _ in range(count):
            number = len(self.arrivals) + 1
            self.arrivals.append([number, time.time(), prompt])
            self.sent.append([number, time.time(), output, 0.1, e2e_s])

    def finish(self, number: int, *, ttft_s: float | None = 0.1, e2e_s: float | None = 1.0, output: int = 77) -> None:
        self.ends.append([number, time.time(), ttft_s, e2e_s, output])

    def seat(self, name: str, state: str = "ready", in_flight: int = 0, **fields: Any) -> None:
        """An instance from elsewhere."""
        self.instances[name] = {
            "name": name,
            "url": "http://127.0.0.1:1",
            "state": state,
            "in_flight": in_flight,
        } | fields

    def gateway(self, session: aiohttp.ClientSession, key: str = KEY) -> Gateway:
        return Gateway(session, self.url, key, 1.0)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.calls.append(f"{request.method} {request.path}")
        if self.silent:
            await asyncio.sleep(30)
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return web.json_response({"error": {"message": "wrong"}}, status=401)
        answer: web.StreamResponse = await handler(request)
        return answer

    def _advance(self) -> None:
        """Those that joined become ready in time."""
        for one in self.instances.values():
            if one["state"] == "starting":
                one["seen"] = one.get("seen", 0) + 1
                if one["seen"] > self.ready_after:
                    one["state"] = "ready"

    async def _join(self, request: web.Request) -> web.Response:
        given = await request.json()
        if given["name"] in self.instances:
            return web.json_response({"error": {}}, status=409)
        self.instances[given["name"]] = {**given, "state": "starting", "in_flight": 0}
        return web.json_response({}, status=201)

    async def _drain(self, request: web.Request) -> web.Response:
        one = self.instances.get(request.match_info["name"])
        if one is None:
            return web.json_response({"error": {}}, status=404)
        one["state"] = "draining"
        return web.json_response({})

    async def _leave(self, request: web.Request) -> web.Response:
        found = self.instances.pop(request.match_info["name"], None)
        return web.json_response({}, status=404 if found is None else 200)

    async def _recent(self, request: web.Request) -> web.Response:
        self._advance()
        _, arrived, sent, ended = (request.query.get("after") or "x.0.0.0").split(".")
        seen = [
            {"name": one["name"], "url": one["url"], "predictor": one.get("predictor"), "state": one["state"], "reason": "",
             "in_flight": one["in_flight"], "fresh": True, "running": 1, "waiting": one.get("waiting", 0),
             "kv_blocks_free": one.get("kv_free", 50), "kv_blocks_total": 100}
            for one in self.instances.values()
        ]  # fmt: skip
        answer = {
            "at_s": time.time(), "cursor": f"x.{len(self.arrivals)}.{len(self.sent)}.{len(self.ends)}", "missed": 0,
            "arrivals": self.arrivals[int(arrived) :], "sent": self.sent[int(sent) :], "ends": self.ends[int(ended) :],
            "in_flight": 3, "queued": 2, "instances": seen,
        }  # fmt: skip
        return web.json_response(answer)


class FakeActuator:
    """Keeps members in memory. ``lies``: says that it obeyed and does nothing; ``fails``: raises so many times; ``slow_s``:
    takes so long; ``silent``: cannot say what there is."""

    keeps_members = True

    def __init__(self) -> None:
        self.there: list[Member] = []
        self.orders: list[dict[str, int]] = []
        self.lies = False
        self.fails = 0
        self.slow_s = 0.0
        self.silent = False
        self.closed = False
        self.ordered_s: dict[str, float] = {}
        self.at_once = 0
        self.at_once_most = 0

    async def scale_to(self, want: Mapping[str, int]) -> None:
        self.orders.append(dict(want))
        self.at_once += 1
        self.at_once_most = max(self.at_once, self.at_once_most)
        try:
            await asyncio.sleep(self.slow_s)
        finally:
            self.at_once -= 1
        if self.fails:
            self.fails -= 1
            raise ActuatorError("no machine is to be had")
        if self.lies:
            return
        for kind, count in want.items():
            mine = [member for member in self.there if member.kind == kind]
            for number in range(len(mine), count):
                name = f"{kind}-{number}"
                self.ordered_s[name] = time.time() - 7.0
                self.there.append(Member(name, kind, Phase.READY, time.time()))
            for member in mine[count:]:
                self.there.remove(member)

    async def members(self) -> Sequence[Member]:
        if self.silent:
            raise ActuatorError("nobody knows")
        return list(self.there)

    async def close(self) -> None:
        self.closed = True
