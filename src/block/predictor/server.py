"""The predictor's HTTP side: the snapshot stream, what-ifs, and what it thinks of itself."""

import asyncio
import time
from typing import Any, Final

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from block.errors import ClientError
from block.predictor.serving import errors_as_json, json_response, parse_json
from block.predictor.source import StateSource
from block.predictor.state import InstanceState, Question, describe, unavailable
from block.predictor.stream import Subscriber

SUBSCRIBERS_MAX: Final = 256
_PREDICT_S: Final = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)


class Predictor:
    """Routes over one instance's state. ``fault`` is what the self-test found wrong, ``None`` if nothing."""

    def __init__(self, state: InstanceState, source: StateSource, fault: str | None, min_interval_s: float) -> None:
        self._state, self._source, self._fault, self._min_interval_s = state, source, fault, min_interval_s
        self._subscribers: set[Subscriber] = set()
        self._registry = CollectorRegistry()
        r = self._registry
        self._asked = Histogram(
            "block_predictor_predict_seconds", "Time to answer a what-if", registry=r, buckets=_PREDICT_S
        )
        self._refused = Counter("block_predictor_refused", "What-ifs not answered, by status", ["status"], registry=r)
        self._sent = Gauge("block_predictor_subscribers", "Open snapshot streams", registry=r)
        self._gauges = {
            "snapshots": Gauge("block_predictor_snapshots", "Snapshots taken in since the start", registry=r),
            "age": Gauge("block_predictor_snapshot_age_seconds", "Age of the newest snapshot", registry=r),
            "fresh": Gauge("block_predictor_fresh", "1 while what-ifs can be answered", registry=r),
            "scale": Gauge("block_predictor_step_time_scale", "What multiplies the profile's step times", registry=r),
            "running": Gauge("block_predictor_requests_running", "Requests running in the newest snapshot", registry=r),
            "waiting": Gauge("block_predictor_requests_waiting", "Requests waiting in the newest snapshot", registry=r),
            "lengths": Gauge("block_predictor_lengths_observed", "Finished requests learned from", registry=r),
        }
        state.on_frame.append(self._tell)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 20, middlewares=[errors_as_json])
        app.router.add_get("/snapshots", self.snapshots)
        app.router.add_post("/predict", self.predict)
        app.router.add_get("/snapshot", self.snapshot)
        app.router.add_get("/profile", self.profile)
        app.router.add_get("/health", self.health)
        app.router.add_get("/metrics", self.metrics)
        return app

    def trouble(self) -> str | None:
        """Why no what-if can be answered, in a sentence."""
        if self._fault is not None:
            return f"the self-test failed: {self._fault}"
        return self._source.problem or self._state.staleness()

    async def snapshots(self, request: web.Request) -> web.StreamResponse:
        if len(self._subscribers) >= SUBSCRIBERS_MAX:
            raise ClientError(503, f"{SUBSCRIBERS_MAX} subscribers are enough.", kind="ServiceUnavailableError")
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        if request.transport is None:
            return response
        subscriber = Subscriber(request.transport, self._frame, self._min_interval_s)
        self._subscribers.add(subscriber)
        try:
            await asyncio.get_running_loop().create_future()  # the client's leaving cancels this
        finally:
            self._subscribers.discard(subscriber)
            subscriber.close()
        return response

    async def predict(self, request: web.Request) -> web.Response:
        started_s = time.perf_counter()
        try:
            question = parse_json(await request.read(), Question)
            if (why := self.trouble()) is not None:
                raise unavailable(why)
            answer = json_response(self._state.predict(question))
        except ClientError as error:
            self._refused.labels(str(error.status)).inc()
            raise
        self._asked.observe(time.perf_counter() - started_s)
        return answer

    async def snapshot(self, _request: web.Request) -> web.Response:
        snapshot = self._state.snapshot
        if snapshot is None:
            raise unavailable(self.trouble() or "nothing published yet")
        return json_response(describe(snapshot, self._state.age_s()))

    async def profile(self, _request: web.Request) -> web.Response:
        return json_response(msgspec.to_builtins(self._state.profile) | {"scale": self._state.scale})

    async def health(self, _request: web.Request) -> web.Response:
        why = self.trouble()
        if why is not None:
            return json_response({"status": "not ready", "reason": why}, 503)
        return json_response({"status": "ok", "snapshot_age_s": self._state.age_s()})

    async def metrics(self, _request: web.Request) -> web.Response:
        state, gauges = self._state, self._gauges
        snapshot = state.snapshot
        values: dict[str, Any] = {
            "snapshots": state.frames, "age": state.age_s(), "fresh": int(self.trouble() is None), "scale": state.scale,
            "running": snapshot.running if snapshot else 0, "waiting": snapshot.waiting if snapshot else 0,
            "lengths": state.lengths.observed,
        }  # fmt: skip
        for name, value in values.items():
            gauges[name].set(value)
        self._sent.set(len(self._subscribers))
        text = generate_latest(self._registry)
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    def _frame(self) -> bytes | None:
        return self._state.framed if self._state.framed and self._source.problem is None else None

    def _tell(self) -> None:
        for subscriber in self._subscribers:
            subscriber.frame_came()
