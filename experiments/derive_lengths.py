"""Derive the shipped length tables from recorded traces: joint quantiles of (prompt, output) tokens.

usage: derive_lengths.py TRACES_FOLDER
(with sharegpt-lengths-10k.csv.gz, azure-2023-conv.csv.gz, azure-2023-code.csv.gz)
"""

import sys
from pathlib import Path

import msgspec
import numpy as np

from block.workload.length_table import SHIPPED, table_of
from block.workload.trace import read_trace

SOURCES = {
    "sharegpt": ("sharegpt-lengths-10k.csv.gz", "ShareGPT validation lengths, AKafakA/vidur_opt_scheduler, MIT"),
    "azure-conversation": (
        "azure-2023-conv.csv.gz",
        "Azure LLM inference trace 2023, Azure/AzurePublicDataset, CC BY 4.0",
    ),
    "azure-code": ("azure-2023-code.csv.gz", "Azure LLM inference trace 2023, Azure/AzurePublicDataset, CC BY 4.0"),
}


def main(folder: Path) -> None:
    for name, (file, source) in SOURCES.items():
        recorded = read_trace(folder / file)
        prompt, output = np.array([(r.prompt_tokens, max(r.output_tokens, 1)) for r in recorded]).T
        table = table_of(prompt, output, name=name, source=f"joint quantiles of {len(recorded)} requests: {source}")
        path = SHIPPED / f"{name}.json"
        path.write_bytes(msgspec.json.encode(table) + b"\n")
        drawn = table.draw(100_000, np.random.default_rng(1))
        print(f"{name}: {path.stat().st_size} bytes")
        for what, real, ours in (("prompt", prompt, drawn[0]), ("output", output, drawn[1])):
            print(f"  {what}: recorded {_figures(real)}; drawn {_figures(ours)}")
        print(f"  correlation: recorded {np.corrcoef(prompt, output)[0, 1]:.3f}, drawn {np.corrcoef(*drawn)[0, 1]:.3f}")


def _figures(lengths: np.ndarray) -> str:
    return f"mean {lengths.mean():.0f} P50 {np.median(lengths):.0f} P99 {np.quantile(lengths, 0.99):.0f}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
