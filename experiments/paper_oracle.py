"""What true lengths are worth to the published rule, asking 2 or all 12: capacity with estimated and with true lengths.

Published: the figure of oracle upper bounds (TTFT P99 <= 10 s). Capacities are those of paper_capacity.py's CSV where there is one.
"""

import paper

CRITERION = "ttft_p99<=10"
HEAD = [
    "policy",
    "estimated",
    "published",
    "difference",
    "true",
    "published",
    "difference",
    "worth of true lengths",
    "published",
]


def main() -> None:
    o = paper.options(__doc__, seeds=3)
    rows = []
    for policy in ("block-k:k=2", "block-paper"):
        cells, ours, theirs = [], [], []
        for lengths in ("estimated", "true"):
            found, _ = paper.tabled(o, "default", CRITERION, policy, lengths)
            published = paper.CAPACITY["default", CRITERION, policy, lengths]
            cells += [f"{found:.1f}", *paper.against(found, published)]
            ours.append(found)
            theirs.append(published)
        rows.append([policy, *cells, f"{ours[1] / ours[0] - 1:+.1%}", f"{theirs[1] / theirs[0] - 1:+.1%}"])
    paper.publish(o, "paper_oracle", HEAD, rows, figure="Capacity with estimated and with true lengths")
    pyplot = paper.drawing()
    figure, ax = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
    names = [row[0] for row in rows]
    shown = (
        ("true, ours", 4, "C0o"),
        ("true, published", 5, "C0x"),
        ("estimated, ours", 1, "C1o"),
        ("estimated, published", 2, "C1x"),
    )
    for name, column, style in shown:
        ax.plot(names, [float(row[column]) for row in rows], style, label=name)
    ax.set(ylabel="capacity, requests/s")
    ax.margins(x=0.5)
    ax.grid(alpha=0.3)
    ax.legend(fontsize="x-small", loc="center")
    paper.save(figure, o.figures / "paper_oracle.svg")


if __name__ == "__main__":
    main()
