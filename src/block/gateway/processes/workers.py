"""Several processes, one gateway: they share the port and nothing else, and ask each other over sockets of their own.

Each worker decides alone, as several gateways on several hosts would. Three things are put together when somebody asks: the
metrics (one scrape, whoever answers it), a decision (whoever made it) and what came lately. One is told to all: a change of the
members by the admin API; a worker that starts later asks the others for those. The sockets lie in a directory that only this
user can enter.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric

from block.errors import ClientError

Whole = tuple[int, bytes, bytes]
"""Status, body and content type of an answer."""
JSON: Final = b"application/json"
TIMEOUT_S: Final = 2.0
ANSWER_BYTES_MAX: Final = 64 << 20
_SUMMED: Final = frozenset(
    {
        "block_inflight_requests", "block_inflight_tokens", "block_flow_control_queue_size", "block_client_connections",
        "block_flow_control_held_requests", "block_unseen_requests", "block_workers", "block_event_loop_tasks",
    }
)  # fmt: skip
_LEAST: Final = frozenset({"block_ready_endpoints", "block_worker_health"})
_MEAN: Final = ("block_prediction_interval_coverage_ratio", "block_prediction_bias_ratio", "block_length_")


class Sample(msgspec.Struct, array_like=True):
    name: str
    labels: dict[str, str]
    value: float


class Family(msgspec.Struct, array_like=True):
    """One metric of one worker."""

    name: str
    documentation: str
    kind: str
    samples: list[Sample]


class Changes(msgspec.Struct):
    """What the admin API changed since the start, for a worker that starts later. ``joined`` are instances as configured."""

    joined: list[msgspec.Raw] = []
    draining: list[str] = []
    dismissed: list[str] = []


class Workers:
    """The others, as one of ``count`` workers sees them; this one is ``index``."""

    def __init__(self, directory: Path, index: int, count: int) -> None:
        self.directory, self.index, self.count = directory, index, count
        self.orphaned = False
        """The supervisor is gone, so nobody else clears up."""
        self._sessions: dict[int, aiohttp.ClientSession] = {}

    @property
    def socket(self) -> Path:
        """Where this one listens for the others."""
        return self.directory / f"{self.index}.sock"

    async def close(self) -> None:
        for session in self._sessions.values():
            await session.close()
        if self.orphaned:
            self.socket.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not the last one
                self.directory.rmdir()

    async def changes(self) -> Changes | None:
        """What the admin API changed before this worker started; ``None``: nobody is there to tell."""
        for answer in await self._ask_all("GET", "/admin/changes"):
            if answer is not None and answer[0] == 200:
                return msgspec.json.decode(answer[1], type=Changes)
        return None

    async def metrics(self, own: bytes) -> Whole:
        """All workers' metrics as Prometheus text; a worker that does not answer in time is left out, and ``workers`` says so."""
        answers = await self._ask_all("GET", "/metrics")
        bodies = [own, *(answer[1] for answer in answers if answer is not None and answer[0] == 200)]
        text = await asyncio.get_running_loop().run_in_executor(None, merged_text, bodies)
        return 200, text, CONTENT_TYPE_LATEST.encode()

    async def find(self, path: str, missing: ClientError) -> Whole:
        """What another worker knows under a path.

        Raises:
            ClientError: ``missing``, none of them does.
        """
        for answer in await self._ask_all("GET", path):
            if answer is not None and answer[0] == 200:
                return 200, answer[1], JSON
        raise missing

    async def tell(self, method: str, path: str, body: bytes, *, answer: tuple[int, bytes]) -> Whole:
        """Have the others do what was done here; the answer says how many of them did."""
        told = await self._ask_all(method, path, body)
        done = 1 + sum(1 for each in told if each is not None and (each[0] < 300 or each[0] in (404, 409)))
        fields = msgspec.json.decode(answer[1]) | {"workers": self.count, "workers_told": done}
        return answer[0], msgspec.json.encode(fields), JSON

    async def recent(self, cursor: str, own: Callable[[str], Any]) -> Whole:
        """What came lately at all workers: numbers and cursors of each are kept apart."""
        cursors = dict(part.split(":", 1) for part in cursor.split("_") if ":" in part)
        if cursor and (not cursors or any(not n.isdigit() for n in cursors)):
            raise ClientError(400, "after must be the cursor of an earlier answer.", param="after")
        parts = {self.index: msgspec.to_builtins(own(cursors.get(str(self.index), "")))}
        others = [n for n in range(self.count) if n != self.index]
        asked = (self._ask(n, "GET", f"/admin/recent?after={cursors.get(str(n), '')}") for n in others)
        for n, answer in zip(others, await asyncio.gather(*asked), strict=True):
            if answer is not None and answer[0] == 200:
                parts[n] = msgspec.json.decode(answer[1])
        return 200, msgspec.json.encode(_merged_recent(parts, cursors)), JSON

    async def _ask_all(self, method: str, path: str, body: bytes = b"") -> list[tuple[int, bytes] | None]:
        others = (n for n in range(self.count) if n != self.index)
        return list(await asyncio.gather(*(self._ask(n, method, path, body) for n in others)))

    async def _ask(self, other: int, method: str, path: str, body: bytes = b"") -> tuple[int, bytes] | None:
        session = self._sessions.get(other)
        if session is None:
            connector = aiohttp.UnixConnector(path=str(self.directory / f"{other}.sock"))
            session = self._sessions[other] = aiohttp.ClientSession(
                connector=connector, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)
            )
        try:
            async with session.request(method, f"http://worker{path}", data=body or None) as answer:
                return answer.status, await answer.content.read(ANSWER_BYTES_MAX)
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None


def families_of(registry: CollectorRegistry) -> bytes:
    """A worker's metrics for another worker."""
    families = [
        Family(m.name, m.documentation, m.type, [Sample(s.name, dict(s.labels), float(s.value)) for s in m.samples])
        for m in registry.collect()
    ]
    return msgspec.msgpack.encode(families)


class _Merged(CollectorRegistry):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        super().__init__()
        self._metrics = list(metrics)

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def merged_text(bodies: list[bytes]) -> bytes:
    """Prometheus text of several workers' metrics, each as ``families_of`` gives them.

    Counters, histograms and what is counted in pieces are summed; of states the worst is taken, of shares the mean.
    """
    families: dict[str, Family] = {}
    values: dict[tuple[str, str, tuple[tuple[str, str], ...]], list[float]] = {}
    for body in bodies:
        for family in msgspec.msgpack.decode(body, type=list[Family]):
            families.setdefault(family.name, family)
            for sample in family.samples:
                key = family.name, sample.name, tuple(sorted(sample.labels.items()))
                values.setdefault(key, []).append(sample.value)
    metrics = {name: Metric(name, family.documentation, family.kind) for name, family in families.items()}
    for (name, sample_name, labels), each in values.items():
        metrics[name].add_sample(sample_name, dict(labels), _combined(name, families[name].kind, sample_name, each))
    return generate_latest(_Merged(metrics.values()))


def _combined(name: str, kind: str, sample_name: str, values: list[float]) -> float:
    if sample_name.endswith("_created") or name in _LEAST:
        return min(values)
    if kind in ("counter", "histogram", "summary") or name in _SUMMED:
        return sum(values)
    return sum(values) / len(values) if name.startswith(_MEAN) else max(values)


def _merged_recent(parts: dict[int, Any], cursors: dict[str, str]) -> dict[str, Any]:
    first = parts[min(parts)]
    merged: dict[str, Any] = {
        "at_s": first["at_s"],
        "missed": 0,
        "arrivals": [],
        "sent": [],
        "ends": [],
        "in_flight": 0,
        "queued": 0,
    }
    instances: dict[str, Any] = {}
    for n, part in parts.items():
        cursors[str(n)] = part["cursor"]
        for name in ("missed", "in_flight", "queued"):
            merged[name] += part[name]
        for name in ("arrivals", "sent", "ends"):  # numbers of one worker mean nothing to another
            merged[name] += [[(n << 48) + row[0], *row[1:]] for row in part[name]]
        for seen in part["instances"]:
            known = instances.setdefault(seen["name"], seen)
            if known is not seen:
                known["in_flight"] += seen["in_flight"]
    for name in ("arrivals", "sent", "ends"):
        merged[name].sort(key=lambda row: row[1])
    merged["instances"] = list(instances.values())
    merged["cursor"] = "_".join(f"{n}:{cursor}" for n, cursor in sorted(cursors.items()))
    return merged
