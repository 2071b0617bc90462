"""The capacity table: every policy in the published settings, beside the published figures and the pooled reference.

Published: capacity bars of the latency figure, the oracle figure and the table of other models and configurations. Lengths:
true ones, or estimated with the published estimator's error; policies that do not look at lengths are run once. (pooled):
the same hardware as one engine.
"""

import paper
from block.simulate.bound import pooled
from block.simulate.sweep import varied

BLIND = [
    "random",
    "round-robin",
    "min-qpm",
    "least-outstanding",
    "power-of-two",
    "infaas++",
    "llumnix-minus",
    "lmetric",
    "token-load",
]
SEEING = ["nosim", "block-k:k=2", "block-k:k=4", "block-k:k=8", "block-paper"]
TABLES = [
    ("default", "ttft_p99<=10"),
    ("default", "ttft_p99<=3"),
    ("batch-24", "ttft_p99<=3"),
    ("chunk-2048", "ttft_p99<=3"),
]
OTHER_MODEL = [("qwen2-7b", "ttft_p99<=3"), ("qwen2-7b", "ttft_p99<=10")]
OTHER_POLICIES = {"round-robin", "llumnix-minus", "block-k:k=2", "block-paper", "(pooled)"}
HEAD = ["setting", "criterion", "policy", "lengths", "requests/s", "95 % interval", "published", "difference"]
SHOWN_HEAD = [*HEAD[:1], *HEAD[2:4], "P99 <= 10 s", "published", "difference", "P99 <= 3 s", "published", "difference"]
START = {"batch-24": 25.0, "qwen2-7b": 60.0}


def measure(o: paper.Options, name: str, criterion: str, policy: str, lengths: str) -> list[str]:
    config = paper.setting(name, o, estimated=lengths == "estimated")
    config = pooled(config) if policy == "(pooled)" else varied(config, policy=policy)
    start = START.get(name, 30.0) * (
        12 if policy == "(pooled)" and not o.quick else 1
    )  # the pooled one counts as one instance
    found = paper.capacity(o, config, criterion, start_rps=start)
    published = paper.CAPACITY.get((name, criterion, policy, lengths))
    interval = f"{found.ci_low:.1f} - {found.ci_high:.1f}"
    row = [
        name,
        criterion,
        policy,
        lengths or "-",
        f"{found.capacity_rps:.1f}",
        interval,
        *paper.against(found.capacity_rps, published),
    ]
    print("  ".join(f"{cell:>14}" for cell in row), flush=True)
    return row


def wanted(o: paper.Options) -> list[tuple[str, str, str, str]]:
    """(setting, criterion, policy, lengths) of every line."""
    seeing = [
        (p, lengths) for p in SEEING for lengths in (("estimated", "true") if p in OTHER_POLICIES else ("estimated",))
    ]
    cells = []
    for name, criterion in TABLES + OTHER_MODEL:
        policies = [(p, "") for p in BLIND] + seeing + [("(pooled)", "")]
        if (name, criterion) not in TABLES[:2]:
            policies = [(p, lengths) for p, lengths in policies if p in OTHER_POLICIES]
        cells += [(name, criterion, policy, lengths) for policy, lengths in policies]
    return cells[::9] if o.quick else cells


def beside(rows: list[list[str]]) -> list[list[str]]:
    """The document's lines: a setting's two criteria beside each other."""
    places: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for name, criterion, policy, lengths, ours, interval, *published in rows:
        places.setdefault((name, policy, lengths), {})[criterion] = [f"{ours} ({interval})", *published]
    empty = ["", "", ""]
    return [
        [*key, *found.get("ttft_p99<=10", empty), *found.get("ttft_p99<=3", empty)] for key, found in places.items()
    ]


def main() -> None:
    o = paper.options(__doc__, seeds=5)
    kept = paper.kept(o, "paper_capacity", 4)
    rows = [kept.get((*cell[:3], cell[3] or "-")) or measure(o, *cell) for cell in wanted(o)]
    paper.publish(o, "paper_capacity", HEAD, rows, (SHOWN_HEAD, beside(rows)))


if __name__ == "__main__":
    main()
