"""API keys: which client is this? Keys are compared by a keyed hash, so that the time taken says nothing about them."""

import os
from collections.abc import Iterable
from hashlib import blake2b
from typing import Final

from block.errors import ClientError
from block.gateway.wire.http1 import HttpRequest

_UNKNOWN: Final = "The API key is missing or wrong."


class Keys:
    """Keys as configured, one a line: ``KEY`` or ``KEY NAME``. Empty: everybody may."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._secret = os.urandom(32)
        self._names: dict[bytes, str] = {}
        for line in lines:
            key, _, name = line.strip().partition(" ")
            digest = self._digest(key.encode())
            self._names[digest] = name.strip() or blake2b(key.encode(), digest_size=8).hexdigest()

    def __bool__(self) -> bool:
        return bool(self._names)

    def _digest(self, key: bytes) -> bytes:
        return blake2b(key, key=self._secret, digest_size=32).digest()

    def name_of(self, http: HttpRequest) -> str | None:
        """The name of the key that a request carries (``Authorization: Bearer``, or ``x-api-key``); ``None``: no keys are set.

        Raises:
            ClientError: 401, it carries none of these.
        """
        if not self._names:
            return None
        given = http.fields.get(b"authorization")
        if given is not None:
            token = given[7:].strip() if given[:7].lower() == b"bearer " else b""
        else:
            token = http.fields.get(b"x-api-key", b"")  # as Anthropic's clients send it
        name = self._names.get(self._digest(token))
        if name is None:
            raise ClientError(401, _UNKNOWN, kind="authentication_error", code="invalid_api_key")
        return name
