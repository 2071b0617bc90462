"""Headers of the gateway's own that it reads (targets, priority, session, client) and writes (what was predicted)."""

import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Final

from block.core import Prediction, Slo
from block.errors import ClientError
from block.gateway.deciding.residuals import Interval
from block.gateway.wire.http1 import HttpRequest

_SLO_FIELDS: Final = (
    ("ttft_s", (b"x-slo-ttft-ms", b"x-llm-d-slo-ttft-ms")),
    ("tpot_s", (b"x-slo-tpot-ms", b"x-llm-d-slo-tpot-ms")),
    ("e2e_s", (b"x-slo-e2e-ms", b"x-llm-d-slo-e2e-ms")),
)
_SLO_NAMES: Final = frozenset(name for _, names in _SLO_FIELDS for name in names)
_SESSIONS: Final = (b"x-session-id", b"x-session-token", b"x-smg-routing-key")
_OBJECTIVES: Final = (b"x-llm-d-inference-objective", b"x-gateway-inference-objective")
_FAIRNESS: Final = (b"x-llm-d-inference-fairness-id", b"x-gateway-inference-fairness-id")
_PRIORITY: Final = b"x-priority"
_WHOLE: Final = re.compile(r"[+-]?\d{1,9}")


READ: Final = frozenset({*_SLO_NAMES, *_SESSIONS, *_OBJECTIVES, *_FAIRNESS, _PRIORITY})
"""Most requests have none of these: one look at all saves looking for each."""


def slo_of(http: HttpRequest) -> Slo | None:
    """The latency targets that the client set.

    Raises:
        ClientError: 400, one is no positive number of milliseconds.
    """
    if _SLO_NAMES.isdisjoint(http.fields):
        return None
    targets: dict[str, float] = {}
    for field, names in _SLO_FIELDS:
        for name in names:
            text = http.header(name)
            if text is None:
                continue
            try:
                milliseconds = float(text)
            except ValueError:
                milliseconds = -1.0
            if not 0 < milliseconds < 1e9:
                header = name.decode()
                raise ClientError(
                    400, f"The header {header} must be a positive number of milliseconds, not {text!r}.", param=header
                )
            targets[field] = milliseconds / 1e3
            break
    return Slo(**targets)


def priority_of(http: HttpRequest, objectives: Mapping[str, int]) -> int:
    """The priority of a request whose body names none: from its header, or of the objective it names. Lower goes first.

    Raises:
        ClientError: 400, the header is no whole number.
    """
    text = http.header(_PRIORITY)
    if text is not None:
        if not _WHOLE.fullmatch(text):
            raise ClientError(400, f"The header x-priority must be a whole number, not {text!r}.", param="x-priority")
        return int(text)
    if objectives:
        for name in _OBJECTIVES:
            objective = http.header(name)
            if objective is not None:
                return objectives.get(objective, 0)
    return 0


def session_of(http: HttpRequest) -> str | None:
    """What requests of one conversation share, where the client says it."""
    for name in _SESSIONS:
        if name in http.fields:
            return http.header(name)
    return None


def client_of(http: HttpRequest, user: bytes, key_name: str | None) -> str | None:
    """Which application sent it, as a hash: its fairness id, its ``user``, or its key's name; ``None``: not known."""
    for name in _FAIRNESS:
        if name in http.fields:
            return hashed(b"id:" + http.fields[name])
    if user:
        return hashed(b"user:" + user)
    return None if key_name is None else hashed(b"key:" + key_name.encode())


def hashed(name: bytes) -> str:
    """A name that tells clients apart and says nothing about them."""
    return blake2b(name, digest_size=8).hexdigest()


def prediction_lines(prediction: Prediction, interval: Interval | None, waited_s: float) -> bytes:
    """The header lines that say what was predicted: milliseconds from the request's arrival, intervals as LOW-HIGH.

    ``waited_s``: from its arrival to the decision, which predictions count from.
    """
    lines = b"x-predicted-ttft-ms: %.1f\r\nx-predicted-e2e-ms: %.1f\r\n" % (
        (waited_s + prediction.ttft_s) * 1e3,
        (waited_s + prediction.e2e_s) * 1e3,
    )
    if interval is None:
        return lines
    bands = b""
    if interval.ttft_low_s is not None and interval.ttft_high_s is not None:
        bands += b"x-predicted-ttft-interval-ms: %.1f-%.1f\r\n" % (
            (waited_s + interval.ttft_low_s) * 1e3,
            (waited_s + interval.ttft_high_s) * 1e3,
        )
    if interval.e2e_low_s is not None and interval.e2e_high_s is not None:
        bands += b"x-predicted-e2e-interval-ms: %.1f-%.1f\r\n" % (
            (waited_s + interval.e2e_low_s) * 1e3,
            (waited_s + interval.e2e_high_s) * 1e3,
        )
    return lines + bands + b"x-prediction-confidence: %g\r\n" % interval.level if bands else lines
