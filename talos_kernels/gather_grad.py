"""Dense gradient -> compact gradient, and back.

out[rank(t, j)] <- [out[rank(t, j)] +] grads[t][j]      for every selected entry j of tensor t
params[t][j]    <- values[rank(t, j)]                   (`scatter_`)
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ._checks import PARAM_DTYPES, check_flat, check_params, contiguous, dense_gradients, write_back
from ._ops import define, op_for
from .index import Index

__all__ = ["gather_grad_", "gather_grad_reference", "scatter_", "scatter_reference"]


def gather_grad_reference(
    out: Tensor, grads: Sequence[Tensor], index: Sequence[Tensor], accumulate: bool
) -> None:
    """Define the op, one tensor after another; an empty gradient counts as zero."""
    packed = Index.from_buffers(index)
    for grad, part, entries in zip(grads, packed.unpack(), packed.slices, strict=True):
        where = part.positions_int64().to(grad.device)
        chosen = (
            grad.view(-1)[where].to(out.dtype) if grad.numel() else torch.zeros_like(out[entries])
        )
        out[entries] = out[entries] + chosen if accumulate else chosen  # -0 stays -0


def scatter_reference(params: Sequence[Tensor], index: Sequence[Tensor], values: Tensor) -> None:
    """Define the op, one tensor after another."""
    packed = Index.from_buffers(index)
    for param, part, entries in zip(params, packed.unpack(), packed.slices, strict=True):
        where = part.positions_int64().to(param.device)
        param.view(-1)[where] = values[entries].to(param.dtype)


define(
    "gather_grad_",
    "(Tensor(a!) out, Tensor[] grads, Tensor[] index, bool accumulate) -> ()",
    gather_grad_reference,
)
define(
    "scatter_",
    "(Tensor(a!)[] params, Tensor[] index, Tensor values) -> ()",
    scatter_reference,
)


def gather_grad_(
    out: Tensor, grads: Sequence[Tensor | None], index: Index, *, accumulate: bool = False
) -> None:
    """Gather the selected entries of dense gradients into one compact array, in one launch.

    Args:
        out: float32 `[nnz]`, float64 for float64 gradients; written in rank order.
        grads: one for each tensor of the index, any shapes; None counts as zero.
        index: the selection, on the gradients' device.
        accumulate: add to `out` instead of overwriting it.

    Raises:
        TalosValueError: a shape, number, device or layout does not fit the index.
        TalosTypeError: a dtype is not supported.

    Example:
        >>> from talos_kernels import TensorIndex
        >>> index = Index.pack([TensorIndex.encode(torch.tensor([True, False, True]))])
        >>> out = torch.empty(2)
        >>> gather_grad_(out, [torch.tensor([3.0, 7.0, 4.0])], index)
        >>> out
        tensor([3., 4.])
    """
    given = [grad for grad in grads if grad is not None]
    dense = dense_gradients(grads, index, given[0].dtype if given else torch.float32)
    check_flat("out", out, index, (torch.float32, torch.float64))
    dtypes = [out.dtype, *(grad.dtype for grad in dense[:1])]
    op_for("gather_grad_", *dtypes)(out, dense, index.buffers, accumulate)
    increment_version(out)


def scatter_(params: Sequence[Tensor], index: Index, values: Tensor) -> None:
    """Write compact values into the selected entries of dense tensors, in place, in one launch.

    Args:
        params: float32, bfloat16, float16 or float64; one dtype and device, any shapes.
        index: the selection, on the tensors' device.
        values: `[nnz]` in rank order, cast to the tensors' dtype.

    Raises:
        TalosValueError: a shape, number, device or layout does not fit the index.
        TalosTypeError: a dtype is not supported or not shared.

    Example:
        >>> from talos_kernels import TensorIndex
        >>> w = torch.zeros(3)
        >>> index = Index.pack([TensorIndex.encode(torch.tensor([True, False, True]))])
        >>> scatter_([w], index, torch.tensor([1.0, 2.0]))
        >>> w
        tensor([1., 0., 2.])
    """
    check_params("params", params, index)
    check_flat("values", values, index, PARAM_DTYPES)
    if not params or index.nnz == 0:
        return
    rows = contiguous(params)
    op_for("scatter_", params[0].dtype, values.dtype)(rows, index.buffers, values)
    write_back(params, rows)
    increment_version(params)
