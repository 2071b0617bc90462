"""Workloads: when requests come and how long they are. Pure and seeded."""

from block.core import PromptBlocks
from block.workload.offer import WorkloadConfig, offer
from block.workload.offered import Offered

__all__ = ["Offered", "PromptBlocks", "WorkloadConfig", "offer"]
