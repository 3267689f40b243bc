"""Add a scaled sparse delta to many tensors, and take it off again exactly.

    saved[rank(t, j)] <- params[t][j]                                    (its bits)
    params[t][j]      <- params[t][j] + scale * values[rank(t, j)]       (float32, rounded once;
                                                                          float64 for float64)

In bf16 adding and then subtracting does not give the old weight back, so `revert_delta_` writes
the saved bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ._checks import PARAM_DTYPES, check_flat, check_params, contiguous, write_back
from ._ops import define, op_for
from .gather_grad import scatter_
from .index import Index

__all__ = ["add_delta_", "add_delta_reference", "revert_delta_"]


def add_delta_reference(
    params: Sequence[Tensor],
    index: Sequence[Tensor],
    values: Tensor,
    scale: float,
    saved: Tensor | None,
) -> None:
    """Define the op, one tensor after another."""
    packed = Index.from_buffers(index)
    for param, part, entries in zip(params, packed.unpack(), packed.slices, strict=True):
        where = part.positions_int64().to(param.device)
        base = param.view(-1)[where]
        if saved is not None:
            saved[entries] = base
        wide = torch.promote_types(base.dtype, torch.float32)
        edited = base.to(wide) + scale * values[entries].to(wide)
        param.view(-1)[where] = edited.to(param.dtype)


define(
    "add_delta_",
    "(Tensor(a!)[] params, Tensor[] index, Tensor values, float scale, Tensor(b!)? saved) -> ()",
    add_delta_reference,
)


def add_delta_(
    params: Sequence[Tensor],
    index: Index,
    values: Tensor,
    *,
    scale: float = 1.0,
    saved: Tensor | None = None,
) -> None:
    """Add `scale * values` to the selected entries of many tensors, in place, in one launch.

    Args:
        params: float32, bfloat16, float16 or float64; one dtype and device, any shapes.
        index: the selection, on the tensors' device.
        values: `[nnz]`, the delta in rank order, in any of these dtypes.
        scale: the scaling coefficient.
        saved: `[nnz]` in the tensors' dtype; receives the old bits for `revert_delta_`.

    Raises:
        TalosValueError: a shape, number, device or layout does not fit the index.
        TalosTypeError: a dtype is not supported or not shared.

    Example:
        >>> from talos_kernels import TensorIndex
        >>> w = torch.ones(3)
        >>> index = Index.pack([TensorIndex.encode(torch.tensor([True, False, True]))])
        >>> saved = torch.empty(2)
        >>> add_delta_([w], index, torch.tensor([1.0, 2.0]), scale=0.5, saved=saved)
        >>> w
        tensor([1.5000, 1.0000, 2.0000])
        >>> revert_delta_([w], index, saved)
        >>> w
        tensor([1., 1., 1.])
    """
    check_params("params", params, index)
    check_flat("values", values, index, PARAM_DTYPES)
    if not params or index.nnz == 0:
        return
    if saved is not None:
        check_flat("saved", saved, index, (params[0].dtype,))
    rows = contiguous(params)
    op_for("add_delta_", params[0].dtype, values.dtype)(rows, index.buffers, values, scale, saved)
    write_back(params, rows)
    increment_version(params)


def revert_delta_(params: Sequence[Tensor], index: Index, saved: Tensor) -> None:
    """Write back the bits that `add_delta_` saved, in place, in one launch.

    Args:
        params: the edited tensors.
        index: the selection, on the tensors' device.
        saved: `[nnz]` in the tensors' dtype, as `add_delta_` filled it.

    Raises:
        TalosValueError: a shape, number, device or layout does not fit the index.
        TalosTypeError: a dtype is not supported or not shared.

    Example:
        >>> from talos_kernels import TensorIndex
        >>> w = torch.tensor([0.1, 0.2]).bfloat16()
        >>> index = Index.pack([TensorIndex.encode(torch.tensor([True, True]))])
        >>> saved, before = torch.empty_like(w), w.clone()
        >>> add_delta_([w], index, torch.tensor([1.0, 3.0]), saved=saved)
        >>> revert_delta_([w], index, saved)
        >>> torch.equal(w, before)
        True
    """
    scatter_(params, index, saved)
