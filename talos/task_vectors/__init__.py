"""Task vectors: what fine-tuning changed, as a small value to add, scale and apply."""

from .resident import ResidentVectors
from .vector import TaskVector

__all__ = ["ResidentVectors", "TaskVector"]
