"""Controls: as many entries as TaLoS trains, chosen without calibration.

They show what calibration is worth at the same density.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch

from talos.errors import TalosValueError
from talos.masks import Mask
from talos.methods.base import Method, Phase, Setup
from talos.methods.talos import Sparse
from talos.options import fraction, read_seed
from talos.params import Candidates, select_parameters

__all__ = ["Magnitude", "Random"]


@dataclass(frozen=True)
class _Control(Method):
    """Trains the entries of a mask that needs no data."""

    usual_lr = 1e-3
    density: float = 0.1
    params: str = "maskable"

    def __post_init__(self) -> None:
        """Refuse a density out of range."""
        self._store(density=fraction("density", self.density))

    def _first_phase(self, setup: Setup) -> Phase:
        return Sparse(setup, self._mask(select_parameters(setup.model, self.params)))

    @abstractmethod
    def _mask(self, candidates: Candidates) -> Mask:
        """Choose among the candidates."""


@dataclass(frozen=True)
class Random(_Control):
    """Entries drawn at random; every set of them is equally likely.

    Attributes:
        density: the fraction of the candidates to train.
        params: the candidates, as `talos.calibrate` takes them.
        seed: of the draw; the same entries for every task.

    Example:
        >>> Random(density=0.2).metadata
        {'method': 'random', 'density': 0.2, 'params': 'maskable', 'method_seed': 0}
    """

    name = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a density or a seed out of range."""
        super().__post_init__()
        self._store(seed=read_seed(self.seed))

    def _mask(self, candidates: Candidates) -> Mask:
        generator = torch.Generator().manual_seed(self.seed)
        options: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
        scores = {n: torch.rand(each.param.shape, **options) for n, each in candidates.items()}
        return Mask.from_scores(scores, self.density, rows=candidates.rows)


@dataclass(frozen=True)
class Magnitude(_Control):
    """The smallest or largest pretrained weights.

    Attributes:
        density: the fraction of the candidates to train.
        params: the candidates, as `talos.calibrate` takes them.
        select: `lowest`, which pruning by magnitude takes to matter least, or `highest`.

    Example:
        >>> Magnitude(select="highest").metadata["select"]
        'highest'
    """

    name = "magnitude"
    select: Literal["lowest", "highest"] = "lowest"

    def __post_init__(self) -> None:
        """Refuse a density or a selection out of range."""
        super().__post_init__()
        if self.select not in ("lowest", "highest"):
            raise TalosValueError(f"select must be 'lowest' or 'highest', got {self.select!r}")

    def _mask(self, candidates: Candidates) -> Mask:
        scores = {name: each.param.detach().float().abs() for name, each in candidates.items()}
        return Mask.from_scores(scores, self.density, self.select, rows=candidates.rows)
