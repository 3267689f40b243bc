"""Checks of gradients before anything is written, and the parts of sharded ones."""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from talos.distributed import is_sharded, local, sharding
from talos.errors import TalosTypeError, TalosValueError

__all__ = ["check_entries", "check_gradient", "gradient_parts", "look"]

look = attrgetter("dtype", "device", "shape", "layout")
"""What a kernel must know of a tensor beside its values."""


def gradient_parts(params: Mapping[str, Tensor]) -> list[Tensor | None]:
    """Return what this rank holds of each gradient of sharded parameters; all ranks call this.

    Raises:
        TalosTypeError: a gradient is a whole tensor.
    """
    found = []
    for name, param in params.items():
        grad: Any = param.grad
        if grad is not None and not is_sharded(grad):
            raise TalosTypeError(
                f"{name}.grad must be sharded as its parameter, got a whole tensor; let the "
                "backward of the sharded model make it"
            )
        if grad is not None and sharding(grad) != sharding(param):
            _, placements = sharding(param) or (None, ())
            param.grad = grad = grad.redistribute(placements=placements)
        found.append(None if grad is None else local(grad))
    return found


def check_gradient(name: str, param: Tensor, grad: Tensor) -> None:
    """Refuse a dense gradient that does not fit what this rank holds of its parameter."""
    if grad.layout != torch.strided:
        raise TalosTypeError(
            f"{name}.grad must be dense, got {grad.layout}; "
            "this optimizer takes dense gradients and trains a sparse selection"
        )
    if grad.dtype not in (torch.float32, torch.bfloat16, torch.float16, param.dtype):
        raise TalosTypeError(f"{name}.grad must be float32, bfloat16 or float16, got {grad.dtype}")
    if grad.shape != param.shape or grad.device != param.device:
        raise TalosValueError(
            f"{name}.grad must be {tuple(param.shape)} on {param.device}, "
            f"got {tuple(grad.shape)} on {grad.device}"
        )


def check_entries(name: str, entries: Tensor, shape: torch.Size, param: Tensor) -> None:
    """Refuse entries of a compact gradient that do not fit their parameter."""
    wide = torch.promote_types(param.dtype, torch.float32)
    if look(entries) != (wide, param.device, shape, torch.strided):
        raise TalosValueError(
            f"{name}.grad.entries must be {wide} of shape {tuple(shape)} on {param.device}, got "
            f"{entries.dtype} of shape {tuple(entries.shape)} on {entries.device}; "
            "write them in place"
        )
