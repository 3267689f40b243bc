"""The flat state of all tensors of one param group, device and dtype: what one launch steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from talos_kernels import Index, gather_grad_, sparse_adam_

from .compact_gradient import CompactGradient
from .errors import TalosRuntimeError, TalosTypeError, TalosValueError
from .gradients import CompactedParam
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
        exp_avg: float32 or bfloat16 `[nnz]`, first moment.
        exp_avg_sq: `[nnz]` of the same dtype, second moment.
        master: float32 `[nnz]`, the weights before rounding; None for float32 weights.
        steps: float32 `[tensors]`, steps that each tensor has taken.
        lr: float64 0-dim, the learning rate on the device.
        lr_value: the number that `lr` holds, so that it is uploaded only when it changes.
        base: `[nnz]` of the tensors' dtype, on the CPU: the weights when the bucket was made.
        compacted: the parameters whose gradients are kept compact; none where they are not.
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
    compacted: dict[str, CompactedParam] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep: hooks stay with the parameters that have them."""
        return {**self.__dict__, "compacted": {}}

    @classmethod
    @torch.inference_mode(False)  # the state outlives the caller's mode
    def create(
        cls,
        group: int,
        params: dict[str, Tensor],
        mask: Mask,
        moment_dtype: torch.dtype = torch.float32,
    ) -> Bucket:
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
            torch.zeros_like(weights, dtype=moment_dtype),
            torch.zeros_like(weights, dtype=moment_dtype),
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
            if isinstance(param.grad, CompactGradient):
                self._check_compact(name, param.grad)
            elif param.grad is not None:
                _check_gradient(name, param, param.grad)

    def _check_compact(self, name: str, grad: CompactGradient) -> None:
        own = self.compacted.get(name)
        if own is None or grad.selection is not own.index:
            raise TalosValueError(
                f"{name}.grad must be compacted by this optimizer, got the compact gradient of "
                "another selection; call zero_grad() and compact_gradients() on the one that steps"
            )

    def gradients(self) -> list[Tensor | None]:
        """Each tensor's gradient, dense or compact."""
        grads = [param.grad for param in self.params.values()]
        return [each.entries if isinstance(each, CompactGradient) else each for each in grads]

    def compact_gradients(self, whole: bool, sampled: bool) -> list[CompactedParam]:
        """Where each tensor's gradient goes, made anew."""
        self.compacted = {
            name: CompactedParam(
                param,
                index,
                _rows(param, index),
                whole,
                sampled,
            )
            for (name, param), index in zip(self.params.items(), self.index.split(), strict=True)
        }
        return list(self.compacted.values())

    def step(
        self, group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """One step of the tensors that have a gradient."""
        self._upload_lr(group["lr"])
        sparse_adam_(
            list(self.params.values()),
            self.gradients(),
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
            seed=group["seed"],
        )

    def _upload_lr(self, lr: float | Tensor) -> None:
        if isinstance(lr, Tensor):
            self.lr.copy_(lr.view(()))
            self.lr_value = None
        elif lr != self.lr_value:
            self.lr.fill_(lr)
            self.lr_value = lr

    def densify_gradients(self) -> None:
        """Back to dense gradients."""
        for param in self.params.values():
            if isinstance(param.grad, CompactGradient):
                param.grad = param.grad.to_dense()
        self.compacted = {}

    def squared_norm(self) -> Tensor:
        """The sum of squares of the gradients over the selected entries, 0-dim."""
        grads = [param.grad for param in self.params.values()]
        compact = [each.entries for each in grads if isinstance(each, CompactGradient)]
        norms = torch._foreach_norm(compact) if compact else []
        squares = [norm.square() for norm in norms]
        if len(compact) < len(grads):
            out = torch.empty(self.index.nnz, device=self.index.device)
            dense = [None if isinstance(each, CompactGradient) else each for each in grads]
            squares.append(gather_grad_(out, dense, self.index))
        return torch.stack(squares).sum()

    def dense_squared_norm(self) -> Tensor:
        """The sum of squares of the gradients over all entries of the tensors, 0-dim."""
        squares = []
        for name, param in self.params.items():
            square = None if param.grad is None else self._dense_square(name, param.grad)
            if square is not None:
                squares.append(square)
        zero = torch.zeros((), device=self.index.device)
        return torch.stack([zero, *squares]).sum()

    def _dense_square(self, name: str, grad: Tensor) -> Tensor:
        if not isinstance(grad, CompactGradient):
            return grad.float().square().sum()
        square = self.compacted[name].dense_square(grad)
        if square is None:
            raise TalosRuntimeError(
                f"the norm of {name}'s dense gradient is not known: it is kept by "
                "compact_gradients(dense_norm=True), of a gradient of one use in one backward that "
                "nothing has scaled; call compact_gradients(False) for sums of gradients"
            )
        return square

    def scale_gradients(self, coefficient: Tensor) -> None:
        """Multiply the gradients by a 0-dim tensor, in place where they own their memory."""
        for param in self.params.values():
            dense = not isinstance(param.grad, CompactGradient)
            if param.grad is not None and dense and 0 in param.grad.stride():
                param.grad = param.grad.contiguous()  # expanded: its entries share memory
        grads = [grad for grad in self.gradients() if grad is not None]
        if grads:
            torch._foreach_mul_(grads, coefficient.to(self.index.device))

    def renew(self) -> None:
        """Give the state memory of its own, apart from what `views` handed out so far."""
        self.steps = self.steps.clone()
        self.exp_avg, self.exp_avg_sq = self.exp_avg.clone(), self.exp_avg_sq.clone()
        self.master = None if self.master is None else self.master.clone()

    @torch.no_grad()
    def deltas(self) -> dict[str, Tensor]:
        """Current minus initial weights of each tensor: float32 `[nnz]`, on the CPU."""
        weights = torch.empty(self.index.nnz, device=self.index.device)
        gather_grad_(weights, list(self.params.values()), self.index)
        if self.master is not None:  # a weight that somebody else wrote wins, as in the step
            ours = self.master.to(self.base.dtype).float() == weights
            weights = torch.where(ours, self.master, weights)
        delta = weights.cpu() - self.base.float()
        return {
            name: delta[entries]
            for name, entries in zip(self.params, self.index.slices, strict=True)
        }


def _rows(param: Tensor, index: Index) -> slice:
    """From the first row of dimension 0 to behind the last in which an entry is selected."""
    if param.dim() < 2 or index.nnz in (0, param.numel()):
        return slice(0, len(param) if param.dim() else 1)
    (part,) = index.unpack()
    some = part.decode().view(len(param), -1).any(1).nonzero()
    return slice(int(some[0]), int(some[-1]) + 1)


def _check_gradient(name: str, param: Tensor, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise TalosTypeError(
            f"{name}.grad must be dense, got {grad.layout}; "
            "this optimizer takes dense gradients and trains a sparse selection"
        )
    if grad.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TalosTypeError(f"{name}.grad must be float32, bfloat16 or float16, got {grad.dtype}")
    if grad.shape != param.shape or grad.device != param.device:
        raise TalosValueError(
            f"{name}.grad must be {tuple(param.shape)} on {param.device}, "
            f"got {tuple(grad.shape)} on {grad.device}"
        )
