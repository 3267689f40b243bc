"""The operators of a vector space, from one weighted sum."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from numbers import Real
from typing import Self

from talos.options import as_real

__all__ = ["VectorSpace"]


class VectorSpace(ABC):
    """What can be summed with scales can be added, subtracted, scaled and negated."""

    # NumPy's numbers, as linspace gives them, leave their product with a vector to __rmul__.
    __array_ufunc__ = None

    @classmethod
    @abstractmethod
    def combine(cls, terms: Iterable[tuple[float, Self]]) -> Self:
        """The weighted sum of many vectors."""

    def __add__(self, other: object) -> Self:
        """The sum; 0 is taken for the zero vector, as `sum()` begins with it."""
        if isinstance(other, type(self)):
            return self.combine([(1.0, self), (1.0, other)])
        if isinstance(other, Real) and other == 0:
            return self
        return NotImplemented

    __radd__ = __add__

    def __sub__(self, other: object) -> Self:
        """The difference."""
        if isinstance(other, type(self)):
            return self.combine([(1.0, self), (-1.0, other)])
        return NotImplemented

    def __mul__(self, scale: object) -> Self:
        """The multiple by a real number."""
        number = as_real(scale)
        return NotImplemented if number is None else self.combine([(number, self)])

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> Self:
        """The multiple by the inverse of a real number, which must not be 0."""
        number = as_real(divisor)
        return NotImplemented if number is None else self.combine([(1.0 / number, self)])

    def __neg__(self) -> Self:
        """The multiple by -1: a vector that makes a model forget."""
        return self.combine([(-1.0, self)])
