"""Checks of the public functions' arguments, made before anything is written."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import TalosTypeError, TalosValueError
from .index import Index

__all__ = [
    "KERNEL_DTYPES",
    "PARAM_DTYPES",
    "check_flat",
    "check_params",
    "contiguous",
    "dense_gradients",
    "write_back",
]

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# float64 is served by the references.
PARAM_DTYPES = (*KERNEL_DTYPES, torch.float64)


def check_params(name: str, tensors: Sequence[Tensor], index: Index) -> None:
    """Refuse tensors that do not fit the index, or whose dtypes differ or are not supported."""
    index.check_tensors(name, tensors)
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in PARAM_DTYPES:
            raise TalosTypeError(
                f"{name}[{i}] must be float32, bfloat16, float16 or float64, got {tensor.dtype}"
            )
        if tensor.dtype != tensors[0].dtype:
            raise TalosTypeError(
                f"{name} must share one dtype, got {tensors[0].dtype} and {tensor.dtype} at {i}; "
                "make one call a dtype"
            )


def check_flat(name: str, tensor: Tensor, index: Index, dtypes: Sequence[torch.dtype]) -> None:
    """Refuse a per-entry array that is not flat, contiguous and `nnz` long."""
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TalosTypeError(f"{name} must be {wanted}, got {tensor.dtype}")
    if tensor.shape != (index.nnz,) or not tensor.is_contiguous():
        raise TalosValueError(
            f"{name} must be contiguous of shape ({index.nnz},), one value a selected entry, "
            f"got shape {tuple(tensor.shape)} with strides {tensor.stride()}"
        )
    if tensor.device != index.device:
        raise TalosValueError(f"{name} must be on {index.device}, got {tensor.device}")


def dense_gradients(
    grads: Sequence[Tensor | None],
    index: Index,
    param_dtype: torch.dtype,
    *,
    compact: bool = False,
) -> list[Tensor]:
    """Return row-major gradients of one dtype: the weights' if all share it, else float32.

    For float64 weights it is float64. An empty tensor stands for None. With `compact` a gradient
    may also hold only its selected entries, in rank order.
    """
    if len(grads) != len(index.numels):
        raise TalosValueError(
            f"grads must hold {len(index.numels)} entries, one a tensor, got {len(grads)}"
        )
    shared = all(grad is None or grad.dtype == param_dtype for grad in grads)
    dtype = param_dtype if shared or param_dtype == torch.float64 else torch.float32
    dense = []
    for i, (grad, numel, nnz) in enumerate(zip(grads, index.numels, index.nnzs, strict=True)):
        if grad is None:
            dense.append(torch.empty(0, dtype=dtype, device=index.device))
            continue
        if grad.layout != torch.strided:
            raise TalosTypeError(
                f"grads[{i}] must be dense, got layout {grad.layout}; call .to_dense() first"
            )
        if grad.dtype not in PARAM_DTYPES:
            raise TalosTypeError(
                f"grads[{i}] must be float32, bfloat16, float16 or float64, got {grad.dtype}"
            )
        fits = grad.numel() == numel or (compact and grad.shape == (nnz,))
        if not fits or grad.device != index.device:
            raise TalosValueError(
                f"grads[{i}] must have {numel} entries on {index.device}, "
                f"got shape {tuple(grad.shape)} on {grad.device}"
            )
        plain = grad.dtype == dtype and not grad.requires_grad and grad.is_contiguous()
        dense.append(grad if plain else grad.detach().to(dtype).contiguous())
    return dense


def contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors in row-major order: themselves, or copies if their strides differ."""
    return [tensor.detach().contiguous() for tensor in tensors]


@torch.no_grad()
def write_back(tensors: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
    """Copy back the row-major copies that `contiguous` made."""
    for tensor, row in zip(tensors, rows, strict=True):
        if tensor.data_ptr() != row.data_ptr():
            tensor.copy_(row)
