"""Would shorter answers explain Qwen2-7B's published capacities? Its answers' lengths are not published.

The publication let each served model answer the prompts itself and forced those lengths. Known are Llama-2-7B's (the shipped
table); here the table's outputs are shortened by a factor for Qwen2-7B, one factor for all six published capacities.
"""

import tempfile
from pathlib import Path

import msgspec

import paper
from block.simulate.sweep import varied
from block.workload.length_table import load_lengths

FACTORS = [1.0, 0.9, 0.85]
CELLS = [
    ("llumnix-minus", "", "ttft_p99<=3"),
    ("block-paper", "estimated", "ttft_p99<=3"),
    ("block-paper", "true", "ttft_p99<=3"),
    ("llumnix-minus", "", "ttft_p99<=10"),
    ("block-k:k=2", "estimated", "ttft_p99<=10"),
    ("block-k:k=2", "true", "ttft_p99<=10"),
]


def main() -> None:
    o = paper.options(__doc__, seeds=2)
    table = load_lengths("sharegpt")
    rows = [
        ["published", *(f"{paper.CAPACITY['qwen2-7b', criterion, p, lengths]:g}" for p, lengths, criterion in CELLS)]
    ]
    with tempfile.TemporaryDirectory() as folder:
        for factor in FACTORS[:1] if o.quick else FACTORS:
            path = Path(folder) / f"sharegpt-{factor}.json"
            shorter = msgspec.structs.replace(table, output=[[at * factor for at in bin_] for bin_ in table.output])
            path.write_bytes(msgspec.json.encode(shorter))
            rows.append(
                [f"answers x {factor:g}", *(cell(o, path, *one) for one in (CELLS[:1] * 6 if o.quick else CELLS))]
            )
            print("  ".join(rows[-1]), flush=True)
    head = [
        "Qwen2-7B",
        *(f"{p}, {lengths + ', ' if lengths else ''}P99 <= {criterion[10:]} s" for p, lengths, criterion in CELLS),
    ]
    paper.publish(o, "paper_qwen", head, rows)


def cell(o: paper.Options, path: Path, policy: str, lengths: str, criterion: str) -> str:
    config = paper.setting("qwen2-7b", o, estimated=lengths == "estimated")
    config = msgspec.structs.replace(config, workload=msgspec.structs.replace(config.workload, lengths=str(path)))
    found = paper.capacity(o, varied(config, policy=policy), criterion, start_rps=62.0).capacity_rps
    return f"{found:.1f} ({paper.against(found, paper.CAPACITY['qwen2-7b', criterion, policy, lengths])[1]})"


if __name__ == "__main__":
    main()
