"""Triton kernels for NVIDIA and AMD devices. Importing registers them; needs Triton.

One program takes one block of one tensor, or one tile of a product, one launch all tensors of a
call. A launcher returns on an empty input, guards the device and starts its kernel; the checks are
the public function's.
"""

from . import add_delta, fisher_diag, gather_grad, sddmm, select_threshold, sparse_adam

__all__ = [
    "add_delta",
    "fisher_diag",
    "gather_grad",
    "sddmm",
    "select_threshold",
    "sparse_adam",
]
