"""Who decides how many instances there should be: pure functions of what was seen, and the one guard around them."""

from block.autoscale.controllers.guard import Guard, Memory, bounded
from block.autoscale.controllers.table import CONTROLLERS, controller_from, controller_names, guard_for

__all__ = ["CONTROLLERS", "Guard", "Memory", "bounded", "controller_from", "controller_names", "guard_for"]
