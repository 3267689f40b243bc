"""`SparseAdam`: AdamW that trains, and keeps state for, the selected entries of a model only."""

from talos.optim.reduction import average_gradients, reduce_selected
from talos.optim.sparse_adam import SparseAdam

__all__ = ["SparseAdam", "average_gradients", "reduce_selected"]
