"""Values at the entries of a mask: what a task vector is before it knows models and files."""

from dataclasses import dataclass, field
from math import isfinite, sqrt
from typing import Any, Self

import torch
from torch import Tensor

from talos.errors import TalosTypeError, TalosValueError
from talos.masks import Mask
from talos.masks.table import text_table
from talos.task_vectors.sums import same_order, slices_of, spread

__all__ = ["SparseDelta"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False, repr=False)
class SparseDelta:
    """Values at the entries of a mask, of weights with these fingerprints.

    Attributes:
        mask: the entries.
        values: `[nnz]` float32, bfloat16 or float16, on the CPU, in the mask's rank order.
        fingerprints: of the base's tensors, by name; those without one are not verified.
        metadata: what made it, JSON-able.

    Raises:
        TalosTypeError: `values` has another dtype.
        TalosValueError: `values` has another shape, lies on another device or is not finite;
            `fingerprints` names a tensor that the mask lacks.
    """

    mask: Mask
    values: Tensor
    fingerprints: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    _largest: float = field(init=False)

    def __post_init__(self) -> None:
        """Refuse values that do not belong to the mask."""
        if self.values.dtype not in _DTYPES:
            raise TalosTypeError(
                f"values must be float32, bfloat16 or float16, got {self.values.dtype}"
            )
        if self.values.shape != (self.mask.nnz,) or self.values.device.type != "cpu":
            raise TalosValueError(
                f"values must be of shape ({self.mask.nnz},) on the CPU, one a selected entry, got "
                f"{tuple(self.values.shape)} on {self.values.device}"
            )
        strangers = sorted(set(self.fingerprints) - set(self.mask.names))
        if strangers:
            raise TalosValueError(
                f"fingerprints must name tensors of the mask, got {', '.join(strangers[:5])}"
            )
        object.__setattr__(self, "values", self.values.detach().contiguous())
        object.__setattr__(self, "fingerprints", dict(self.fingerprints))
        object.__setattr__(self, "metadata", dict(self.metadata))
        object.__setattr__(self, "_largest", self._checked_largest())

    def to_dense(self, name: str) -> Tensor:
        """The delta of one tensor, in its shape and the vector's dtype; zero where not selected.

        Raises:
            TalosValueError: the mask does not cover `name`.
        """
        dense = torch.zeros(self.mask.to_dense(name).shape, dtype=self.values.dtype, device="cpu")
        index = self.mask.indices[name]
        dense.view(-1)[index.positions_int64()] = self.values[slices_of(self.mask)[name]]
        return dense

    def astype(self, dtype: torch.dtype) -> Self:
        """The same vector with values of another dtype.

        Raises:
            TalosTypeError: `dtype` is not float32, bfloat16 or float16.
            TalosValueError: a value overflows in it.
        """
        if dtype not in _DTYPES:
            raise TalosTypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        return type(self)(self.mask, self.values.to(dtype), self.fingerprints, self.metadata)

    def norm(self) -> float:
        """The Euclidean norm of the values, summed in float64."""
        return sqrt(sum(norm * norm for norm in self.norms().values()))

    def norms(self) -> dict[str, float]:
        """The Euclidean norm of each tensor's values, by name."""
        return {
            name: float(torch.linalg.vector_norm(self.values[part], dtype=torch.float64))
            for name, part in slices_of(self.mask).items()
        }

    def describe(self) -> str:
        """A table of where the vector lies: its norm and entries by type of tensor.

        Example:
            >>> mask = Mask.from_dense({"h.0.q.weight": torch.eye(2) > 0})
            >>> print(SparseDelta(mask, torch.tensor([3.0, 4.0])).describe())
            type   tensors  selected  density  norm
            query        1         2    0.500     5
            total        1         2    0.500     5
        """
        table, norms = self.mask.describe(), self.norms()
        squares: dict[str, float] = {}
        for row in table.rows:
            for kind in (row.kind, "total"):
                squares[kind] = squares.get(kind, 0.0) + norms[row.name] ** 2
        header = ("type", "tensors", "selected", "density", "norm")
        lines = [
            (
                row.kind,
                f"{row.tensors:,}",
                f"{row.nnz:,}",
                f"{row.density:.3f}",
                f"{sqrt(squares.get(row.kind, 0.0)):.4g}",
            )
            for row in [*table.by_kind(), table.total()]
        ]
        return text_table([header, *lines])

    def allclose(self, other: "SparseDelta", rtol: float = 1e-5, atol: float = 1e-8) -> bool:
        """Whether |self - other| <= atol + rtol |other| at every entry that either selects."""
        union = self.mask if same_order(self.mask, other.mask) else self.mask | other.mask
        return torch.allclose(
            spread(self.mask, self.values, union), spread(other.mask, other.values, union),
            rtol=rtol, atol=atol,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of values and mask in memory."""
        return self.values.nbytes + self.mask.nbytes

    def __len__(self) -> int:
        """Number of selected entries."""
        return self.mask.nnz

    def __eq__(self, other: object) -> bool:
        """Equal when they would edit every model alike: mask, values, dtype and fingerprints."""
        if not isinstance(other, SparseDelta):
            return NotImplemented
        if self.values.dtype != other.values.dtype or self.mask != other.mask:
            return False
        own, others = slices_of(self.mask), slices_of(other.mask)
        return self.fingerprints == other.fingerprints and all(
            torch.equal(self.values[part], other.values[others[name]]) for name, part in own.items()
        )

    def __repr__(self) -> str:
        dtype = str(self.values.dtype).removeprefix("torch.")
        where = f"{len(self.mask.names)} tensors, {self.nbytes / 1e6:.1f} MB"
        return f"{type(self).__name__}({len(self):,} {dtype} values in {where})"

    @property
    def largest(self) -> float:
        """The largest magnitude of the values, 0 where there are none."""
        return self._largest

    def _checked_largest(self) -> float:
        if not len(self):
            return 0.0
        low, high = (float(end) for end in torch.aminmax(self.values))
        if isfinite(low) and isfinite(high):
            return max(-low, high)
        rank = int((~torch.isfinite(self.values)).nonzero()[0, 0])
        for name, part in slices_of(self.mask).items():
            if part.start <= rank < part.stop:
                where = int(self.mask.indices[name].positions_int64()[rank - part.start])
                raise TalosValueError(
                    f"values must be finite, got {float(self.values[rank])} at entry {where} of "
                    f"{name}; the training diverged, or a scale or float16 is out of range"
                )
        raise AssertionError("an entry belongs to a tensor")
