"""Weight gradients that are never dense, or only one at a time.

Autograd makes the dense gradient of every weight that is trained and keeps it until the step. Here
a gradient is compacted the moment it exists, into 4 bytes a selected entry:

- a hook behind autograd's accumulation gathers what it has made and drops it;
- `torch.nn.functional.linear`, by which most layers reach their weight, is routed for the selected
  weights to a function whose backward multiplies into one reused scratch, only the rows that hold
  selected entries (the values of a fused QKV need none), and gathers from there, so that autograd
  sees no weight gradient at all; or, where that is asked for, computes the selected entries alone.

`param.grad` is a `CompactGradient` then. In code that torch.compile traces, of a weight that has
hooks of its own, and where a weight is reached otherwise, the hook alone does it.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from talos.optim.compact_gradient import CompactGradient
from talos.optim.linear_backward import route, unroute
from talos_kernels import Index, gather_grad_, sddmm_

__all__ = ["CompactedParam", "compact"]


@dataclass(eq=False)
class CompactedParam:
    """A parameter whose gradient is kept compact.

    Attributes:
        param: the parameter.
        index: its selected entries, on its device.
        rows: of dimension 0, those from the first to behind the last with a selected entry.
        sampled: whether a linear layer's gradient is made by `sddmm_`, never dense.
        active: whether gradients are still to be compacted.
    """

    param: Tensor
    index: Index
    rows: slice
    sampled: bool = False
    active: bool = True

    def multiply(self, dy: Tensor, x: Tensor) -> None:
        """Adds a gradient that was not multiplied: see `Receiver`."""
        if self.sampled and x.dtype != torch.float64:
            self.receive(dy, x)
            return
        scratch = _scratch(self.param, x.dtype)
        torch.mm(dy[:, self.rows].t(), x, out=scratch[self.rows])
        self.receive(scratch)

    def receive(self, *gradient: Tensor) -> None:
        """Adds a gradient to `param.grad`, of which the selected entries are kept.

        Args:
            gradient: the dense one, or `dy` and `x` of `sddmm_`, whose product it is.
        """
        found = self.param.grad
        if found is not None and not isinstance(found, CompactGradient):
            self.compact()  # somebody assigned a dense one
            found = self.param.grad
        if isinstance(found, CompactGradient):
            _write(found.entries, gradient, found.selection, accumulate=True)
            return
        if self.index.device != self.param.device:  # the model moved since the optimizer was made
            self.index = self.index.to(self.param.device)
        wide = torch.promote_types(self.param.dtype, torch.float32)
        entries = torch.empty(self.index.nnz, dtype=wide, device=self.index.device)
        _write(entries, gradient, self.index)
        self.param.grad = CompactGradient.of(self.param, self.index, entries)

    def compact(self, _: Tensor | None = None) -> None:
        """Replaces a dense `param.grad` by a compact one; the hook behind the accumulation."""
        dense = self.param.grad
        if dense is None or isinstance(dense, CompactGradient) or dense.layout != torch.strided:
            return
        self.param.grad = None
        self.receive(dense)


def _write(
    out: Tensor, gradient: tuple[Tensor, ...], index: Index, *, accumulate: bool = False
) -> None:
    """Writes or adds the selected entries of a gradient, which is dense or the factors of one."""
    if len(gradient) == 2:
        sddmm_(out, *gradient, index, accumulate=accumulate)
    else:
        gather_grad_(out, gradient, index, accumulate=accumulate)


def compact(params: list[CompactedParam]) -> Callable[[], None]:
    """Keeps the gradients of parameters compact until the returned function is called."""
    hooks = [each.param.register_post_accumulate_grad_hook(each.compact) for each in params]
    route([each for each in params if each.param.dim() == 2])
    _compacted.update(params)

    def stop() -> None:
        unroute(params)
        _compacted.difference_update(params)
        if not _compacted:
            _scratches.clear()
        for hook in hooks:
            hook.remove()

    return stop


_compacted: set[CompactedParam] = set()
_scratches: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}


def _scratch(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for one dense weight gradient; what it holds is of no meaning.

    Each thread and stream has its own, so that nobody writes what another still reads. What a
    CUDA graph captures is not kept: its memory is the graph's, and goes with it.
    """
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.empty(weight.shape, dtype=dtype, device=weight.device)
    stream = torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else 0
    key = threading.get_ident(), stream, weight.device, dtype
    kept = _scratches.get(key)
    if kept is None or kept.numel() < weight.numel():
        kept = torch.empty(weight.numel(), dtype=dtype, device=weight.device)
        _scratches[key] = kept
    return kept[: weight.numel()].view(weight.shape)
