"""An aiohttp application on a port until somebody says stop: what the emulator and the predictor have in common."""

import asyncio
import errno
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

import msgspec
from aiohttp import web

from block.errors import ClientError, ConfigError

JSON: Final = "application/json"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_Parsed = TypeVar("_Parsed")


def json_response(value: Any, status: int = 200) -> web.Response:
    """``value`` as a JSON answer."""
    return web.Response(status=status, body=msgspec.json.encode(value), content_type=JSON)


def parse_json(raw: bytes, kind: type[_Parsed]) -> _Parsed:
    """A JSON body of a known shape.

    Raises:
        ClientError: 400, it is malformed or of another shape.
    """
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise ClientError(400, f"{error}.", kind="BadRequestError") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ClientError(400, f"The body is not valid JSON: {error}.", kind="BadRequestError") from error


def error_response(error: ClientError) -> web.Response:
    """OpenAI's error object as vLLM words it: ``code`` is the HTTP status."""
    fields = {"message": error.message, "type": error.kind, "param": error.param, "code": error.status}
    return json_response({"error": fields}, error.status)


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The one place where errors become statuses."""
    try:
        return await handler(request)
    except ClientError as error:
        return error_response(error)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        kind = "NotFoundError" if error.status == 404 else "BadRequestError"
        answer = error_response(
            ClientError(error.status, f"{error.reason}: {request.method} {request.path}", kind=kind)
        )
        if "Allow" in error.headers:
            answer.headers["Allow"] = error.headers["Allow"]
        return answer


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet, so that a port in use is known before anything else is done.

    Raises:
        ConfigError: the port is in use, or there is no such address here.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"Port {port} of {host} is in use: choose another --port, or 0 for any free one."
            ) from error
        raise ConfigError(f"Cannot listen on {host}:{port}: {error.strerror or error}.") from error
    except OverflowError as error:
        found.close()
        raise ConfigError(f"{port} is not a port: use 0 to 65535.") from error
    return found


def url_of(bound: socket.socket) -> str:
    """The base URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve_until_stopped(
    app: web.Application, bound: socket.socket, on_ready: Callable[[], None], stop: asyncio.Event | None = None
) -> None:
    """Serve until SIGINT, SIGTERM or ``stop``. A client that leaves cancels its handler."""
    loop = asyncio.get_running_loop()
    stop = stop or asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.SockSite(runner, bound, backlog=1024).start()
        on_ready()
        await stop.wait()
    finally:
        await runner.cleanup()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a program's coroutine to its end, on uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
        return
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)
