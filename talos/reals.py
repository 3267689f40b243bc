"""Real numbers as people hand them over: Python's, NumPy's, tensors of one element."""

from __future__ import annotations

from numbers import Real
from typing import Any

from torch import Tensor

__all__ = ["as_real"]


def as_real(value: Any) -> float | None:
    """Read a real number.

    Args:
        value: anything.

    Returns:
        The number; None where it is none: a bool, a text, a tensor of several elements or of
        complex ones.

    Example:
        >>> import torch
        >>> as_real(torch.tensor([0.5])), as_real(2), as_real("2"), as_real(True)
        (0.5, 2.0, None, None)
    """
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else None
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return float(value)
