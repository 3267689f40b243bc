"""TaLoS: `SparseAdam` over the entries that a mask selects.

Source: arXiv 2504.02620, equation 8.
"""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from talos.distributed import is_sharded
from talos.errors import TalosTypeError
from talos.masks import Mask
from talos.methods.base import Method, Phase, Setup
from talos.optim import SparseAdam
from talos.task_vectors import TaskVector

__all__ = ["Sparse", "Talos"]


@dataclass(frozen=True)
class Talos(Method):
    """Only the entries that a mask selects.

    Attributes:
        mask: as `talos.calibrate` returns it.

    Example:
        >>> import torch
        >>> Talos(Mask.from_dense({"weight": torch.eye(2) > 0})).metadata
        {'method': 'talos'}
    """

    name = "talos"
    usual_lr = 1e-3
    mask: Mask

    def __post_init__(self) -> None:
        """Refuse what is not a mask."""
        if not isinstance(self.mask, Mask):
            raise TalosTypeError(
                f"mask must be a talos.Mask, got {type(self.mask).__name__}; find one with "
                "talos.calibrate"
            )

    def _first_phase(self, setup: Setup) -> Phase:
        return Sparse(setup, self.mask)

    @property
    def metadata(self) -> dict[str, Any]:
        """The method's name; the task vector holds the mask itself."""
        return {"method": self.name}


class Sparse(Phase):
    """Trains what a mask selects; tensors without a selected entry are frozen.

    Args:
        setup: as `Method.start` makes it.
        mask: the entries to train.
    """

    optimizer: SparseAdam

    def __init__(self, setup: Setup, mask: Mask) -> None:
        super().__init__(setup)
        self.mask = mask
        self.optimizer = SparseAdam(setup.model, mask, **setup.hyper)
        self.trained = {
            name: param
            for group in self.optimizer.param_groups
            for name, param in zip(group["param_names"], group["params"], strict=True)
        }
        self.optimizer.release()  # `freeze` freezes again, when the loop begins

    def freeze(self) -> None:
        """Freeze the tensors without a selected entry, and keep gradients compact."""
        self.optimizer.freeze()
        if not any(map(is_sharded, self.trained.values())):
            self.optimizer.compact_gradients()

    def release(self) -> None:
        """Turn their gradients on again."""
        self.optimizer.release()

    def check_gradients(self) -> None:
        """Warn of selected tensors that got no gradient."""
        missing = sum(param.grad is None for param in self.trained.values())
        if missing:
            warnings.warn(
                f"{missing} of {len(self.trained)} selected tensors got no gradient in the first "
                "step and are not trained; activation checkpointing needs use_reentrant=False",
                stacklevel=6,
            )

    def clip(self, max_norm: float) -> Tensor:
        """See `Phase.clip`: the norm is that of the selected entries."""
        return self.optimizer.clip_grad_norm_(max_norm, defer=True)

    def task_vector(self) -> TaskVector:
        """See `Phase.task_vector`."""
        vector = self.optimizer.task_vector()
        moved = {k: v for k, v in vector.metadata.items() if k == "moved_buffers"}
        return replace(vector, metadata={**self.metadata, **moved})

    def state(self) -> dict[str, Tensor]:
        """See `Phase.state`; without the initial weights, which the next phase has of its own."""
        return {
            place: value
            for place, value in super().state().items()
            if not (place.startswith("state/") and place.endswith(("/base", "/fingerprint")))
        }

    def _moments(self, name: str) -> dict[str, torch.dtype]:
        own = self.trained[name].dtype
        kept = torch.promote_types(own, torch.float32)
        return dict.fromkeys(("exp_avg", "exp_avg_sq", *(["master"] if kept != own else [])), kept)

    def _values(self, name: str) -> Tensor:
        param = self.trained[name].detach()
        return param[self.mask.to_dense(name).to(param.device)]

    def _set_values(self, name: str, weights: Tensor) -> None:
        param = self.trained[name]
        param[self.mask.to_dense(name).to(param.device)] = weights.to(param.device)
