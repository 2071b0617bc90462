"""Finished requests as JSON lines, for ``block length train``: written by a thread of its own, rotated, prompts off by default.

The event loop puts a row on a bounded queue and is done; a thread makes and writes the lines. A row that finds the queue full is
dropped and counted, and so is what a disk does not take: the log is a sample, never a brake.
"""

import hashlib
import logging
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import msgspec

from block.core import Request
from block.errors import ConfigError
from block.gateway.exchange import Exchange
from block.gateway.records.metrics import Metrics
from block.length.data.records import features_row, prompt_key
from block.length.prompt.features import features_of
from block.length.prompt.text import request_text, split_chat

Prompts = Literal["off", "features", "full"]
"""What is kept of a prompt: nothing; counts and hashed words, from which no sentence can be read; its text."""

WRITE_EVERY_S: Final = 0.2
WAITING_MAX: Final = 20_000
BYTES_WAITING_MAX: Final = 32 << 20
BODY_BYTES_MAX: Final = 256 << 10
"""Prompts of larger bodies are left out: to parse them would hold up the event loop."""

_SALT: Final = os.urandom(16)

log = logging.getLogger("block.gateway")


class _Row(NamedTuple):
    at_s: float
    request: Request
    output_tokens: int
    expected_tokens: int
    instance: str
    ttft_s: float | None
    e2e_s: float
    body: bytes | None


class RequestLog:
    """``note`` is called by the event loop, everything else happens in the thread. Close it to have the last rows written.

    ``path``: ``requests.jsonl``; full files become ``requests.1.jsonl`` (the newest of them), ``requests.2.jsonl`` ...

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(
        self, path: str, metrics: Metrics, *, prompts: Prompts = "off", bytes_max: int = 64 << 20, files_max: int = 4
    ) -> None:
        self._path, self._prompts = Path(path), prompts
        self._bytes_max, self._files_max = max(bytes_max, 1), max(files_max, 1)
        self._rows: deque[_Row] = deque()
        self._bytes_in = self._bytes_out = 0  # of bodies; each has one writer
        self._stop = threading.Event()
        self._broken = False
        self._written, self._dropped, self._failed = (
            metrics.log_rows.labels(result) for result in ("written", "dropped", "failed")
        )
        try:
            self._append(b"")
        except OSError as error:
            raise ConfigError(f"The request log {path} cannot be written: {error.strerror or error}.") from error
        self._thread: threading.Thread | None = None

    def note(self, exchange: Exchange, output_tokens: int, ttft_s: float | None) -> None:
        """Log one whole answer. Takes a microsecond, whatever the disk does."""
        body = exchange.http.body if self._prompts != "off" and len(exchange.http.body) <= BODY_BYTES_MAX else None
        size = len(body) if body is not None else 0
        if len(self._rows) >= WAITING_MAX or self._bytes_in - self._bytes_out + size > BYTES_WAITING_MAX:
            self._dropped.inc()
            return
        self._bytes_in += size
        instance = exchange.instance.id if exchange.instance is not None else ""
        e2e_s = exchange.answered_s - exchange.arrived_s
        row = _Row(time.time(), exchange.request, output_tokens, exchange.expected_total, instance, ttft_s, e2e_s, body)
        self._rows.append(row)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="request-log", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Write what waits and end the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    # The thread

    def _work(self) -> None:
        while not self._stop.wait(WRITE_EVERY_S):
            self._write()
        self._write()

    def _write(self) -> None:
        while self._rows:
            lines: list[bytes] = []
            while self._rows and len(lines) < 256:
                row = self._rows.popleft()
                self._bytes_out += len(row.body or b"")
                lines.append(msgspec.json.encode(_fields(row, self._prompts)))
            try:
                self._append(b"\n".join(lines) + b"\n")
            except OSError as error:
                self._failed.inc(len(lines))
                if not self._broken:
                    log.error("the request log %s cannot be written: %s", self._path, error)
                self._broken = True
            else:
                self._written.inc(len(lines))
                self._broken = False

    def _append(self, data: bytes) -> None:
        if self._path.exists() and self._path.stat().st_size + len(data) > self._bytes_max:
            self._rotate()
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)

    def _rotate(self) -> None:
        names = [self._path, *(self._numbered(n) for n in range(1, self._files_max))]
        for older, newer in zip(reversed(names[1:]), reversed(names[:-1]), strict=True):
            if newer.exists():
                newer.replace(older)
        if len(names) == 1:
            self._path.unlink()

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.stem}.{number}{self._path.suffix}")


def _fields(row: _Row, prompts: Prompts) -> dict[str, Any]:
    request = row.request
    fields: dict[str, Any] = {
        "at_s": round(row.at_s, 3), "model": request.model, "prompt_tokens": request.prompt_tokens,
        "max_tokens": request.max_tokens, "output_tokens": row.output_tokens, "expected_tokens": row.expected_tokens,
        "exact_output": request.exact_output, "client": _hashed(request.client), "instance": row.instance,
        "ttft_s": None if row.ttft_s is None else round(row.ttft_s, 6), "e2e_s": round(row.e2e_s, 6),
    }  # fmt: skip
    text = _text(row.body)
    if text and prompts == "features":
        features = features_of(text, request.max_tokens)
        fields["features"] = features_row(features)
        fields["prompt_hash"] = hashlib.blake2b(prompt_key(text).encode("utf-8", "replace"), digest_size=8).hexdigest()
    elif text:
        spoken = split_chat(text)
        if len(spoken) == 1 and not text.startswith("\x1e"):
            fields["prompt"] = _encodable(text)
        else:
            fields["messages"] = [{"role": role, "content": _encodable(content)} for role, content in spoken]
    return fields


def _hashed(client: str | None) -> str | None:
    """A client's name that cannot be found out by trying names: it holds for one run of the gateway."""
    return None if client is None else hashlib.blake2b(client.encode(), digest_size=6, key=_SALT).hexdigest()


def _text(body: bytes | None) -> str:
    if body is None:
        return ""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    return request_text(fields) if isinstance(fields, dict) else ""


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
