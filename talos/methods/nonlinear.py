"""Non-linear fine-tuning: AdamW over every weight, the method that task arithmetic began with.

Source: Ilharco et al. 2023, "Editing models with task arithmetic", arXiv 2212.04089.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from talos.methods.base import Method, Phase, Setup, trainable, untrained
from talos.task_vectors import TaskVector

__all__ = ["Dense", "Nonlinear", "clip"]


@dataclass(frozen=True)
class Nonlinear(Method):
    """AdamW over every parameter that requires a gradient.

    Example:
        >>> Nonlinear().metadata
        {'method': 'nonlinear'}
    """

    name = "nonlinear"
    usual_lr = 5e-5

    def _first_phase(self, setup: Setup) -> Phase:
        return Dense(setup, trainable(setup.model))


class Dense(Phase):
    """AdamW over whole parameters; the model's others are frozen.

    Args:
        setup: as `Method.start` makes it.
        params: the parameters to train, by name.
        base: the initial weights of `params`; None: copies of the present ones.
    """

    trained: dict[str, nn.Parameter]

    def __init__(
        self,
        setup: Setup,
        params: dict[str, nn.Parameter],
        base: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(setup)
        self.trained = params
        self.base = base or {name: param.detach().clone() for name, param in params.items()}
        fused = all(param.device.type in ("cpu", "cuda") for param in params.values())
        self.optimizer = torch.optim.AdamW(list(params.values()), fused=fused, **setup.hyper)
        self.others = untrained(setup.model, params.values())

    def clip(self, max_norm: float) -> Tensor:
        """See `Phase.clip`."""
        return clip(self.trained.values(), max_norm)

    def task_vector(self) -> TaskVector:
        """See `Phase.task_vector`."""
        return TaskVector.from_models(self.base, self.trained, metadata=self.metadata)


def clip(params: Iterable[Tensor], max_norm: float) -> Tensor:
    """Clip the norm over all gradients and return it; infinity: only return it."""
    if max_norm == math.inf:
        return nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    return nn.utils.clip_grad_norm_(params, max_norm)
