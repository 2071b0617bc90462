"""The same policies in another simulator, beside ours: 24 to 32 requests/s, true lengths, one seed.

The other one is Vidur's own cluster simulation of 12 x A30 Llama-2-7B (batch 48, chunk 512, 1052 blocks, attention profile
reconstructed), run for this project on the recorded ShareGPT lengths with a prototype of the forward simulation. Ours:
paper-default.toml.
"""

import paper
from block.simulate.sweep import varied

POLICIES = {
    "round-robin": "round-robin",
    "random": "random",
    "JSQ": "least-outstanding",
    "most free KV": "infaas++",
    "forward sim": "block-paper",
}
# (requests/s, policy): TTFT mean, TTFT P99, E2E mean, E2E P99 in seconds, preemptions.
VIDUR = {
    (24, "round-robin"): (0.289, 6.24, 9.81, 30.9, 327),
    (24, "random"): (0.425, 7.29, 10.06, 31.6, 595),
    (24, "JSQ"): (0.125, 1.24, 9.53, 29.9, 112),
    (24, "most free KV"): (0.106, 0.62, 9.59, 29.2, 23),
    (24, "forward sim"): (0.075, 0.48, 9.45, 29.1, 0),
    (28, "round-robin"): (1.413, 12.61, 11.90, 36.6, 1730),
    (28, "JSQ"): (0.460, 6.20, 10.70, 33.0, 749),
    (28, "most free KV"): (0.248, 4.76, 10.49, 32.1, 148),
    (28, "forward sim"): (0.080, 0.50, 10.17, 31.5, 13),
    (30, "round-robin"): (4.080, 20.72, 15.17, 44.4, 3186),
    (30, "JSQ"): (1.183, 9.67, 12.10, 36.9, 2011),
    (30, "most free KV"): (0.909, 19.15, 11.66, 36.4, 661),
    (30, "forward sim"): (0.110, 0.94, 10.69, 33.1, 507),
    (32, "round-robin"): (8.898, 34.42, 20.39, 56.1, 4103),
    (32, "JSQ"): (3.749, 19.69, 15.34, 43.1, 4081),
    (32, "most free KV"): (5.236, 40.20, 16.71, 57.4, 2721),
    (32, "forward sim"): (0.885, 5.63, 12.31, 36.8, 5509),
}
CAPACITY = {"round-robin": 21, "random": 20, "JSQ": 25, "most free KV": 26, "forward sim": 31}
"""Its requests/s at TTFT P99 <= 3 s."""
FIGURES = ["ttft_s_mean", "ttft_s_p99", "e2e_s_mean", "e2e_s_p99", "preemptions"]
HEAD = ["requests/s", "policy there", "here", "TTFT mean, s", "TTFT P99, s", "E2E mean, s", "E2E P99, s", "preempted"]


def main() -> None:
    o = paper.options(__doc__, seeds=1)
    base = paper.setting("default", o)
    rows, points, marks = [], {}, {}
    for (rate, name), theirs in list(VIDUR.items())[: 2 if o.quick else None]:
        ours = paper.means(o, varied(base, policy=POLICIES[name]), rate)
        cells = [
            f"{paper.digits(ours.get(figure, 0.0))} ({seen:g})" for figure, seen in zip(FIGURES, theirs, strict=True)
        ]
        rows.append([rate, name, POLICIES[name], *cells])
        points.setdefault(POLICIES[name], []).append((rate, ours["e2e_s_mean"]))
        marks.setdefault(POLICIES[name], []).append((rate, theirs[2]))
    for name, seen in list(CAPACITY.items())[: 1 if o.quick else None]:
        ours = paper.capacity(o, varied(base, policy=POLICIES[name]), "ttft_p99<=3", start_rps=seen).capacity_rps
        rows.append([f"capacity {ours:.1f} ({seen})", name, POLICIES[name], "", "3 (3)", "", "", ""])
    paper.publish(o, "paper_independent", HEAD, rows, figure="Mean end-to-end latency in both simulators")
    label = "mean E2E, s (crosses: the other simulator)"
    paper.lines(
        o.figures / "paper_independent.svg", {label: points}, "requests/s offered", marks={label: marks}, width=6
    )


if __name__ == "__main__":
    main()
