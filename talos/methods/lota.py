"""LoTA: train every weight, then only those that moved most, from the start.

    tau  = theta* - theta_0                  after fine-tuning every weight
    mask = the round(density * N) entries with the largest |tau| of all N
    theta <- theta_0, then the masked entries are trained; the others keep every bit

Source: Panda et al. 2024, "Lottery Ticket Adaptation", arXiv 2406.16797.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from talos.masks import Mask
from talos.methods.base import Method, Phase, Setup, trainable
from talos.methods.nonlinear import Dense
from talos.methods.talos import Sparse
from talos.optim.param_groups import check_not_wrapped, check_trainable
from talos.options import fraction, positive
from talos.tensors import KeptBuffers

__all__ = ["Lota"]


@dataclass(frozen=True)
class Lota(Method):
    """Two trainings of all steps each: of every weight, then of those that moved most.

    Attributes:
        density: the fraction of all trainable weights that the second training has.
        sparse_lr: the second training's peak learning rate; None: that of the first. A few weights
            need a larger one than all of them (see `Talos.usual_lr`).

    Example:
        >>> Lota(density=0.2).metadata
        {'method': 'lota', 'density': 0.2}
    """

    name = "lota"
    phases = 2
    usual_lr = 5e-5
    density: float = 0.1
    sparse_lr: float | None = None

    def __post_init__(self) -> None:
        """Refuse settings out of range before the first training."""
        self._store(density=fraction("density", self.density))
        if self.sparse_lr is not None:
            self._store(sparse_lr=positive("sparse_lr", self.sparse_lr))

    def _first_phase(self, setup: Setup) -> Phase:
        return _Search(self, setup)


class _Search(Dense):
    """The first training, of every weight; its changes decide the mask."""

    def __init__(self, method: Lota, setup: Setup) -> None:
        params = trainable(setup.model)
        # Refuse before the first training what the second cannot take.
        check_not_wrapped(params.values())
        for name, param in params.items():
            check_trainable(name, param)
        super().__init__(setup, params)
        self.method, self.setup = method, setup
        self.buffers = KeptBuffers(setup.model)

    @torch.no_grad()
    def following(self) -> Phase:
        """Restore the initial weights, and return the training of those that moved most."""
        moved = {n: (p - self.base[n]).abs_().float() for n, p in self.trained.items()}
        mask = Mask.from_scores(moved, self.method.density, select="highest")
        for name, param in self.trained.items():
            param.copy_(self.base[name])
        self.buffers.restore()
        return self._second(mask)

    def resumed(self, state: Mapping[str, Tensor]) -> Phase:
        """See `Phase.resumed`: a state with a mask is that of the second training."""
        dense = {
            name: _unpacked(state[f"mask/{name}"], param)
            for name, param in self.trained.items()
            if f"mask/{name}" in state
        }
        if not dense:
            return super().resumed(state)
        made = {"density": self.method.density, "select": "highest"}  # as `following` makes it
        phase = self._second(Mask.from_dense(dense, metadata=made))
        phase.load(state)
        return phase

    def _second(self, mask: Mask) -> Phase:
        phase = _Second(self.setup, mask)
        phase.lr = self.method.sparse_lr
        return phase


class _Second(Sparse):
    """The second training; its checkpoints hold the mask that the first one found."""

    def state(self) -> dict[str, Tensor]:
        """See `Phase.state`."""
        return super().state() | {
            f"mask/{name}": _packed(self.mask.to_dense(name)) for name in self.mask.names
        }


def _packed(dense: Tensor) -> Tensor:
    """Return a selection as bits: uint8."""
    return torch.from_numpy(np.packbits(dense.reshape(-1).numpy()))


def _unpacked(bits: Tensor, like: Tensor) -> Tensor:
    """Return the selection of a tensor."""
    dense = np.unpackbits(bits.numpy(), count=like.numel())
    return torch.from_numpy(dense).bool().reshape(like.shape)
