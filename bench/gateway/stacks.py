"""Which HTTP stack for the gateway? The same small proxy written on each of three, one process each, one run, interleaved.

    python bench/gateway/stacks.py [--rounds 3] [--seconds 3] [--starlette-python PATH]

Each reads the JSON body, takes the next of two backends, forwards head and body on kept-alive connections and streams the
answer as it comes: what any of them must do before it is a gateway. "raw" is asyncio protocols + uvloop + httptools
(llhttp). --starlette-python: an interpreter that has starlette, uvicorn, httpx, uvloop and httptools.
"""

import argparse
import asyncio
import itertools
import json
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

HOP = {"host", "connection", "transfer-encoding", "content-length", "keep-alive"}


def serve_aiohttp(port: int, backends: list[str]) -> None:
    import aiohttp
    import uvloop
    from aiohttp import web

    turn = itertools.cycle(backends)

    async def handle(request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            return web.json_response({})
        body = await request.read()
        json.loads(body).get("model")
        headers = {k: v for k, v in request.headers.items() if k.lower() not in HOP}
        async with request.app["session"].post(next(turn) + request.path, data=body, headers=headers) as upstream:
            kept = {k: v for k, v in upstream.headers.items() if k.lower() not in HOP}
            answer = web.StreamResponse(status=upstream.status, headers=kept)
            await answer.prepare(request)
            async for part in upstream.content.iter_any():
                await answer.write(part)
            await answer.write_eof()
            return answer

    async def main() -> None:
        app = web.Application()
        app["session"] = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False)
        app.router.add_route("*", "/{tail:.*}", handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, backlog=4096).start()
        await asyncio.Event().wait()

    uvloop.run(main())


def serve_starlette(port: int, backends: list[str]) -> None:
    import httpx
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    turn = itertools.cycle(backends)
    session = httpx.AsyncClient(limits=httpx.Limits(max_connections=None, max_keepalive_connections=None), timeout=None)

    async def handle(request: Request) -> Response:
        if request.method == "GET":
            return JSONResponse({})
        body = await request.body()
        json.loads(body).get("model")
        headers = {k: v for k, v in request.headers.items() if k not in HOP}
        upstream = await session.send(
            session.build_request("POST", next(turn) + request.url.path, content=body, headers=headers), stream=True
        )
        kept = {k: v for k, v in upstream.headers.items() if k not in HOP}

        async def parts() -> Any:
            async for part in upstream.aiter_raw():
                yield part
            await upstream.aclose()

        return StreamingResponse(parts(), status_code=upstream.status_code, headers=kept)

    app = Starlette(routes=[Route("/{tail:path}", handle, methods=["GET", "POST"])])
    uvicorn.run(app, host="127.0.0.1", port=port, loop="uvloop", http="httptools", log_level="error", access_log=False)


def serve_raw(port: int, backends: list[str]) -> None:
    import socket

    import httptools
    import uvloop

    turn = itertools.cycle([url.removeprefix("http://").split(":") for url in backends])
    idle: dict[str, list[Any]] = {}

    class Upstream(asyncio.Protocol):
        client: Any = None

        def __init__(self, home: str) -> None:
            self.home = home

        def connection_made(self, transport: Any) -> None:
            self.transport = transport
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def send(self, client: "Client", data: bytes) -> None:
            self.client, self.parser, self.whole = client, httptools.HttpResponseParser(self), False
            self.transport.write(data)

        def on_message_complete(self) -> None:
            self.whole = True

        def data_received(self, data: bytes) -> None:
            self.parser.feed_data(data)
            self.client.transport.write(data)
            if self.whole:
                idle.setdefault(self.home, []).append(self)

    class Client(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport, self.parser = transport, httptools.HttpRequestParser(self)
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def on_message_begin(self) -> None:
            self.lines, self.parts = [], []

        def on_url(self, url: bytes) -> None:
            self.url = url

        def on_header(self, name: bytes, value: bytes) -> None:
            if name.lower().decode() not in HOP:
                self.lines.append(b"%b: %b\r\n" % (name, value))

        def on_body(self, body: bytes) -> None:
            self.parts.append(body)

        def on_message_complete(self) -> None:
            if self.parser.get_method() == b"GET":
                self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
                return
            body = b"".join(self.parts)
            json.loads(body).get("model")
            host, number = next(turn)
            head = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n%b\r\n" % (
                self.url,
                len(body),
                b"".join(self.lines),
            )
            if kept := idle.get(number):
                kept.pop().send(self, head + body)
            else:
                self.task = asyncio.ensure_future(self.connect(host, number, head + body))

        async def connect(self, host: str, number: str, data: bytes) -> None:
            _, upstream = await asyncio.get_running_loop().create_connection(
                lambda: Upstream(number), host, int(number)
            )
            upstream.send(self, data)

        def data_received(self, data: bytes) -> None:
            self.parser.feed_data(data)

    async def main() -> None:
        await asyncio.get_running_loop().create_server(Client, "127.0.0.1", port, backlog=4096)
        await asyncio.Event().wait()

    uvloop.run(main())


STACKS = {"aiohttp": serve_aiohttp, "starlette": serve_starlette, "raw": serve_raw}


def compare(options: argparse.Namespace) -> None:
    from rig import HERE, free_ports, heading, median_of, median_paced, paced, process, python, require_wrk, wrk

    require_wrk()
    print(f"{heading()}\n{options.rounds} rounds of {options.seconds:g} s, medians\n")
    interpreters = {"aiohttp": sys.executable, "raw": sys.executable, "starlette": options.starlette_python}
    check = [options.starlette_python, "-c", "import starlette, uvicorn, httpx, uvloop, httptools"]
    if subprocess.run(check, capture_output=True, check=False).returncode:
        print("starlette + uvicorn + httpx left out: not installed there (--starlette-python PATH)")
        del interpreters["starlette"]
    with ExitStack() as stack:
        ports = free_ports(4)
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        backend = str(HERE / "backend.py")
        stack.enter_context(
            process(*python(backend, "--port", str(ports[0]), "--port", str(ports[1])), ready=urls[1] + "/health")
        )
        slow = (
            "--ttft-ms",
            "20",
            "--itl-ms",
            "10",
            "--events",
            "100",
            "--port",
            str(ports[2]),
            "--port",
            str(ports[3]),
        )
        stack.enter_context(process(*python(backend, *slow), ready=urls[3] + "/health"))
        found: dict[str, dict[str, list[Any]]] = {}
        things: dict[str, tuple[tuple[str, int], tuple[str, int]]] = {}
        for name, interpreter in interpreters.items():
            pair = []
            for behind in (urls[:2], urls[2:]):
                (port,) = free_ports(1)
                command = (interpreter, __file__, "--serve", name, "--port", str(port), *behind)
                pid = stack.enter_context(process(*command, ready=f"http://127.0.0.1:{port}/health"))
                pair.append((f"http://127.0.0.1:{port}", pid))
            things[name] = (pair[0], pair[1])
        for _ in range(options.rounds):
            for name, ((url, pid), (paced_url, paced_pid)) in things.items():
                kept = found.setdefault(name, {"c1": [], "c32": [], "paced": []})
                kept["c1"].append(wrk(url, pid, connections=1, seconds=options.seconds, stream=False))
                kept["c32"].append(wrk(url, pid, connections=32, seconds=options.seconds, stream=False))
                kept["paced"].append(paced(paced_url, paced_pid, streams=32, seconds=options.seconds))
    print(
        f"{'stack':12s}{'p50 ms c=1':>13s}{'req/s c=32':>13s}{'CPU us/req':>13s}{'TTFT p50 ms':>13s}{'CPU us/event':>13s}"
    )
    for name, kept in found.items():
        one, many = median_of(kept["c1"]), median_of(kept["c32"])
        run = median_paced(kept["paced"])
        print(f"{name:12s}{one.p50_ms:13.3f}{many.rps:13,.0f}{many.cpu_us:13.0f}", end="")
        print(f"{run.ttft_p50_ms:13.2f}{run.cpu_us_per_event:13.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", choices=STACKS, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("backends", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--starlette-python", default=sys.executable)
    options = parser.parse_args()
    if options.serve:
        STACKS[options.serve](options.port, options.backends)
    else:
        compare(options)


if __name__ == "__main__":
    main()
