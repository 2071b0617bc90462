"""What the auto-provisioning experiments share: where results go, one printed line a run."""

from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent


def line(row: Mapping[str, object]) -> str:
    """A result on one line."""
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    )
