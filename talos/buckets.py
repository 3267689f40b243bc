"""The flat state of all tensors of one param group, device and dtype: what one launch steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from talos_kernels import Index, gather_grad_, sparse_adam_

from .errors import TalosRuntimeError, TalosTypeError
from .masks import Mask

__all__ = ["Bucket"]


@dataclass(eq=False)
class Bucket:
    """Tensors that are stepped together, and their state in rank order.

    Attributes:
        group: number of their param group.
        params: by name, in the order of the index; one device and dtype.
        shapes: their shapes when the bucket was made.
        index: the selected entries, on their device.
        exp_avg: float32 `[nnz]`, first moment.
        exp_avg_sq: float32 `[nnz]`, second moment.
        master: float32 `[nnz]`, the weights before rounding; None for float32 weights.
        steps: float32 `[tensors]`, steps that each tensor has taken.
        lr: float64 0-dim, the learning rate on the device.
        lr_value: the number that `lr` holds, so that it is uploaded only when it changes.
        base: `[nnz]` of the tensors' dtype, on the CPU: the weights when the bucket was made.
    """

    group: int
    params: dict[str, Tensor]
    shapes: dict[str, torch.Size]
    index: Index
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None
    steps: Tensor
    lr: Tensor
    lr_value: float | None
    base: Tensor

    @classmethod
    def create(cls, group: int, params: dict[str, Tensor], mask: Mask) -> Bucket:
        """State of zeros for these tensors, whose names are the mask's."""
        first = next(iter(params.values()))
        index = mask.pack(list(params), first.device)
        weights = torch.empty(index.nnz, device=first.device)
        with torch.no_grad():
            gather_grad_(weights, list(params.values()), index)
        return cls(
            group,
            params,
            {name: param.shape for name, param in params.items()},
            index,
            torch.zeros_like(weights),
            torch.zeros_like(weights),
            weights if first.dtype != torch.float32 else None,
            torch.zeros(len(params), device=first.device),
            torch.zeros((), dtype=torch.float64, device=first.device),
            None,
            weights.to("cpu", first.dtype, copy=True),
        )

    def views(self) -> dict[Tensor, dict[str, Tensor]]:
        """Each tensor's part of the flat state, as `Optimizer.state` holds it."""
        state = {}
        for i, (param, entries) in enumerate(
            zip(self.params.values(), self.index.slices, strict=True)
        ):
            state[param] = {
                "step": self.steps[i],
                "exp_avg": self.exp_avg[entries],
                "exp_avg_sq": self.exp_avg_sq[entries],
            }
            if self.master is not None:
                state[param]["master"] = self.master[entries]
        return state

    def check(self) -> None:
        """Refuse tensors and gradients that are no longer what the state belongs to."""
        for name, param in self.params.items():
            if param.device != self.index.device or param.dtype != self.base.dtype:
                raise TalosRuntimeError(
                    f"{name} was {self.base.dtype} on {self.index.device} when the optimizer was "
                    f"made, is {param.dtype} on {param.device}; move or cast the model first"
                )
            if param.shape != self.shapes[name]:
                raise TalosRuntimeError(
                    f"{name} had shape {tuple(self.shapes[name])} when the optimizer was made, "
                    f"has {tuple(param.shape)}; make a new optimizer"
                )
            if param.grad is not None and param.grad.layout != torch.strided:
                raise TalosTypeError(
                    f"{name}.grad must be dense, got {param.grad.layout}; "
                    "this optimizer takes dense gradients and trains a sparse selection"
                )

    def step(
        self, group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """One step of the tensors that have a gradient."""
        grads = [param.grad for param in self.params.values()]
        taken: Tensor | float = 1.0
        if any(grad is None for grad in grads):
            has_grad = [float(grad is not None) for grad in grads]
            taken = torch.tensor(has_grad, device=self.index.device)
        if found_inf is not None:
            taken = taken * (found_inf.to(self.index.device) == 0)
        self.steps.add_(taken)
        self._upload_lr(group["lr"])
        sparse_adam_(
            list(self.params.values()),
            grads,
            self.index,
            self.exp_avg,
            self.exp_avg_sq,
            self.steps,
            lr=self.lr,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            master=self.master,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )

    def _upload_lr(self, lr: float | Tensor) -> None:
        if isinstance(lr, Tensor):
            self.lr.copy_(lr.view(()))
            self.lr_value = None
        elif lr != self.lr_value:
            self.lr.fill_(lr)
            self.lr_value = lr

    def gather_gradients(self) -> tuple[Tensor, Tensor]:
        """The compact gradient, float32 `[nnz]`, and its sum of squares, 0-dim."""
        out = torch.empty(self.index.nnz, device=self.index.device)
        return out, gather_grad_(out, [param.grad for param in self.params.values()], self.index)

    @torch.no_grad()
    def deltas(self) -> dict[str, Tensor]:
        """Current minus initial weights of each tensor: float32 `[nnz]`, on the CPU."""
        weights = self.master
        if weights is None:
            weights = torch.empty(self.index.nnz, device=self.index.device)
            gather_grad_(weights, list(self.params.values()), self.index)
        delta = weights.cpu() - self.base.float()
        return {
            name: delta[entries]
            for name, entries in zip(self.params, self.index.slices, strict=True)
        }
