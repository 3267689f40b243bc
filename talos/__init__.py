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

from .activations import checkpoint_frozen_mlps, few_bit_backward
from .batches import choice_logits
from .calibration import calibrate, fisher_diag
from .errors import (
    TalosError,
    TalosOSError,
    TalosRuntimeError,
    TalosTypeError,
    TalosValueError,
)
from .frozen import hold_frozen
from .masks import Mask
from .optim import SparseAdam
from .task_vectors import ResidentVectors, TaskVector
from .training import FineTuneFinished, FineTuneStep, fine_tune

__all__ = [
    "FineTuneFinished",
    "FineTuneStep",
    "Mask",
    "ResidentVectors",
    "SparseAdam",
    "TalosError",
    "TalosOSError",
    "TalosRuntimeError",
    "TalosTypeError",
    "TalosValueError",
    "TaskVector",
    "calibrate",
    "checkpoint_frozen_mlps",
    "choice_logits",
    "few_bit_backward",
    "fine_tune",
    "fisher_diag",
    "hold_frozen",
]

try:
    __version__ = version("talos-sparse")
except PackageNotFoundError:  # used from a checkout that was not installed
    __version__ = "0+unknown"
