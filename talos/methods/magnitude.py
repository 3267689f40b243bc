"""Masks by the magnitude of the pretrained weights: the control that needs no data."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from talos.errors import TalosValueError
from talos.masks import Mask
from talos.methods.base import Hyperparameters, LogitsFunction, Method, Phase, check_density
from talos.methods.talos import Sparse
from talos.params import select_parameters

__all__ = ["Magnitude"]


@dataclass(frozen=True)
class Magnitude(Method):
    """The smallest (or largest) weights, trained as TaLoS trains its own.

    Attributes:
        density: the fraction trained of what `params` names.
        params: as `talos.calibrate` takes it.
        select: `lowest`, what pruning by magnitude holds to matter least, or `highest`.

    Example:
        >>> Magnitude(select="highest").metadata["select"]
        'highest'
    """

    name = "magnitude"
    usual_lr = 1e-3
    density: float = 0.1
    params: str = "maskable"
    select: Literal["lowest", "highest"] = "lowest"

    def __post_init__(self) -> None:
        """Refuse a density or a selection out of range."""
        check_density(self.density)
        if self.select not in ("lowest", "highest"):
            raise TalosValueError(f"select must be 'lowest' or 'highest', got {self.select!r}")

    def start(self, model: nn.Module, hyper: Hyperparameters, logits_fn: LogitsFunction) -> Phase:
        """See `Method.start`."""
        selection = select_parameters(model, self.params)
        scores = {name: each.param.detach().float().abs() for name, each in selection.items()}
        mask = Mask.from_scores(scores, self.density, self.select, rows=selection.rows)
        return Sparse(model, mask, hyper, logits_fn, self.metadata)
