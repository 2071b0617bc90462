"""The running autoscaler: observe, decide, guard, act, explain; everything around the pure controllers that waits."""
