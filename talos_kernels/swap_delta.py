"""Take one sparse delta off many tensors and put another one on, in one pass.

    params[t][j]      <- old_saved[old_rank(t, j)]                       (its bits)
    saved[rank(t, j)] <- params[t][j]                                    (its bits)
    params[t][j]      <- params[t][j] + scale * values[rank(t, j)]       (float32, rounded once)

in this order at every entry, so that one that both indices select sees the base. With the same
index and the same saved bits on both sides it scales a delta anew, as a search for the scaling
coefficient does: `params <- saved + scale * values`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import PARAM_DTYPES, check_flat, check_params, contiguous, write_back
from ._ops import define, increment_version
from .add_delta import add_delta_reference
from .errors import TalosValueError
from .gather_grad import scatter_reference
from .index import Index

__all__ = ["swap_delta_", "swap_delta_reference"]


def swap_delta_reference(
    params: Sequence[Tensor],
    old_index: Sequence[Tensor],
    old_saved: Tensor,
    index: Sequence[Tensor],
    values: Tensor,
    scale: float,
    saved: Tensor,
) -> None:
    """The definition: all of the one delta comes off, then all of the other goes on."""
    scatter_reference(params, old_index, old_saved)
    add_delta_reference(params, index, values, scale, saved)


def _fake(
    params: Sequence[Tensor],
    old_index: Sequence[Tensor],
    old_saved: Tensor,
    index: Sequence[Tensor],
    values: Tensor,
    scale: float,
    saved: Tensor,
) -> None:
    return None


define(
    "swap_delta_",
    "(Tensor(a!)[] params, Tensor[] old_index, Tensor old_saved, Tensor[] index, Tensor values, "
    "float scale, Tensor(b!) saved) -> ()",
    swap_delta_reference,
    _fake,
)


def swap_delta_(
    params: Sequence[Tensor],
    old_index: Index,
    old_saved: Tensor,
    index: Index,
    values: Tensor,
    *,
    scale: float = 1.0,
    saved: Tensor,
) -> None:
    """Take the delta that is on many tensors off and put another one on, in one launch.

    `revert_delta_` takes the new one off again, bit for bit; so does the next `swap_delta_`.

    Args:
        params: the tensors with the old delta on: float32, bfloat16 or float16, one dtype and
            device, any shapes.
        old_index: what the old delta selects, on the tensors' device.
        old_saved: `[old_index.nnz]` of the tensors' dtype, the bits that the old delta replaced.
        index: what the new delta selects of the same tensors; an empty part where it selects none.
        values: `[index.nnz]`, the new delta in rank order; float32, bfloat16 or float16.
        scale: its scaling coefficient.
        saved: `[index.nnz]` of the tensors' dtype; receives the base's bits. It may be `old_saved`
            itself where `index` is `old_index` itself.

    Raises:
        TalosValueError: a shape, number, device or layout does not fit its index, or `saved` and
            `old_saved` of two indices share memory.
        TalosTypeError: a dtype is not supported or not shared.

    Example:
        >>> from talos_kernels import TensorIndex, add_delta_
        >>> parts = [torch.tensor([True, True, False]), torch.tensor([False, True, True])]
        >>> a, b = (Index.pack([TensorIndex.encode(part)]) for part in parts)
        >>> w, saved_a, saved_b = torch.ones(3), torch.empty(2), torch.empty(2)
        >>> add_delta_([w], a, torch.tensor([1.0, 2.0]), saved=saved_a)
        >>> swap_delta_([w], a, saved_a, b, torch.tensor([0.5, 3.0]), saved=saved_b)
        >>> w
        tensor([1.0000, 1.5000, 4.0000])
        >>> swap_delta_([w], b, saved_b, b, torch.tensor([0.5, 3.0]), scale=2.0, saved=saved_b)
        >>> w
        tensor([1., 2., 7.])
    """
    check_params("params", params, old_index)
    check_params("params", params, index)
    check_flat("values", values, index, PARAM_DTYPES)
    if not params:
        return
    check_flat("old_saved", old_saved, old_index, (params[0].dtype,))
    check_flat("saved", saved, index, (params[0].dtype,))
    same = index is old_index and saved.data_ptr() == old_saved.data_ptr()
    if not same and _share_memory(saved, old_saved):
        raise TalosValueError(
            "saved must have memory of its own, or be old_saved where index is old_index, "
            "got memory that overlaps old_saved's; keep one buffer a delta"
        )
    if index.nnz == old_index.nnz == 0:
        return
    rows = contiguous(params)
    torch.ops.talos.swap_delta_(
        rows, old_index.buffers, old_saved, index.buffers, values, scale, saved
    )
    with torch.no_grad():
        write_back(params, rows)
    increment_version(params)


def _share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two contiguous tensors overlap."""
    start, other_start = one.data_ptr(), other.data_ptr()
    return start < other_start + other.nbytes and other_start < start + one.nbytes
