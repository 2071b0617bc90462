"""How many instances to ask: k = 2, 4, 8 or all 12 at random, by capacity and by latency at 30 requests/s, lengths estimated.

Published: the power-of-k figure. Capacities are those of paper_capacity.py's CSV where there is one.
"""

import paper
from block.simulate.sweep import varied

KS = [2, 4, 8, 12]
PUBLISHED_E2E_AT_30 = {2: 10.78, 12: 10.92}  # seconds, the mean
CRITERION = "ttft_p99<=10"
HEAD = [
    "k",
    "requests/s at TTFT P99 <= 10 s",
    "95 % interval",
    "published",
    "difference",
    "mean E2E at 30/s, s",
    "published",
    "TTFT P99 at 30/s, s",
]


def main() -> None:
    o = paper.options(__doc__, seeds=3)
    base = paper.setting("default", o, estimated=True)
    rows, points, seen = [], [], []
    for k in KS:
        policy = "block-paper" if k == 12 else f"block-k:k={k}"
        rate, interval = paper.tabled(o, "default", CRITERION, policy, "estimated")
        at_30 = paper.means(o, varied(base, policy=policy), 30.0)
        published = paper.CAPACITY["default", CRITERION, policy, "estimated"]
        e2e = PUBLISHED_E2E_AT_30.get(k)
        rows.append([
            k, f"{rate:.1f}", interval, *paper.against(rate, published),
            f"{at_30['e2e_s_mean']:.2f}", "" if e2e is None else f"{e2e:g}", f"{at_30['ttft_s_p99']:.2f}",
        ])  # fmt: skip
        points.append((k, rate))
        seen.append((k, published))
    paper.publish(o, "paper_choices", HEAD, rows, figure="Capacity against k")
    label = "capacity, requests/s"
    paper.lines(
        o.figures / "paper_choices.svg",
        {label: {"asked k at random": points}},
        "k",
        marks={label: {"asked k at random": seen}},
    )


if __name__ == "__main__":
    main()
