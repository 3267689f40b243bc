"""Sparse fine-tuning for task arithmetic (TaLoS, arXiv 2504.02620).

Score every weight by the diagonal Fisher information, keep the fraction that matters least, train
only those, and edit models with the small task vectors that result:

    mask = talos.calibrate(model, batches, density=0.1)
    optimizer = talos.SparseAdam(model, mask, lr=1e-3)
    ...                                             # any training loop
    task_vector = optimizer.task_vector()
    task_vector.apply_(base_model, scale=0.4)
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from talos.optim import SparseAdam, average_gradients, reduce_selected
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
    "average_gradients",
    "calibrate",
    "choice_logits",
    "evaluation",
    "fine_tune",
    "fisher_diag",
    "merge",
    "merging",
    "methods",
    "reduce_selected",
]

try:
    __version__ = version("talos-sparse")
except PackageNotFoundError:  # used from a checkout that was not installed
    __version__ = "0+unknown"

# Where the public names are; some rooms are public themselves.
_ROOMS = (
    *("errors", "batches", "calibration", "masks", "task_vectors", "optim", "training"),
    *("merging", "methods", "evaluation"),
)


def __getattr__(name: str) -> Any:
    """Import the engine at the first use of one of its names: torch takes seconds."""
    if name in __all__ or name in _ROOMS:
        for room in _ROOMS:
            module = import_module(f"talos.{room}")
            if name == room or name in module.__all__:
                globals()[name] = found = module if name == room else getattr(module, name)
                return found
    raise AttributeError(f"module 'talos' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List what is public."""
    return [*__all__, "__version__"]
