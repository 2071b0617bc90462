"""Pages of other origins in a browser: who may, and what they are told (the Fetch standard's CORS protocol)."""

from collections.abc import Iterable

from block.gateway.wire.http1 import HttpRequest

_PREFLIGHT = (
    b"access-control-allow-methods: *\r\naccess-control-allow-headers: %b\r\naccess-control-max-age: 3600\r\n"
    b"vary: origin, access-control-request-method, access-control-request-headers\r\n"
)


class Cors:
    """``allowed``: origins as browsers send them (``https://chat.example``), ``*`` for all; empty: nobody is told anything,
    and what an instance says of it goes through."""

    def __init__(self, allowed: Iterable[str]) -> None:
        self._allowed = frozenset(origin.rstrip("/").encode() for origin in allowed)

    def __bool__(self) -> bool:
        return bool(self._allowed)

    def _origin(self, http: HttpRequest) -> bytes | None:
        """What to say is allowed: this request's origin, ``*`` for all; ``None``: it is not, or it comes from no page."""
        origin = http.fields.get(b"origin")
        if origin is None or not self._allowed:
            return None
        if b"*" in self._allowed:
            return b"*"
        return origin if origin in self._allowed else None

    def lines(self, http: HttpRequest) -> bytes:
        """Header lines for an answer; empty where there is nothing to say."""
        origin = self._origin(http)
        if origin is None:
            return b""
        return (
            b"access-control-allow-origin: %b\r\naccess-control-expose-headers: *\r\n" % origin
            if origin == b"*"
            else b"access-control-allow-origin: %b\r\naccess-control-expose-headers: *\r\nvary: origin\r\n" % origin
        )

    def preflight(self, http: HttpRequest) -> bytes | None:
        """Header lines for the answer to a browser that asks first; ``None``: this is no such request, or it may not."""
        if b"access-control-request-method" not in http.fields:
            return None
        origin = self._origin(http)
        if origin is None:
            return None
        wanted = http.fields.get(b"access-control-request-headers", b"*")  # named: "*" would not cover authorization
        return b"access-control-allow-origin: %b\r\n" % origin + _PREFLIGHT % wanted
