"""Task vectors: what fine-tuning changed, as a small value to add, scale and apply."""

from talos.task_vectors.patches import Patch
from talos.task_vectors.resident import ResidentVectors
from talos.task_vectors.vector import TaskVector

__all__ = ["Patch", "ResidentVectors", "TaskVector"]
