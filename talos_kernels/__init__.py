"""Kernels of sparse fine-tuning: tensors and indices, no models. They need only torch.

Each op works on many tensors in one launch, on the entries that an `Index` selects. `sddmm_`, a
matrix product, takes one tensor a call.
"""

import importlib.util

import torch

# An attribute even if the file was loaded alone before, as talos.errors does.
from . import errors as errors
from ._ops import compiled_library, use_compiled_cuda
from .add_delta import add_delta_, revert_delta_
from .errors import (
    TalosError,
    TalosOSError,
    TalosRuntimeError,
    TalosTypeError,
    TalosValueError,
)
from .fisher_diag import fisher_diag_, fisher_diag_embedding_, fisher_diag_vector_
from .gather_grad import gather_grad_, scatter_
from .index import Index, TensorIndex
from .sddmm import sddmm_
from .select_threshold import Threshold, select_threshold
from .sparse_adam import sparse_adam_

__all__ = [
    "Index",
    "TalosError",
    "TalosOSError",
    "TalosRuntimeError",
    "TalosTypeError",
    "TalosValueError",
    "TensorIndex",
    "Threshold",
    "add_delta_",
    "compiled_library",
    "fisher_diag_",
    "fisher_diag_embedding_",
    "fisher_diag_vector_",
    "gather_grad_",
    "revert_delta_",
    "scatter_",
    "sddmm_",
    "select_threshold",
    "sparse_adam_",
]

if torch.cuda.is_available():
    use_compiled_cuda()
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module(".triton", __name__)  # serves the ops on CUDA and HIP devices
