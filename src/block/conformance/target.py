"""The gateway under test: where it is, what to ask it, and the two ways of asking (a polite client, raw bytes)."""

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from block.conformance.check import FailedError, expect
from block.conformance.wire import Answer, Wire
from block.errors import ConfigError

CHAT: Final = "/v1/chat/completions"


class Target:
    """``timeout_s``: how long an answer may take; ``quiet_s``: silence that means "nothing more comes";
    ``patience_s``: how long a check of the gateway's own time limits may wait (0: such checks do not apply);
    ``engines``: base URLs of the engines behind, where their metrics can be read.
    """

    def __init__(
        self, url: str, session: aiohttp.ClientSession, *, model: str = "", api_key: str | None = None,
        engines: tuple[str, ...] = (), timeout_s: float = 15.0, quiet_s: float = 0.5, patience_s: float = 0.0,
    ) -> None:  # fmt: skip
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is no URL of a gateway: write http://HOST:PORT.")
        try:
            self.port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise ConfigError(f"{url!r} has no valid port.") from error
        self.host = parts.hostname
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.prefix = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{self.prefix}"
        self.netloc = parts.netloc.rpartition("@")[2]
        self.session, self.model, self.api_key, self.engines = session, model, api_key, engines
        self.timeout_s, self.quiet_s, self.patience_s = timeout_s, quiet_s, patience_s

    # What to ask

    def chat(self, **fields: Any) -> dict[str, Any]:
        """A small chat request; ``fields`` are added or, where ``None``, taken away."""
        body = {"model": self.model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4} | fields
        return {name: value for name, value in body.items() if value is not None}

    # The polite client

    async def ask(
        self, method: str, path: str, body: Any = None, *, content: bytes | None = None,
        headers: dict[str, str] | None = None, key: str | None = "",
    ) -> Answer:  # fmt: skip
        """Send one request and read its answer. ``key``: ``None`` sends none, empty the target's own."""
        sent = dict(headers or {})
        key = self.api_key if key == "" else key
        if key is not None:
            sent["authorization"] = f"Bearer {key}"
        if content is None and body is not None:
            content = json.dumps(body).encode()
        if content is not None:
            sent.setdefault("content-type", "application/json")
        found = Answer()
        async with self.session.request(method, self.url + path, data=content, headers=sent) as got:
            found.status, found.whole = got.status, True
            found.fields = {name.lower(): value for name, value in got.headers.items()}
            found.parts = [(0.0, await got.read())]
        return found

    async def gauge(self, endings: tuple[str, ...]) -> float | None:
        """The sum of all metrics whose names end so, over the engines or else the gateway; ``None``: none is shown."""
        total: float | None = None
        for base in self.engines or (self.url,):
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with self.session.get(base + "/metrics") as got:
                    text = await got.text()
                for line in text.splitlines():
                    name = line.partition(" ")[0].partition("{")[0]
                    if name.endswith(endings) and not line.startswith("#"):
                        with contextlib.suppress(ValueError):
                            total = (total or 0.0) + float(line.rsplit(" ", 1)[1])
        return total

    async def find_model(self) -> None:
        """Take the first model that is listed.

        Raises:
            ConfigError: none is listed.
        """
        try:
            self.model = str((await self.ask("GET", "/v1/models")).json()["data"][0]["id"])
        except (FailedError, KeyError, IndexError, TypeError):
            raise ConfigError(f"{self.url}/v1/models lists no model: name one with --model.") from None

    # Raw bytes

    @contextlib.asynccontextmanager
    async def wire(self) -> AsyncIterator[Wire]:
        """A fresh connection."""
        async with asyncio.timeout(self.timeout_s):
            reader, writer = await asyncio.open_connection(self.host, self.port, ssl=self.tls)
        found = Wire(reader, writer, self.timeout_s)
        try:
            yield found
        finally:
            found.close()

    def head(self, method: str, path: str, *lines: str, version: str = "1.1", host: bool = True) -> bytes:
        """A request head with these header lines behind ``Host`` and the key."""
        own = [f"Host: {self.netloc}"] if host else []
        if self.api_key is not None:
            own.append(f"Authorization: Bearer {self.api_key}")
        return "\r\n".join([f"{method} {self.prefix}{path} HTTP/{version}", *own, *lines, "", ""]).encode("latin-1")

    def post(self, body: Any, *lines: str, path: str = CHAT, version: str = "1.1") -> bytes:
        """A whole POST with a content-length."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        length = f"Content-Length: {len(content)}"
        return self.head("POST", path, "Content-Type: application/json", length, *lines, version=version) + content

    async def still_serves(self) -> None:
        """A plain request must be answered 200.

        Raises:
            FailedError: it is not: what came before has broken something.
        """
        status = (await self.ask("POST", CHAT, self.chat())).status
        expect(status == 200, f"a plain request afterwards gets {status}")


@contextlib.asynccontextmanager
async def open_target(url: str, **options: Any) -> AsyncIterator[Target]:
    """A target that answers, with a model.

    Raises:
        ConfigError: nothing answers at ``url``, or it lists no model and none is given.
    """
    timeout = aiohttp.ClientTimeout(total=options.get("timeout_s", 15.0))
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        target = Target(url, session, **options)
        try:
            if not target.model:
                await target.find_model()
            else:
                await target.ask("GET", "/health")
        except TimeoutError:
            raise ConfigError(f"{url} does not answer within {target.timeout_s:g} s.") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ConfigError(f"Nothing answers at {url}: {error}.") from error
        yield target
