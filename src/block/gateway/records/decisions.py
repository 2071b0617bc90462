"""The last decisions, each with what was known, what was chosen and what came of it: ``GET /v1/decisions/{id}``."""

from typing import TYPE_CHECKING, Any

import msgspec

from block.core import Decision
from block.gateway.deciding.residuals import Interval

if TYPE_CHECKING:
    from block.errors import BlockError
    from block.gateway.exchange import Exchange


class _Record:
    __slots__ = ("decision", "interval", "outcome", "request")

    def __init__(self, decision: Decision, request: Any, interval: Interval | None) -> None:
        self.decision, self.request, self.interval = decision, request, interval
        self.outcome: dict[str, Any] | None = None


class Decisions:
    """A bounded ring by request id; of a request sent twice the last decision."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._records: dict[str, _Record] = {}

    def note(self, exchange: "Exchange") -> None:
        """A decision was made."""
        if not self._kept or exchange.decision is None:
            return
        records = self._records
        if len(records) >= self._kept:
            del records[next(iter(records))]
        records[exchange.request.id] = _Record(exchange.decision, exchange.request, exchange.interval)

    def finish(self, exchange: "Exchange", error: "BlockError | None") -> None:
        """What came of it."""
        record = self._records.get(exchange.request.id)
        if record is None:
            return
        first_s, ended_s = exchange.first_byte_s, exchange.answered_s
        record.outcome = {
            "status": exchange.status or None,
            "error": str(error) if error else None,
            "attempts": exchange.attempts,
            "overhead_s": exchange.overhead_s,
            "ttft_s": first_s - exchange.arrived_s if first_s and exchange.sse else None,
            "e2e_s": ended_s - exchange.arrived_s if ended_s else None,
        }
        if record.request.prompt is not None:
            record.request = msgspec.structs.replace(record.request, prompt=None)  # prompts are not kept

    def explain(self, request_id: str) -> bytes | None:
        """One decision as JSON, ``None`` where it is not (or no longer) kept."""
        record = self._records.get(request_id)
        if record is None:
            return None
        decision, request = record.decision, record.request
        return msgspec.json.encode(
            {
                "id": request_id,
                "object": "decision",
                "request": {
                    "arrived_s": request.arrived_s, "model": request.model, "prompt_tokens": request.prompt_tokens,
                    "max_tokens": request.max_tokens, "slo": request.slo,
                },
                "policy": decision.policy,
                "evidence": decision.evidence,
                "fallback": decision.fallback,
                "chosen": decision.instance,
                "interval": record.interval and _rounded(record.interval),
                "candidates": [
                    {"instance": c.instance, "cost": cost, "load": c.load, "prediction": _rounded(c.prediction)}
                    for c, cost in zip(decision.candidates, decision.costs, strict=True)
                ],
                "outcome": record.outcome,
            }
        )  # fmt: skip


def _rounded(seconds: msgspec.Struct | None) -> Any:
    if seconds is None:
        return None
    fields = msgspec.structs.asdict(seconds)
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in fields.items()}
