"""What watches a run from beside it."""

from burnish.monitors.early_stop import EarlyStop, EarlyStopConfig

__all__ = ["EarlyStop", "EarlyStopConfig"]
