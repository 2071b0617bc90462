"""The last decisions, each with what was known, what was chosen and what came of it: ``GET /v1/decisions/{id}``."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from block.core import Decision, InstanceId

if TYPE_CHECKING:
    from block.errors import BlockError
    from block.gateway.exchange import Exchange


class _Record:
    __slots__ = ("asked", "decision", "interval", "left_out", "outcome", "request")

    def __init__(self, exchange: "Exchange", decision: Decision, left_out: Mapping[InstanceId, str]) -> None:
        self.decision, self.request, self.interval = decision, exchange.request, exchange.interval
        self.asked, self.left_out = exchange.asked.only, left_out
        self.outcome: dict[str, Any] | None = None


class Decisions:
    """A bounded ring by request id; of a request sent twice the last decision."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._records: dict[str, _Record] = {}

    def note(self, exchange: "Exchange", left_out: Mapping[InstanceId, str]) -> None:
        """A decision was made. ``left_out``: instances that were out of the question, and why."""
        if not self._kept or exchange.decision is None:
            return
        records = self._records
        if len(records) >= self._kept:
            del records[next(iter(records))]
        records[exchange.request.id] = _Record(exchange, exchange.decision, left_out)

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
        return None if record is None else self._told(record)

    def described(self, exchange: "Exchange", left_out: Mapping[InstanceId, str]) -> bytes:
        """A decision that is not kept, as JSON."""
        assert exchange.decision is not None
        return self._told(_Record(exchange, exchange.decision, left_out))

    @staticmethod
    def _told(record: _Record) -> bytes:
        decision, request = record.decision, record.request
        return msgspec.json.encode(
            {
                "id": request.id,
                "object": "decision",
                "request": {
                    "arrived_s": request.arrived_s, "model": request.model, "prompt_tokens": request.prompt_tokens,
                    "max_tokens": request.max_tokens, "slo": request.slo, "priority": request.priority,
                    "session": request.session, "instances": record.asked and sorted(record.asked),
                },
                "why": _why(decision),
                "policy": decision.policy,
                "evidence": decision.evidence,
                "fallback": decision.fallback,
                "chosen": decision.instance,
                "interval": record.interval and _rounded(record.interval),
                "candidates": [
                    {"instance": c.instance, "cost": cost, "load": c.load, "prediction": _rounded(c.prediction)}
                    for c, cost in zip(decision.candidates, decision.costs, strict=True)
                ],
                "left_out": record.left_out,
                "outcome": record.outcome,
            }
        )  # fmt: skip


def _why(decision: Decision) -> str:
    """In one sentence."""
    among = len(decision.candidates)
    if among == 1:
        text = "It was alone on the policy's shortlist"
    elif decision.evidence == "nothing":
        text = f"It was drawn among {among} candidates"
    else:
        costs = decision.costs
        equal = costs.count(min(cost for cost in costs if cost is not None))
        drawn = f", drawn among {equal} of that cost" if equal > 1 else ""
        text = f"It had the lowest cost of {among} candidates by {decision.evidence}{drawn}"
    return f"{text}." if decision.fallback is None else f"{text}; the policy fell back ({decision.fallback})."


def _rounded(seconds: msgspec.Struct | None) -> Any:
    if seconds is None:
        return None
    fields = msgspec.structs.asdict(seconds)
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in fields.items()}
