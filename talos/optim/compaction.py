"""Weight gradients of which at most one is dense at a time.

Autograd makes the dense gradient of every trained weight and keeps it until the step. Here each
gradient is compacted as soon as it exists, to 4 bytes a selected entry:

- A hook that runs after autograd's accumulation gathers the selected entries and drops the rest.
- Most layers use their weight through `torch.nn.functional.linear`. For selected weights it is
  replaced by a function whose backward multiplies into one reused scratch and gathers from there,
  so that autograd sees no weight gradient. Only rows with selected entries are multiplied: a fused
  QKV's values need none. With `sampled` only the selected entries are computed.

`param.grad` is then a `CompactGradient`. The hook alone does the work in code that torch.compile
traces, for weights with hooks of their own, and for weights used in other ways.
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
        rows: the range of rows, along dimension 0, that holds the selected entries.
        sampled: whether `sddmm_` makes a linear layer's gradient, never dense.
        active: False once compacting has stopped.
    """

    param: Tensor
    index: Index
    rows: slice
    sampled: bool = False
    active: bool = True

    def multiply(self, dy: Tensor, x: Tensor) -> None:
        """Add the gradient dyᵀ x; see `Receiver`."""
        if self.sampled and x.dtype != torch.float64:
            self.receive(dy, x)
            return
        scratch = _scratch(self.param, x.dtype)
        torch.mm(dy[:, self.rows].t(), x, out=scratch[self.rows])
        self.receive(scratch)

    def receive(self, *gradient: Tensor) -> None:
        """Add the selected entries of a gradient to `param.grad`.

        Args:
            gradient: a dense one, or the factors `dy` and `x` for `sddmm_`.
        """
        found = self.param.grad
        if found is not None and not isinstance(found, CompactGradient):
            self.compact()  # other code assigned a dense one
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
        """Replace a dense `param.grad` by a compact one; runs after autograd's accumulation."""
        dense = self.param.grad
        if dense is None or isinstance(dense, CompactGradient) or dense.layout != torch.strided:
            return
        self.param.grad = None
        self.receive(dense)


def _write(
    out: Tensor, gradient: tuple[Tensor, ...], index: Index, *, accumulate: bool = False
) -> None:
    """Write or add the selected entries of a dense gradient or of two factors' product."""
    if len(gradient) == 2:
        sddmm_(out, *gradient, index, accumulate=accumulate)
    else:
        gather_grad_(out, gradient, index, accumulate=accumulate)


def compact(params: list[CompactedParam]) -> Callable[[], None]:
    """Keep the gradients of parameters compact until the returned function is called."""
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
    """Return uninitialised memory for one dense weight gradient.

    Each thread and stream has its own, so that none writes what another still reads. A CUDA graph
    gets new memory, which belongs to the graph.
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
