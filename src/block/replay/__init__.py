"""The open-loop load generator."""

from block.replay.client import ReplayOptions, replay

__all__ = ["ReplayOptions", "replay"]
