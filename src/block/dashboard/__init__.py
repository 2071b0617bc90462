"""The live page of a gateway: one file of HTML that asks ``/admin/recent`` once a second. It holds no data itself."""

from functools import cache
from importlib.resources import files
from typing import Final

CONTENT_TYPE: Final = b"text/html; charset=utf-8"
HEADERS: Final = (
    b"content-security-policy: default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    b"connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'\r\n"
    b"x-content-type-options: nosniff\r\ncache-control: no-cache\r\n"
)
"""The page loads nothing, is framed by nobody and talks to the gateway alone."""


@cache
def page() -> bytes:
    """The page."""
    return files("block.dashboard").joinpath("page.html").read_bytes()
