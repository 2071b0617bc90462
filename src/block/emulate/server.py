"""The HTTP side of the emulated engine: routes and what they answer."""

import asyncio
import hmac
import os
import time
import uuid
from typing import Any, Final

import msgspec
from aiohttp import HttpVersion11, web
from prometheus_client import CollectorRegistry, generate_latest

from block import __version__
from block.emulate import tokens
from block.emulate.answers import StreamedAnswer, WholeAnswer, head, whole
from block.emulate.faults import BrokenOnOrder, Fault
from block.emulate.instance import Instance
from block.emulate.measures import MeasuresCollector
from block.emulate.openai import Job, Message, bad_request, message_text, parse_chat, parse_completion
from block.predictor.serving import JSON, Handler, errors_as_json, json_response, parse_json

BODY_MAX: Final = 64 << 20
OUTPUT_TOKENS_HEADER: Final = "x-emulate-output-tokens"
CONTINUED_TOKENS_HEADER: Final = "x-block-continued-tokens"
"""How many of the prompt's last tokens are the answer's first: the gateway continues what another engine began."""


def make_app(instance: Instance) -> web.Application:
    """The application; the instance's player must have its timer."""
    app = web.Application(client_max_size=BODY_MAX, middlewares=[errors_as_json, _key_check(instance.config.api_key)])
    routes = Routes(instance)
    app.router.add_post("/v1/completions", routes.completions)
    app.router.add_post("/v1/chat/completions", routes.chat)
    app.router.add_get("/v1/models", routes.models)
    app.router.add_get("/health", routes.health)
    app.router.add_route("*", "/ping", routes.health)
    app.router.add_get("/version", routes.version)
    app.router.add_get("/load", routes.load)
    app.router.add_post("/tokenize", routes.tokenize)
    app.router.add_post("/detokenize", routes.detokenize)
    app.router.add_get("/metrics", routes.metrics)
    app.router.add_get("/emulate/lateness", routes.lateness)
    if instance.config.allow_faults:
        app.router.add_post("/emulate/fault", routes.fault)
    return app


class Routes:
    """The handlers; each takes a request and answers it."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._registry = CollectorRegistry()
        self._registry.register(MeasuresCollector(instance.measures, instance.engine, instance.config.models[0]))
        self._created = int(time.time())
        self._resume: asyncio.TimerHandle | None = None

    async def completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, parse_completion(await request.read()))

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, parse_chat(await request.read()))

    async def _generate(self, request: web.Request, job: Job) -> web.StreamResponse:
        instance = self._instance
        instance.failures.maybe_fail()
        request_id = request.headers.get("X-Request-Id")
        sequence = instance.sequence_of(job, request_id, _wanted_output(request))
        prefix = "chatcmpl-" if job.chat else "cmpl-"
        first = head(
            job, prefix + (request_id or uuid.uuid4().hex), int(time.time()), job.model or instance.config.models[0]
        )
        play = self._stream if job.stream else self._answer_whole
        try:
            return await play(request, job, first, sequence)
        except BrokenOnOrder:
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=500)  # nobody reads it
        finally:
            instance.leave(sequence)

    async def _answer_whole(
        self, _request: web.Request, job: Job, first: dict[str, Any], sequence: Any
    ) -> web.Response:
        answer = WholeAnswer(asyncio.get_running_loop().create_future())
        self._instance.start(sequence, job, answer)
        reason = await answer.done
        cached = sequence.hit_tokens if self._instance.config.prompt_tokens_details else None
        return web.Response(body=whole(job, first, sequence.output, reason, cached), content_type=JSON)

    async def _stream(self, request: web.Request, job: Job, first: dict[str, Any], sequence: Any) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        # The answer writes to the socket itself, once a token; the response only opens and ends the message.
        await response.prepare(request)
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client is gone")
        done: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def send(event: bytes) -> None:
            if not transport.is_closing():
                transport.write(event)
            elif not done.done():  # the handler was not told: the client left while it was not waiting
                done.set_exception(ConnectionResetError("the client is gone"))

        answer = StreamedAnswer(
            job, head=first, send=send, backlog=transport.get_write_buffer_size, done=done,
            chunked=request.version >= HttpVersion11,
        )  # fmt: skip
        self._instance.start(sequence, job, answer)
        await answer.done
        await response.write_eof()
        return response

    async def models(self, _request: web.Request) -> web.Response:
        config = self._instance.config
        cards: list[dict[str, Any]] = [
            {"id": model, "object": "model", "created": self._created, "owned_by": "vllm", "root": config.models[0],
             "parent": None, "max_model_len": config.limits.max_model_len, "permission": []}
            for model in config.models
        ]  # fmt: skip
        return json_response({"object": "list", "data": cards})

    async def health(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def version(self, _request: web.Request) -> web.Response:
        return json_response({"version": f"block-emulate {__version__}"})

    async def load(self, _request: web.Request) -> web.Response:
        return json_response({"server_load": self._instance.player.requests})

    async def tokenize(self, request: web.Request) -> web.Response:
        body = parse_json(await request.read(), TokenizeBody)
        self._instance.check_model(body.model)
        if body.messages is not None:
            found = tokens.of_chat(
                [(m.role, message_text(m)) for m in body.messages], prompt_for_answer=body.add_generation_prompt
            )
        else:
            found = tokens.of_text(body.prompt or "")
        longest = self._instance.config.limits.max_model_len
        ids = tokens.ids(found)
        return json_response({"count": len(ids), "max_model_len": longest, "tokens": ids, "token_strs": None})

    async def detokenize(self, request: web.Request) -> web.Response:
        body = parse_json(await request.read(), DetokenizeBody)
        self._instance.check_model(body.model)
        try:
            return json_response({"prompt": tokens.text_of(body.tokens)})
        except ValueError as error:
            raise bad_request(f"tokens: {error}.", "tokens") from error

    async def metrics(self, _request: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(self._registry), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def lateness(self, _request: web.Request) -> web.Response:
        return json_response(self._instance.lateness.summary())

    async def fault(self, request: web.Request) -> web.Response:
        fault = parse_json(await request.read(), Fault)
        instance = self._instance
        if fault.kind == "hang":
            self._hang(fault.seconds)
        elif fault.kind == "slow":
            instance.slow_down(fault.factor)
        elif fault.kind == "errors":
            instance.failures.fraction = fault.fraction
        elif fault.kind == "break":
            return json_response({"broken": instance.player.break_all(BrokenOnOrder())})
        else:
            os._exit(1)
        return json_response({"fault": fault.kind})

    def _hang(self, seconds: float) -> None:
        self._instance.player.pause()
        if self._resume is not None:
            self._resume.cancel()
        self._resume = asyncio.get_running_loop().call_later(seconds, self._instance.player.resume)


class TokenizeBody(msgspec.Struct, frozen=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_generation_prompt: bool = True


class DetokenizeBody(msgspec.Struct, frozen=True):
    tokens: list[int]
    model: str | None = None


def _wanted_output(request: web.Request) -> int | None:
    """The experiment's true output length, from its header."""
    wanted = _whole_number(request, OUTPUT_TOKENS_HEADER)
    return None if wanted is None else max(1, wanted - (_whole_number(request, CONTINUED_TOKENS_HEADER) or 0))


def _whole_number(request: web.Request, header: str) -> int | None:
    text = request.headers.get(header)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise bad_request(f"{header} must be a whole number of at least 1, not {text!r}.")
    return int(text)


def _key_check(api_key: str | None) -> Any:
    """Middleware that wants the key on /v1, as vLLM does."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if api_key is not None and request.path.startswith("/v1"):
            given = request.headers.get("Authorization", "").encode()
            if not hmac.compare_digest(given, f"Bearer {api_key}".encode()):
                return json_response({"error": "Unauthorized"}, 401)
        return await handler(request)

    return check
