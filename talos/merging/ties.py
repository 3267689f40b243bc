"""Trimming by magnitude, and TIES: trim, elect a sign, average what agrees with it.

    trim(tau_t)  = tau_t at its round(density * N) entries of largest |tau_t|, 0 elsewhere
    tau          = sum_t c_t trim(tau_t)                                    trim

    s            = sign(sum_t c_t trim(tau_t));   where that is 0, sign(sum_t sign(c_t trim(tau_t)))
    tau          = mean of c_t trim(tau_t) over the t whose sign is s       ties

N counts all entries of the tensors that a vector's mask covers. Where both signs are 0 no sign has
a majority, and the merged value is 0. Source of TIES: Yadav et al. 2023, arXiv 2306.01708.
The authors of TaLoS take the sign + where the sum is 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from talos.merging.base import Merge, Source
from talos.options import fraction
from talos.task_vectors.choosing import largest
from talos.task_vectors.sums import Overlay

__all__ = ["Ties", "Trim"]


@dataclass(frozen=True, kw_only=True)
class Trim(Merge):
    """The sum of the entries of largest magnitude of each vector.

    Attributes:
        density: the share of the entries that each vector keeps, as in `TaskVector.trim`; one that
            has fewer keeps them all.

    Example:
        >>> Trim(density=0.1).settings()
        {'method': 'trim', 'scaling_coef': 1.0, 'density': 0.1}
    """

    name = "trim"
    density: float = 0.2

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        super().__post_init__()
        self._store(density=fraction("density", self.density))

    def _choose(self, vectors: Sequence[Source]) -> Sequence[Source]:
        return [
            each.then(largest(each.vector.mask.numel, self.density, each.values()))
            for each in vectors
        ]


@dataclass(frozen=True, kw_only=True)
class Ties(Trim):
    """TIES: each entry's mean over the trimmed vectors that agree with its elected sign.

    Attributes:
        density: as in `Trim`.

    Example:
        >>> Ties(density=0.1).settings()
        {'method': 'ties', 'scaling_coef': 1.0, 'density': 0.1}
    """

    name = "ties"
    averages = True

    def _merge_entries(self, overlay: Overlay) -> tuple[Tensor, Tensor | None]:
        rows, elected = overlay.rows(), overlay.total().sign_()
        undecided = elected == 0
        if bool(undecided.any()):
            votes = torch.zeros_like(elected)
            for row in rows:
                votes += row.sign()
            elected = torch.where(undecided, votes.sign_(), elected)
        total, count = torch.zeros_like(elected), torch.zeros_like(elected)
        for row in rows:
            agrees = (row * elected) > 0
            total += row.mul_(agrees)
            count += agrees
        return total / count.clamp_(min=1), None
