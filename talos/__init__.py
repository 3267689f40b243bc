"""Sparse fine-tuning for task arithmetic (TaLoS, arXiv 2504.02620).

Score every weight by the diagonal Fisher information, keep the fraction that matters least, train
only those, and edit models with the small task vectors that result:

    mask = talos.calibrate(model, batches, density=0.1)
    optimizer = talos.SparseAdam(model, mask, lr=1e-3)
    ...                                             # any training loop
    task_vector = optimizer.task_vector()
    task_vector.apply_(base_model, scale=0.4)
"""

from importlib.metadata import PackageNotFoundError, version

from talos import evaluation, merging, methods
from talos.batches import choice_logits
from talos.calibration import calibrate, fisher_diag
from talos.errors import (
    TalosError,
    TalosOSError,
    TalosRuntimeError,
    TalosTypeError,
    TalosValueError,
)
from talos.masks import Mask
from talos.merging import merge
from talos.optim import SparseAdam
from talos.task_vectors import Patch, ResidentVectors, TaskVector
from talos.training import FineTuneStep, fine_tune

__all__ = [
    "FineTuneStep",
    "Mask",
    "Patch",
    "ResidentVectors",
    "SparseAdam",
    "TalosError",
    "TalosOSError",
    "TalosRuntimeError",
    "TalosTypeError",
    "TalosValueError",
    "TaskVector",
    "calibrate",
    "choice_logits",
    "evaluation",
    "fine_tune",
    "fisher_diag",
    "merge",
    "merging",
    "methods",
]

try:
    __version__ = version("talos-sparse")
except PackageNotFoundError:  # used from a checkout that was not installed
    __version__ = "0+unknown"
