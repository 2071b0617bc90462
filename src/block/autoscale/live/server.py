"""The autoscaler's own HTTP: why it did what, what it wants, whether it works."""

from collections.abc import Callable
from typing import Final

from aiohttp import web

from block.autoscale import steady
from block.autoscale.live.figures import Figures
from block.autoscale.live.keeper import Keeper
from block.errors import ClientError
from block.predictor.serving import errors_as_json, json_response

TURNS_LATE: Final = 5
"""So many intervals without a decision and the autoscaler is not healthy."""


class Window:
    """Routes over one keeper."""

    def __init__(
        self, keeper: Keeper, figures: Figures, interval_s: float, now_s: Callable[[], float] = steady.now_s
    ) -> None:
        self._keeper, self._figures, self._interval_s, self._now_s = keeper, figures, interval_s, now_s
        self._started_s = now_s()

    def app(self) -> web.Application:
        app = web.Application(middlewares=[errors_as_json])
        app.router.add_get("/decisions", self.decisions)
        app.router.add_get("/desired", self.desired)
        app.router.add_get("/health", self.health)
        app.router.add_get("/metrics", self.metrics)
        return app

    async def decisions(self, request: web.Request) -> web.Response:
        """The newest ``?limit=N`` (50), newest first."""
        text = request.query.get("limit", "50")
        if not (text.isascii() and text.isdigit() and 0 < int(text[:9]) < 100_000):
            raise ClientError(400, f"limit must be a whole number above 0, not {text[:64]!r}.", param="limit")
        return json_response({"data": list(self._keeper.records)[::-1][: int(text)]})

    async def desired(self, _request: web.Request) -> web.Response:
        """What there should be, for those who scale by themselves."""
        want = self._keeper.want
        if not want:
            raise ClientError(503, "Nothing was decided yet.", kind="ServiceUnavailableError")
        return json_response({"want": want, "total": sum(want.values())})

    async def health(self, _request: web.Request) -> web.Response:
        records = self._keeper.records
        last_s = records[-1].at_s if records else self._started_s
        late_s = self._now_s() - last_s
        if late_s > TURNS_LATE * max(1.0, self._interval_s):
            return json_response({"status": "not ready", "reason": f"no decision for {late_s:.0f} s"}, 503)
        trouble = records[-1].trouble if records else None
        return json_response({"status": "ok", "decisions": self._keeper.number, "trouble": trouble})

    async def metrics(self, _request: web.Request) -> web.Response:
        return web.Response(
            body=self._figures.render(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )
