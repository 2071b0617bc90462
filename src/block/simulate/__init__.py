"""Virtual clusters: the same engine model and policies as online, no waiting."""

from block.simulate.cluster import simulate
from block.simulate.config import SimulationConfig, load_config

__all__ = ["SimulationConfig", "load_config", "simulate"]
