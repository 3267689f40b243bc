"""The weight gradient of a linear layer at its selected entries only: a sampled matrix product.

For a linear layer y = x W^T, T rows (tokens) and dY the gradient of its output,

    out[rank(o, i)] <- [out[rank(o, i)] +] sum_t dY[t, o] X[t, i]      for every selected (o, i).

This equals `gather_grad_` of the product dY^T X, [M, N], which a GPU never writes: each entry goes
from the accumulator to its rank. A tile with a selected entry is multiplied whole, because matrix
units work on tiles; other tiles are skipped. The operation is known as SDDMM (sampled dense-dense
matrix multiplication).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ._checks import KERNEL_DTYPES, check_flat
from ._ops import define
from .errors import TalosTypeError, TalosValueError
from .index import BLOCK_SIZE, SEGMENT_SIZE, Index

__all__ = ["sddmm_", "sddmm_reference"]


def sddmm_reference(
    out: Tensor, dy: Tensor, x: Tensor, index: Sequence[Tensor], accumulate: bool
) -> None:
    """Define the op: the whole product in float32, then its selected entries."""
    (part,) = Index.from_buffers(index).unpack()
    product = torch.empty(dy.shape[1], x.shape[1], dtype=torch.float32, device=out.device)
    torch.mm(dy.float().T, x.float(), out=product)  # into `out`: autocast would round a new one
    entries = product.flatten()[part.positions_int64().to(out.device)]
    out.copy_(out + entries if accumulate else entries)


def _product_and_gather(
    out: Tensor, dy: Tensor, x: Tensor, index: Sequence[Tensor], accumulate: bool
) -> None:
    """Multiply the rows with selected entries and gather from them; the CPU's version."""
    product = torch.empty(dy.shape[1], x.shape[1], dtype=torch.float32, device="cpu")
    rows = _selected_rows(index, *product.shape)
    torch.mm(dy[:, rows].float().T, x.float(), out=product[rows])
    torch.ops.talos.gather_grad_(out, [product], index, accumulate)


def _selected_rows(index: Sequence[Tensor], rows: int, cols: int) -> slice:
    """Return the range of rows of [M, N] from the first to the last non-empty block."""
    _, positions, starts, _, programs = index
    if programs.numel() == 0:
        return slice(0, 0)
    if starts.numel() == 0:
        return slice(0, rows)
    size = SEGMENT_SIZE if positions.numel() else BLOCK_SIZE
    blocks = starts.diff().nonzero()
    return slice(int(blocks[0]) * size // cols, min(-(-(int(blocks[-1]) + 1) * size // cols), rows))


define(
    "sddmm_",
    "(Tensor(a!) out, Tensor dy, Tensor x, Tensor[] index, bool accumulate) -> ()",
    sddmm_reference,
    cpu=_product_and_gather,
)


def sddmm_(out: Tensor, dy: Tensor, x: Tensor, index: Index, *, accumulate: bool = False) -> None:
    """Compute the selected entries of `dy.T @ x`, a linear layer's weight gradient, in one launch.

    Products are summed in float32, in a fixed order, and never rounded to a shorter type, so two
    calls give the same bits. float32 operands are multiplied in float32, or on a GPU in TF32 if
    `torch.backends.cuda.matmul` permits it. A CPU makes the product of the rows with selected
    entries; a GPU makes no product in memory below 2^24 columns.

    Args:
        out: float32 `[nnz]`, written in rank order.
        dy: the gradient of the layer's output, `[T, M]`, float32, bfloat16 or float16; rows may
            lie apart.
        x: the layer's input, `[T, N]`, of the same dtype and device.
        index: the selection of one tensor of M * N entries, `[M, N]` in row-major order.
        accumulate: add to `out` instead of overwriting it.

    Raises:
        TalosValueError: a shape, device or layout does not fit the index, or that holds several
            tensors.
        TalosTypeError: a dtype is not supported, or the operands' differ.

    Example:
        >>> from talos_kernels import TensorIndex
        >>> index = Index.pack([TensorIndex.encode(torch.eye(2) > 0)])
        >>> dy, x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> out = torch.empty(2)
        >>> sddmm_(out, dy, x, index)
        >>> out  # the diagonal of dy.T @ x
        tensor([1., 4.])
    """
    if len(index.numels) != 1:
        raise TalosValueError(
            f"index must hold one tensor, got {len(index.numels)}; make one call a tensor, with "
            "Index.split()"
        )
    for name, rows in (("dy", dy), ("x", x)):
        if rows.layout != torch.strided or rows.dim() != 2:
            raise TalosValueError(
                f"{name} must be dense of 2 dimensions, one row a token, got layout {rows.layout} "
                f"and shape {tuple(rows.shape)}; call .flatten(0, -2) first"
            )
        if rows.dtype not in KERNEL_DTYPES:
            raise TalosTypeError(f"{name} must be float32, bfloat16 or float16, got {rows.dtype}")
        if rows.device != index.device:
            raise TalosValueError(
                f"{name} must be on the index's device {index.device}, got {rows.device}; "
                "move one with .to()"
            )
    if x.dtype != dy.dtype:
        raise TalosTypeError(f"x must be {dy.dtype} as dy is, got {x.dtype}; cast one with .to()")
    if len(x) != len(dy):
        raise TalosValueError(f"x must have the {len(dy)} rows of dy, got {len(x)}")
    if dy.shape[1] * x.shape[1] != index.numels[0]:
        raise TalosValueError(
            f"index must be of {dy.shape[1]} x {x.shape[1]} entries, the columns of dy times those "
            f"of x, got {index.numels[0]}"
        )
    check_flat("out", out, index, (torch.float32,))
    with torch.no_grad():
        torch.ops.talos.sddmm_(out, _dense_rows(dy), _dense_rows(x), index.buffers, accumulate)
    increment_version(out)


def _dense_rows(rows: Tensor) -> Tensor:
    """Return the rows with adjacent entries: themselves, or a copy."""
    rows = rows.detach()
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()
