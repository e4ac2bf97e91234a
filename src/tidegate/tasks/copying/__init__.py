"""Copying: what was seen is written down later, across a gap. A test of long memory, not of capacity."""

from tidegate.tasks.copying.data import bit_copy, copying, lagged_copying, selective_copying

__all__ = ["bit_copy", "copying", "lagged_copying", "selective_copying"]
