"""Random masks: the control that tells what calibration is worth at the same density."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from talos.masks import Mask
from talos.methods.base import (
    Hyperparameters,
    LogitsFunction,
    Method,
    Phase,
    check_density,
    check_seed,
)
from talos.methods.talos import Sparse
from talos.params import select_parameters

__all__ = ["Random"]


@dataclass(frozen=True)
class Random(Method):
    """Entries drawn at random, each set of them equally likely, trained as TaLoS trains its own.

    Attributes:
        density: the fraction trained of what `params` names.
        params: as `talos.calibrate` takes it.
        seed: of the draw; the same entries for every task.

    Example:
        >>> Random(density=0.2).metadata
        {'method': 'random', 'density': 0.2, 'params': 'maskable', 'method_seed': 0}
    """

    name = "random"
    usual_lr = 1e-3
    density: float = 0.1
    params: str = "maskable"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a density or a seed out of range."""
        check_density(self.density)
        check_seed(self.seed)

    def start(self, model: nn.Module, hyper: Hyperparameters, logits_fn: LogitsFunction) -> Phase:
        """See `Method.start`."""
        selection = select_parameters(model, self.params)
        generator = torch.Generator().manual_seed(self.seed)
        options: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
        scores = {n: torch.rand(each.param.shape, **options) for n, each in selection.items()}
        mask = Mask.from_scores(scores, self.density, rows=selection.rows)
        return Sparse(model, mask, hyper, logits_fn, self.metadata)
