"""Rows -> one summary: latencies, failures, SLO attainment, goodput, lateness."""

from collections.abc import Sequence

import msgspec
import numpy as np

from block.core import Slo
from block.metrics.row import Row


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one run. Latencies are over finished requests, in seconds; ``None``: there is none to measure.

    ``slo_attainment_fraction`` divides by all requests offered, failed ones included; ``goodput_rps`` counts those that
    met their targets, per second of the run. ``lateness_s``: sent minus intended, the load generator's own delay.
    ``requests_rps``: finished requests per second, from the first intended send to the last end.
    """

    requests: int
    finished: int
    failed: int
    rejected: int
    ttft_s_mean: float | None
    ttft_s_p50: float | None
    ttft_s_p90: float | None
    ttft_s_p99: float | None
    e2e_s_mean: float | None
    e2e_s_p50: float | None
    e2e_s_p99: float | None
    tpot_s_mean: float | None
    tpot_s_p50: float | None
    tpot_s_p99: float | None
    preemptions: int | None
    duration_s: float
    requests_rps: float
    output_tokens_per_s: float
    slo_attainment_fraction: float | None
    goodput_rps: float | None
    lateness_s_p50: float
    lateness_s_p99: float


def summarize(rows: Sequence[Row], slo: Slo | None = None, *, warmup_fraction: float = 0.0) -> Summary:
    """Sum up a run. ``warmup_fraction`` of the requests, the first ones intended, are left out of everything.

    Percentiles interpolate linearly between order statistics. Without an ``slo`` attainment and goodput are ``None``.
    """
    rows = sorted(rows, key=lambda row: row.intended_s)[int(len(rows) * warmup_fraction) :]
    done = [row for row in rows if row.status == "finished"]
    ends_s = [row.finished_s for row in rows if row.finished_s is not None]
    duration_s = max(ends_s) - rows[0].intended_s if ends_s else 0.0
    per_s = 1.0 / duration_s if duration_s > 0 else 0.0
    within = sum(meets(row, slo) for row in rows) if slo is not None else None
    preemptions = [row.preemptions for row in rows if row.preemptions is not None]
    ttft, e2e, tpot = (
        [v for row in done if (v := getattr(row, name)) is not None] for name in ("ttft_s", "e2e_s", "tpot_s")
    )
    late = [row.sent_s - row.intended_s for row in rows]
    return Summary(
        requests=len(rows), finished=len(done),
        failed=sum(row.status == "failed" for row in rows), rejected=sum(row.status == "rejected" for row in rows),
        ttft_s_mean=_mean(ttft), ttft_s_p50=percentile(ttft, 50), ttft_s_p90=percentile(ttft, 90),
        ttft_s_p99=percentile(ttft, 99),
        e2e_s_mean=_mean(e2e), e2e_s_p50=percentile(e2e, 50), e2e_s_p99=percentile(e2e, 99),
        tpot_s_mean=_mean(tpot), tpot_s_p50=percentile(tpot, 50), tpot_s_p99=percentile(tpot, 99),
        preemptions=sum(preemptions) if preemptions else None,
        duration_s=duration_s, requests_rps=len(done) * per_s,
        output_tokens_per_s=sum(row.output_tokens for row in done) * per_s,
        slo_attainment_fraction=None if within is None or not rows else within / len(rows),
        goodput_rps=None if within is None else within * per_s,
        lateness_s_p50=percentile(late, 50) or 0.0, lateness_s_p99=percentile(late, 99) or 0.0,
    )  # fmt: skip


def meets(row: Row, slo: Slo) -> bool:
    """Whether a request finished within all targets. A latency that does not exist (TPOT of one token) is within."""
    if row.status != "finished":
        return False
    pairs = ((row.ttft_s, slo.ttft_s), (row.tpot_s, slo.tpot_s), (row.e2e_s, slo.e2e_s))
    return all(target is None or seconds is None or seconds <= target for seconds, target in pairs)


def percentile(values: Sequence[float], q: float) -> float | None:
    """The q-th percentile (0-100), ``None`` of nothing."""
    return float(np.percentile(values, q)) if len(values) else None


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
