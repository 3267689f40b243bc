"""How numbers that callers pass are read: Python's, NumPy's, tensors of one element."""

import operator
from math import inf, isfinite
from numbers import Real
from typing import Any

from talos.errors import TalosValueError

__all__ = ["as_real", "finite", "fraction", "integer", "positive", "read_seed"]


def as_real(value: Any) -> float | None:
    """Return a real number as a float; None for a bool, a text, several or complex elements.

    An integer that no float holds becomes infinite.

    Example:
        >>> import torch
        >>> as_real(torch.tensor([0.5])), as_real(2), as_real("2"), as_real(True)
        (0.5, 2.0, None, None)
    """
    if hasattr(value, "item"):  # a tensor or an array: importing torch takes seconds
        one = value.numel() == 1 if hasattr(value, "numel") else value.ndim == 0
        value = value.item() if one else None
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer beyond the range of floats
        return -inf if value < 0 else inf


def integer(
    name: str, value: Any, least: int, kind: str | None = None, *, most: float = inf
) -> int:
    """Return an option as an int, from integers of any type.

    Raises:
        TalosValueError: it is no integer, or not in [least, most].
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number <= most or isinstance(value, bool):
        kind = kind or f"an integer of at least {least}"
        raise TalosValueError(f"{name} must be {kind}, got {value!r}")
    return number


def fraction(name: str, value: Any) -> float:
    """Return an option in (0, 1] as a float.

    Raises:
        TalosValueError: it is no real number, or out of range.
    """
    number = as_real(value)
    if number is None or not 0.0 < number <= 1.0:
        raise TalosValueError(f"{name} must lie in (0, 1], got {value!r}")
    return number


def positive(name: str, value: Any) -> float:
    """Return a positive, finite option as a float.

    Raises:
        TalosValueError: it is no real number, or out of range.
    """
    number = as_real(value)
    if number is None:
        raise TalosValueError(f"{name} must be a positive number, got {value!r}")
    if not 0.0 < number < inf:
        raise TalosValueError(f"{name} must be positive and finite, got {value!r}")
    return number


def finite(name: str, value: Any) -> float:
    """Return a finite option of any sign as a float.

    Raises:
        TalosValueError: it is no real number, or not finite.
    """
    number = as_real(value)
    if number is None or not isfinite(number):
        raise TalosValueError(f"{name} must be a finite number, got {value!r}")
    return number


def read_seed(seed: Any) -> int:
    """Return a seed that `torch.Generator.manual_seed` takes.

    Raises:
        TalosValueError: it is no integer of 64 bits.
    """
    return integer("seed", seed, -(2**63), "an integer of 64 bits", most=2**64 - 1)
