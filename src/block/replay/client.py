"""Open-loop load against any OpenAI endpoint: each request is sent when the workload says, whatever became of others.

Latency counts from the *intended* send time, so neither a slow server nor a late client can hide waiting. A request
that fails in any way is a row too.
"""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import aiohttp
import msgspec

from block.errors import ConfigError
from block.metrics.row import Row, finished_row
from block.replay.prompts import prompt_text
from block.replay.sse import AnswerReader, message_of
from block.workload.offered import Offered

LengthMode = Literal["exact", "header", "natural"]
LENGTH_HEADER: Final = "x-emulate-output-tokens"
INSTANCE_HEADER: Final = "x-gateway-destination-endpoint"
PREDICTED_TTFT_HEADER: Final = "x-predicted-ttft-ms"
PREDICTED_E2E_HEADER: Final = "x-predicted-e2e-ms"


class ReplayOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to send.

    ``length_mode``: ``exact`` fixes the output by max_tokens + ignore_eos (vLLM), so the server knows it beforehand;
    ``header`` tells it only to an emulated engine and sends ``max_tokens`` as the bound; ``natural`` lets the model
    end. ``in_flight_max`` bounds what is open at once: a request beyond it fails without being sent.
    """

    endpoint: Literal["completions", "chat"] = "completions"
    model: str = ""
    length_mode: LengthMode = "exact"
    max_tokens: int = 4096
    stream: bool = True
    timeout_s: float = 600.0
    in_flight_max: int = 20_000
    seed: int = 0
    policy: str = ""
    id_prefix: str = ""
    headers: Mapping[str, str] = {}


async def replay(
    offered: Sequence[Offered],
    url: str,
    options: ReplayOptions | None = None,
    *,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Send every offered request at its time to ``url`` (a base URL, with or without ``/v1``).

    Returns one row a request, in the order offered; ``on_row`` sees each as it ends. On cancellation the requests in
    flight are cancelled, and ``on_row`` sees them as failed, "interrupted".

    Raises:
        ConfigError: the URL is not http(s), or the server did not tell its model and none was named.
    """
    options = options or ReplayOptions()
    base = base_url(url)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
    timeout = aiohttp.ClientTimeout(total=options.timeout_s, sock_connect=min(10.0, options.timeout_s))
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=dict(options.headers)) as session:
        if not options.model:
            options = msgspec.structs.replace(options, model=await served_model(session, base))
        return await _Run(session, base, options, on_row).play(offered)


def base_url(url: str) -> str:
    """The URL before ``/v1``.

    Raises:
        ConfigError: not an http(s) URL.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is not a URL: write it as http://HOST:PORT.")
    return url.rstrip("/").removesuffix("/v1")


async def served_model(session: aiohttp.ClientSession, base: str) -> str:
    """The first model that the server lists.

    Raises:
        ConfigError: it cannot be reached or lists none.
    """
    try:
        async with session.get(f"{base}/v1/models", timeout=aiohttp.ClientTimeout(total=10)) as answer:
            listed = await answer.json(content_type=None)
            return str(listed["data"][0]["id"])
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ConfigError(f"{base} cannot be reached: {error or type(error).__name__}.") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"{base}/v1/models lists no model: name one.") from error


class _FailedError(Exception):
    """This request got no whole answer; ``rejected`` if the server refused it before any work."""

    def __init__(self, reason: str, *, rejected: bool = False) -> None:
        super().__init__(reason)
        self.rejected = rejected


class _Run:
    """One replay under way."""

    def __init__(
        self, session: aiohttp.ClientSession, base: str, options: ReplayOptions, on_row: Callable[[Row], None] | None
    ) -> None:
        self._session = session
        self._url = f"{base}/v1/{'chat/completions' if options.endpoint == 'chat' else 'completions'}"
        self._options = options
        self._on_row = on_row
        self._now_s = asyncio.get_running_loop().time
        self._in_flight = 0
        self._start_s = 0.0

    async def play(self, offered: Sequence[Offered]) -> list[Row]:
        self._start_s = self._now_s() + 0.02
        async with asyncio.TaskGroup() as group:
            tasks = []
            for one in offered:
                body = self._body(one)  # before the wait, so that making it delays nothing
                wait_s = self._start_s + one.request.arrived_s - self._now_s()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                tasks.append(group.create_task(self._row(one, body)))
        return [task.result() for task in tasks]

    def _body(self, one: Offered) -> bytes:
        options, text = self._options, prompt_text(one, self._options.seed)
        fields: dict[str, Any] = {"model": options.model, "stream": options.stream, "temperature": 0}
        if options.endpoint == "chat":
            fields["messages"] = [{"role": "user", "content": text}]
        else:
            fields["prompt"] = text
        if options.stream:
            fields["stream_options"] = {"include_usage": True}
        if options.length_mode == "exact":
            fields |= {"max_tokens": one.output_tokens, "min_tokens": one.output_tokens, "ignore_eos": True}
        else:
            fields["max_tokens"] = one.request.max_tokens or options.max_tokens
        return json.dumps(fields, separators=(",", ":")).encode()

    async def _row(self, one: Offered, body: bytes) -> Row:
        sent_s = self._now_s() - self._start_s
        self._in_flight += 1
        try:
            if self._in_flight > self._options.in_flight_max:
                raise _FailedError(f"not sent: {self._options.in_flight_max} requests are in flight already")
            row = await self._ask(one, body, sent_s)
        except _FailedError as failure:
            row = self._failed(one, sent_s, str(failure), rejected=failure.rejected)
        except TimeoutError:
            row = self._failed(one, sent_s, f"no whole answer within {self._options.timeout_s:g} s")
        except (aiohttp.ClientError, ConnectionError) as error:
            row = self._failed(one, sent_s, f"{type(error).__name__}: {error}")
        except asyncio.CancelledError:
            self._emit(self._failed(one, sent_s, "interrupted"))
            raise
        finally:
            self._in_flight -= 1
        self._emit(row)
        return row

    def _emit(self, row: Row) -> None:
        if self._on_row is not None:
            self._on_row(row)

    async def _ask(self, one: Offered, body: bytes, sent_s: float) -> Row:
        headers = {"content-type": "application/json", "x-request-id": self._options.id_prefix + one.request.id}
        if self._options.length_mode == "header":
            headers[LENGTH_HEADER] = str(one.output_tokens)
        async with self._session.post(self._url, data=body, headers=headers) as answer:
            if answer.status != 200:
                text = await answer.text(errors="replace")
                raise _FailedError(f"HTTP {answer.status}: {_reason(text)}", rejected=answer.status in (429, 503))
            if self._options.stream:
                first_token_s, output_tokens = await self._read_stream(answer)
            else:
                first_token_s, output_tokens = None, _tokens_of(await answer.read())
            return finished_row(
                id=one.request.id, policy=self._options.policy, instance=answer.headers.get(INSTANCE_HEADER),
                intended_s=one.request.arrived_s, sent_s=sent_s, first_token_s=first_token_s,
                finished_s=self._now_s() - self._start_s, prompt_tokens=one.request.prompt_tokens,
                output_tokens=output_tokens,
                predicted_ttft_s=_from_ms(answer.headers.get(PREDICTED_TTFT_HEADER)),
                predicted_e2e_s=_from_ms(answer.headers.get(PREDICTED_E2E_HEADER)),
            )  # fmt: skip

    async def _read_stream(self, answer: aiohttp.ClientResponse) -> tuple[float | None, int]:
        reader = AnswerReader()
        first_token_s = None
        async for chunk in answer.content.iter_any():
            reader.feed(chunk)
            if reader.first_token_in_chunk:
                first_token_s = self._now_s() - self._start_s
            if reader.error is not None:
                raise _FailedError(f"the stream broke: {reader.error}")
        if not reader.done:
            raise _FailedError(f"the stream ended without [DONE] after {reader.output_tokens} tokens")
        return first_token_s, reader.output_tokens

    def _failed(self, one: Offered, sent_s: float, reason: str, *, rejected: bool = False) -> Row:
        return Row(
            id=one.request.id, policy=self._options.policy, instance=None, intended_s=one.request.arrived_s,
            sent_s=sent_s, first_token_s=None, finished_s=None, prompt_tokens=one.request.prompt_tokens,
            output_tokens=0, ttft_s=None, e2e_s=None, tpot_s=None,
            status="rejected" if rejected else "failed", error=reason,
        )  # fmt: skip


def _reason(text: str) -> str:
    try:
        fields = json.loads(text)
    except ValueError:
        return text[:200]
    return message_of(fields) if isinstance(fields, dict) else text[:200]


def _tokens_of(body: bytes) -> int:
    try:
        return int(json.loads(body)["usage"]["completion_tokens"])
    except (ValueError, KeyError, TypeError):
        raise _FailedError("the answer has no usage.completion_tokens") from None


def _from_ms(text: str | None) -> float | None:
    try:
        return None if text is None else float(text) / 1e3
    except ValueError:
        return None
