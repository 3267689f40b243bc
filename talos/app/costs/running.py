"""One form of fine-tuning, ready to iterate: what is called, and the memory that it holds."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from talos.app.costs.meters import held_bytes
from talos.app.costs.workload import Workload
from talos.masks import Mask
from talos.methods import LogitsFunction, Phase
from talos.optim.compact_gradient import CompactGradient
from talos.tensors import tensors_in

__all__ = ["HYPER", "Form", "Running", "stored_in"]

HYPER: dict[str, Any] = {"lr": 1e-7, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
"""Of every form's AdamW; without weight decay, so that a masked gradient keeps a weight, and so
slow that no form learns its batch by heart: gradients that underflow take a CPU ten times as long.
"""


@dataclass(frozen=True)
class Form:
    """One way to fine-tune.

    Attributes:
        name: in files.
        title: for people.
        start: prepares a workload's model, in place, and returns what iterates.
        missing: why it cannot be measured on a workload; None: it can.
    """

    name: str
    title: str
    start: "Callable[[Workload], Running]"
    missing: Callable[[Workload], str | None] = lambda _: None


@dataclass
class Running:
    """A form at work; `close` gives the model back with what training changed in it.

    Attributes:
        workload: what is trained.
        module: what the loss is computed of.
        logits_fn: how its logits are had.
        optimizer: what holds the state.
        update: the step, with all that it needs after the backward.
        allowed: the entries that may move; None: all.
        bytes_moved: by a step at least, by its model; None where there is none.
        own_state: what is kept from step to step beside the optimizer's state.
        index_bytes: of the compressed selection.
        finish: called at the end.
        separate: whether `module` trains a copy of the model, or weights beside it.
    """

    workload: Workload
    module: nn.Module
    logits_fn: LogitsFunction
    optimizer: torch.optim.Optimizer
    update: Callable[[], object]
    allowed: Callable[[], Mask | None] = lambda: None
    bytes_moved: int | None = None
    own_state: Any = ()
    index_bytes: int = 0
    finish: Callable[[], object] = lambda: None
    separate: bool = False

    @classmethod
    def of_phase(cls, workload: Workload, phase: Phase, **about: Any) -> "Running":
        """What a method's phase does in the training loop.

        Args:
            workload: what is trained.
            phase: not begun.
            **about: further attributes.

        Returns:
            The form at work.
        """
        phase.freeze()
        about = {"update": phase.step, "finish": phase.release} | about
        return cls(workload, phase.module, phase.logits_fn, phase.optimizer, **about)

    def forward_backward(self) -> Tensor:
        """Drops all gradients and makes new ones.

        Returns:
            The loss, 0-dim.
        """
        self.zero_grad()
        loss = self.workload.loss(self.module, self.logits_fn)
        loss.backward()
        return loss.detach()

    def zero_grad(self) -> None:
        """Drops all gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        for param in self.module.parameters():
            param.grad = None

    def weight_bytes(self, before: Iterable[Tensor]) -> int:
        """Memory of all weights and buffers.

        Args:
            before: those that the workload's model had before the form began.

        Returns:
            Bytes; what is held elsewhere than on the workload's device is none.
        """
        found = [*self.module.parameters(), *self.module.buffers()]
        found += [] if self.separate else before  # weights that others stand for
        return held_bytes(found, self.workload.device)

    def state_bytes(self) -> int:
        """Memory kept from step to step.

        Returns:
            Bytes of the optimizer's state, of the selection, and of what the form adds.
        """
        kept = [*stored_in(self.optimizer.state), *stored_in(self.own_state)]
        return held_bytes(kept, self.workload.device) + self.index_bytes

    def gradient_bytes(self) -> tuple[int, int]:
        """Memory of the gradients after a backward.

        Returns:
            Bytes that the backward allocated, and bytes that are held all the time: the scratch in
            which one compact gradient after the other is dense.
        """
        groups = self.optimizer.param_groups  # adapters are no part of the module
        params = {*self.module.parameters(), *(p for group in groups for p in group["params"])}
        grads = [param.grad for param in params if param.grad is not None]
        compact = [each for each in grads if isinstance(each, CompactGradient)]
        dense = (each for each in grads if not isinstance(each, CompactGradient))
        made = held_bytes((*dense, *(each.entries for each in compact)), self.workload.device)
        scratch = max((each.numel() for each in compact), default=0)
        return made, scratch * self.workload.dtype.itemsize

    def selected_gradient(self) -> Tensor | None:
        """The gradient at the workload's selected entries.

        Returns:
            float32 `[nnz]` on the CPU; None where the form trains another selection.
        """
        if self.separate or self.allowed() is not self.workload.mask:
            return None
        params = dict(self.workload.model.named_parameters())
        found = []
        for name in self.workload.mask.names:
            grad = params[name].grad
            if grad is None:
                return None
            if isinstance(grad, CompactGradient):
                found.append(grad.entries.cpu())
            else:
                found.append(grad.cpu()[self.workload.mask.to_dense(name).cpu()].float())
        return torch.cat(found)

    def close(self) -> None:
        """Drops the gradients and lets the model's weights be trained again."""
        self.zero_grad()
        self.finish()


def stored_in(tree: Any) -> Iterator[Tensor]:
    """The tensors that nested mappings and sequences keep memory in.

    Args:
        tree: any.

    Yields:
        Each; of torchao's quantised ones the parts.

    Example:
        >>> [each.numel() for each in stored_in({"a": [torch.zeros(2)], "b": 3})]
        [2]
    """
    for tensor in tensors_in(tree):
        if hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            yield from stored_in([getattr(tensor, name) for name in names])
        else:
            yield tensor
