"""Triton kernels for NVIDIA and AMD devices. Importing registers them; needs Triton.

A program takes one block of one tensor, or one tile of a product; one launch takes all tensors of a
call. A launcher returns on an empty input, sets the device and starts its kernel. The public
functions check the arguments.
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
