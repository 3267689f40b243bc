"""Real numbers as people hand them over: Python's, NumPy's, tensors of one element."""

import operator
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from talos.errors import TalosValueError

__all__ = ["as_real", "integer"]


def as_real(value: Any) -> float | None:
    """Read a real number.

    Args:
        value: anything.

    Returns:
        The number; None where it is none: a bool, a text, a tensor of several elements or of
        complex ones, an array with dimensions.

    Example:
        >>> import torch
        >>> as_real(torch.tensor([0.5])), as_real(2), as_real("2"), as_real(True)
        (0.5, 2.0, None, None)
    """
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else None
    if isinstance(value, np.ndarray):
        value = value.item() if value.ndim == 0 else None
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return float(value)


def integer(name: str, value: Any, least: int, kind: str | None = None) -> int:
    """An option as an int, from integers of any type.

    Raises:
        TalosValueError: it is no integer, or below `least`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        kind = kind or f"an integer of at least {least}"
        raise TalosValueError(f"{name} must be {kind}, got {value!r}")
    return number
