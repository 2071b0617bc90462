"""Gateways as an autoscaler talks to them: their administration, over HTTP."""

import asyncio
import os
from collections.abc import Sequence
from typing import Final
from urllib.parse import quote

import aiohttp
import msgspec

from block.errors import BlockError
from block.gateway.config import InstanceConfig
from block.gateway.records.recent import RecentAnswer, Seen

ANSWER_BYTES_MAX: Final = 64 << 20


class GatewayError(BlockError):
    """A gateway did not answer, or not as it should; the text says how."""


class Gateway:
    """One gateway's ``/admin``. Every call ends within ``timeout_s``."""

    def __init__(self, session: aiohttp.ClientSession, url: str, admin_key: str, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self._session, self._timeout = session, aiohttp.ClientTimeout(total=timeout_s)
        self._headers = {"authorization": f"Bearer {admin_key}"}
        self._cursor = self._list_cursor = ""

    async def recent(self) -> RecentAnswer:
        """What came since the last call.

        Raises:
            GatewayError: no answer.
        """
        answer = await self._recent(self._cursor)
        self._cursor = answer.cursor
        return answer

    async def instances(self) -> dict[str, Seen]:
        """Its instances by name, with their requests in flight at all of its workers (its list of instances has one worker's).

        Raises:
            GatewayError: no answer.
        """
        answer = await self._recent(self._list_cursor)
        self._list_cursor = answer.cursor
        return {one.name: one for one in answer.instances}

    async def _recent(self, cursor: str) -> RecentAnswer:
        body = await self._ask("GET", f"recent?after={quote(cursor, safe='')}")
        try:
            return msgspec.json.decode(body, type=RecentAnswer)
        except msgspec.DecodeError as error:
            raise GatewayError(f"it told nonsense: {error}") from error

    async def join(self, config: InstanceConfig) -> None:
        """Add an instance; no error where there is one of that name."""
        given = {name: value for name, value in msgspec.to_builtins(config).items() if value is not None}
        await self._ask("POST", "instances", msgspec.json.encode(given), fine=(409,))

    async def drain(self, name: str) -> None:
        """No new requests to it."""
        await self._ask("POST", f"instances/{quote(name, safe='')}/drain", fine=(404,))

    async def leave(self, name: str) -> None:
        """Remove it."""
        await self._ask("DELETE", f"instances/{quote(name, safe='')}", fine=(404,))

    async def _ask(self, method: str, path: str, body: bytes = b"", *, fine: Sequence[int] = ()) -> bytes:
        url = f"{self.url}/admin/{path}"
        try:
            async with self._session.request(
                method, url, data=body or None, headers=self._headers, timeout=self._timeout
            ) as answer:
                told = await answer.content.read(ANSWER_BYTES_MAX)
                while not answer.content.at_eof() and len(told) < ANSWER_BYTES_MAX:
                    told += await answer.content.read(ANSWER_BYTES_MAX)
        except aiohttp.ClientConnectorError as error:
            number = error.os_error.errno or 0
            raise GatewayError(f"no connection: {os.strerror(number) if number > 0 else error.os_error}") from error
        except TimeoutError as error:
            raise GatewayError(f"no answer within {self._timeout.total:g} s") from error
        except (aiohttp.ClientError, asyncio.IncompleteReadError, ValueError) as error:
            raise GatewayError(str(error) or type(error).__name__) from error
        if answer.status == 401:
            raise GatewayError("it refuses the admin key")
        if answer.status == 404 and b"no admin key" in told:
            raise GatewayError("it has no admin key: start it with --admin-key")
        if answer.status >= 400 and answer.status not in fine:
            raise GatewayError(f"{method} {path} was answered {answer.status}: {told[:200].decode(errors='replace')}")
        return told
