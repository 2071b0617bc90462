"""What the auto-provisioning experiments share: where results go, one printed line and one line of CSV a run."""

import csv
from collections.abc import Collection, Mapping
from pathlib import Path

HERE = Path(__file__).parent


def line(row: Mapping[str, object]) -> str:
    """A result on one line."""
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    )


def append(path: Path, row: Mapping[str, object], fields: Collection[str] | None = None) -> None:
    """Add a row to a CSV of ``fields`` (default: the row's own); the first one brings the header."""
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields or row.keys())
        if fresh:
            writer.writeheader()
        writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()})
