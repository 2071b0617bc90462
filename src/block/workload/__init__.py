"""Workloads: when requests come and how long they are. Pure and seeded."""

from block.workload.offer import WorkloadConfig, offer
from block.workload.offered import Offered, PromptBlocks

__all__ = ["Offered", "PromptBlocks", "WorkloadConfig", "offer"]
