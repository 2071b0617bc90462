"""Latency against load, 20 to 36 requests/s: TTFT, end-to-end latency and preemptions of each policy, lengths estimated.

Published: the figure of request metrics under different QPS, and its table; figures are at 30 requests/s.
"""

import paper
from block.simulate.sweep import varied

POLICIES = ["random", "round-robin", "min-qpm", "infaas++", "llumnix-minus", "block-k:k=2", "block-paper"]
RATES = [20, 22, 24, 26, 28, 29, 30, 31, 32, 34, 36]
PUBLISHED_AT_30 = {
    # policy: mean E2E, P99 E2E, TTFT P50, TTFT P99, in seconds
    "block-paper": (10.92, 33.41, 0.284, 2.38),
    "block-k:k=2": (10.78, 32.90, 0.321, 2.53),
    "llumnix-minus": (10.94, 33.56, 0.338, 2.69),
}
FIGURES = ["e2e_s_mean", "e2e_s_p99", "ttft_s_p50", "ttft_s_p99"]
MORE = ["ttft_s_mean", "preemptions"]
HEAD_AT_30 = [
    "policy, at 30 requests/s",
    "mean E2E, s",
    "P99 E2E, s",
    "TTFT P50, s",
    "TTFT P99, s",
    "mean TTFT, s",
    "preemptions",
]


def main() -> None:
    o = paper.options(__doc__, seeds=3)
    base = paper.setting("default", o, estimated=True)
    rates = [24, 30] if o.quick else RATES
    kept = paper.kept(o, "paper_latency", 2)
    found = {
        (p, q): _read(kept.get((p, str(q)))) or paper.means(o, varied(base, policy=p), q)
        for p in POLICIES
        for q in rates
    }
    rows = [[p, q, *(f"{found[p, q].get(name, 0):.4g}" for name in FIGURES + MORE)] for p in POLICIES for q in rates]
    paper.publish(
        o,
        "paper_latency",
        ["policy", "rate_rps", *FIGURES, *MORE],
        rows,
        (HEAD_AT_30, at_30(found)),
        figure="TTFT P99, mean end-to-end latency and preemptions from 20 to 36 requests/s",
    )
    panels = {
        label: {p: [(q, max(found[p, q].get(name, 0.0), 1e-3)) for q in rates] for p in POLICIES}
        for label, name in (
            ("TTFT P99, s", "ttft_s_p99"),
            ("mean E2E, s", "e2e_s_mean"),
            ("preemptions in a run", "preemptions"),
        )
    }
    marks = {
        "TTFT P99, s": {p: [(30, seen[3])] for p, seen in PUBLISHED_AT_30.items()},
        "mean E2E, s": {p: [(30, seen[0])] for p, seen in PUBLISHED_AT_30.items()},
    }
    paper.lines(o.figures / "paper_latency.svg", panels, "requests/s offered", log=["TTFT P99, s"], marks=marks)


def _read(row: list[str] | None) -> dict[str, float]:
    return {} if row is None else dict(zip(FIGURES + MORE, map(float, row[2:]), strict=True))


def at_30(found: dict[tuple[str, int], dict[str, float]]) -> list[list[str]]:
    """The document's lines: ours at 30 requests/s, and in brackets the published figure and the difference."""
    lines = []
    for policy in POLICIES:
        cells = []
        for i, name in enumerate(FIGURES):
            ours, seen = found[policy, 30][name], PUBLISHED_AT_30.get(policy)
            cells.append(paper.digits(ours) + (f" ({seen[i]:g}; {ours / seen[i] - 1:+.0%})" if seen else ""))
        lines.append([policy, *cells, *(paper.digits(found[policy, 30].get(name, 0)) for name in MORE)])
    return lines


if __name__ == "__main__":
    main()
