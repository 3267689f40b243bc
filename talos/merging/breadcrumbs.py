"""Breadcrumbs: without the largest and the smallest changes of each tensor.

    keep_t = entries of a tensor whose |tau_t| is among neither its round(drop_largest * n) largest
             nor its round(drop_smallest * n) smallest of n
    tau    = sum_t c_t keep_t tau_t

n counts all entries of the tensor: those that a vector does not select are zeros, so among its
smallest. Source: Davari and Belilovsky 2023, "Model Breadcrumbs", arXiv 2312.06795. Its
beta is the share of the smallest, its gamma that of the largest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from talos.errors import TalosValueError
from talos.merging.base import Merge, Source
from talos.options import as_real
from talos.task_vectors.sums import Part
from talos_kernels import select_threshold

__all__ = ["Breadcrumbs"]


@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(Merge):
    """The sum of what lies between the largest and the smallest changes of each tensor.

    Attributes:
        drop_largest: the share of each tensor's entries that is dropped as outliers, in [0, 1).
        drop_smallest: the share that is dropped as noise, in [0, 1); the two together stay below 1.

    Example:
        >>> Breadcrumbs(drop_smallest=0.8).settings()["drop_smallest"]
        0.8
    """

    name = "breadcrumbs"
    drop_largest: float = 0.01
    drop_smallest: float = 0.85

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        super().__post_init__()
        for name in ("drop_largest", "drop_smallest"):
            self._store(**{name: _share(name, getattr(self, name))})
        if self.drop_largest + self.drop_smallest >= 1.0:
            raise TalosValueError(
                "drop_smallest must leave something beside drop_largest "
                f"{self.drop_largest}, got {self.drop_smallest}; take two shares below 1 together"
            )

    def _choose(self, vectors: Sequence[Source]) -> Sequence[Source]:
        return [each.then(self._middle) for each in vectors]

    def _middle(self, name: str, part: Part) -> Part:
        numel = part.index.numel
        dropped = round(self.drop_largest * numel)
        magnitudes = part.values.abs()
        first = _largest(magnitudes, numel - round(self.drop_smallest * numel))
        return part.where(first & ~_largest(magnitudes, dropped))


def _largest(magnitudes: Tensor, count: int) -> Tensor:
    """Choose the `count` largest, first positions first: bool `[n]`; all if there are fewer."""
    if count <= 0 or count >= len(magnitudes):
        return torch.full_like(magnitudes, count > 0, dtype=torch.bool)
    return select_threshold([magnitudes], count, largest=True).select(0, magnitudes)


def _share(name: str, value: Any) -> float:
    number = as_real(value)
    if number is None or not 0.0 <= number < 1.0:
        raise TalosValueError(f"{name} must lie in [0, 1), got {value!r}")
    return number
