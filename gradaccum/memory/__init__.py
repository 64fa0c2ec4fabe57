"""What a training step holds in memory, measured to the byte."""

from gradaccum.memory.measure import ROLES, MemoryReport, measure_memory

__all__ = ["ROLES", "MemoryReport", "measure_memory"]
