"""Bursty arrivals: gamma gaps of shape 0.25 to 2 at 30 requests/s, and their capacity at TTFT P99 <= 3 s, lengths estimated.

Published: the burstiness figure (shape 1 is Poisson, below is burstier), capacities within 1 % over the shapes. The last
line adds on/off phases of 10 s with a quarter of the rate when off, which no gamma process makes: overload that lasts.
"""

import msgspec

import paper
from block.simulate import SimulationConfig
from block.simulate.sweep import varied

SHAPES = [0.25, 0.5, 1.0, 2.0]
POLICIES = ["llumnix-minus", "block-k:k=2", "block-paper"]
PUBLISHED = {0.25: 30.8, 0.5: 31.0, 1.0: 31.1, 2.0: 31.2}
"""Capacity at TTFT P99 <= 3 s of block, asking all, as the artifact's summary of results states it."""
HEAD = [
    "arrivals",
    "policy",
    "requests/s at TTFT P99 <= 3 s",
    "published",
    "difference",
    "TTFT P99 at 30/s, s",
    "mean E2E at 30/s, s",
]


def main() -> None:
    o = paper.options(__doc__, seeds=3)
    base = paper.setting("default", o, estimated=True)
    processes = {f"gamma, shape {a:g}": {"arrivals": "gamma", "gap_cv2": 1 / a} for a in SHAPES}
    processes["on/off 10 s"] = {"arrivals": "bursts", "on_s": 10.0, "off_s": 10.0, "quiet_fraction": 0.25}
    kept = paper.kept(o, "paper_burstiness", 2)
    rows, points = [], {policy: [] for policy in POLICIES}
    for (name, change), shape in zip(processes.items(), [*SHAPES, None], strict=True):
        for policy in POLICIES:
            workload = msgspec.structs.replace(base.workload, **change)
            config = varied(msgspec.structs.replace(base, workload=workload), policy=policy)
            row = kept.get((name, policy)) or line(o, name, config, shape if policy == "block-paper" else None)
            rows.append(row)
            if shape is not None:
                points[policy].append((shape, float(row[2])))
    paper.publish(o, "paper_burstiness", HEAD, rows, figure="Capacity against the shape of the gaps")
    label = "capacity, requests/s"
    marks = {label: {"block-paper": list(PUBLISHED.items())}}
    paper.lines(
        o.figures / "paper_burstiness.svg", {label: points}, "gamma shape of the gaps (1: Poisson)", marks=marks
    )


def line(o: paper.Options, name: str, config: SimulationConfig, shape: float | None) -> list[str]:
    found, at_30 = paper.capacity(o, config, "ttft_p99<=3").capacity_rps, paper.means(o, config, 30.0)
    published = None if shape is None else PUBLISHED[shape]
    seconds = [f"{at_30['ttft_s_p99']:.2f}", f"{at_30['e2e_s_mean']:.2f}"]
    return [name, config.policy, f"{found:.1f}", *paper.against(found, published), *seconds]


if __name__ == "__main__":
    main()
