"""The memory of a training step: measured to the byte, predicted for a device, planned for a budget."""

from gradaccum.memory.follow import ROLES, Held
from gradaccum.memory.measure import MemoryReport, measure_memory
from gradaccum.memory.plan import MicroBatchPlan, plan_micro_batches
from gradaccum.memory.predict import PredictedMemory, predict_memory

__all__ = [
    "ROLES",
    "Held",
    "MemoryReport",
    "MicroBatchPlan",
    "PredictedMemory",
    "measure_memory",
    "plan_micro_batches",
    "predict_memory",
]
