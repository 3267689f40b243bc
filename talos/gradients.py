"""Weight gradients that are never dense, or only one at a time.

Autograd makes the dense gradient of every weight that is trained and keeps it until the step. Here
a gradient is compacted the moment it exists, into float32 memory that all steps share:

- a hook behind autograd's accumulation gathers what it has made and drops it;
- `torch.nn.functional.linear`, by which most layers reach their weight, is routed for the selected
  weights to a function whose backward multiplies into one reused scratch, only the rows that hold
  selected entries (the values of a fused QKV need none), and gathers from there, so that autograd
  sees no weight gradient at all.

`param.grad` is a `CompactGradient` then. In code that torch.compile traces, of a weight that has
hooks of its own, and where a weight is reached otherwise, the hook alone does it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.weak import TensorWeakRef

from talos_kernels import Index, gather_grad_

from .compact_gradient import CompactGradient

__all__ = ["CompactedParam", "compact"]


@dataclass(eq=False)
class CompactedParam:
    """A parameter whose gradient is kept compact.

    Attributes:
        param: the parameter.
        index: its selected entries, on its device.
        values: float32 `[nnz]`, where its gradient goes.
        rows: of dimension 0, those from the first to behind the last with a selected entry.
        whole: whether all rows are multiplied and the dense gradient's norm is kept.
        norm: the sum of squares of the last dense gradient, 0-dim, and the version of `values`
            that was gathered from it.
    """

    param: Tensor
    index: Index
    values: Tensor
    rows: slice
    whole: bool = False
    norm: tuple[Tensor, int] | None = None

    @property
    def dense_square(self) -> Tensor | None:
        """The sum of squares of the dense gradient, 0-dim; None: of this gradient it is not known.

        Of a sum of gradients it is not the sum of theirs.
        """
        known = self.norm is not None and self.norm[1] == self.values._version
        return self.norm[0] if known and self.norm is not None else None

    def receive(self, dense: Tensor) -> None:
        """Adds a dense gradient to `param.grad`, of which the selected entries are kept."""
        found = self.param.grad
        if found is not None and not isinstance(found, CompactGradient):
            self.compact()  # somebody assigned a dense one
            found = self.param.grad
        accumulate = found is not None
        gather_grad_(self.values, [dense], self.index, accumulate=accumulate)
        if self.whole and not accumulate:
            self.norm = dense.float().square().sum(), self.values._version
        if not accumulate:
            self.param.grad = CompactGradient(self.values, self.index, self.param)

    def compact(self, _: Tensor | None = None) -> None:
        """Replaces a dense `param.grad` by a compact one; the hook behind the accumulation."""
        dense = self.param.grad
        if dense is None or isinstance(dense, CompactGradient) or dense.layout != torch.strided:
            return
        self.param.grad = None
        self.receive(dense)


def compact(params: list[CompactedParam]) -> Callable[[], None]:
    """Keeps the gradients of parameters compact until the returned function is called."""
    hooks = [each.param.register_post_accumulate_grad_hook(each.compact) for each in params]
    matrices = [each for each in params if each.param.dim() == 2]
    _route(matrices)

    def stop() -> None:
        _unroute(matrices)
        for hook in hooks:
            hook.remove()

    return stop


_lock = threading.Lock()
_routed: dict[int, CompactedParam] = {}
_linear = functional.linear
_local = threading.local()  # a thread's scratch and its last cast: autograd has one a device


def _route(params: list[CompactedParam]) -> None:
    global _linear
    with _lock:
        if not _routed and functional.linear is not _routing_linear:
            _linear = functional.linear
            functional.linear = _routing_linear
        _routed.update({id(each.param): each for each in params})


def _unroute(params: list[CompactedParam]) -> None:
    with _lock:
        for each in params:
            if _routed.get(id(each.param)) is each:
                del _routed[id(each.param)]
        if not _routed and functional.linear is _routing_linear:
            functional.linear = _linear


def _routing_linear(
    input: Tensor,  # noqa: A002, torch's name
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.linear` as long as a weight is routed."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _linear(input, weight, bias)
    target = _routed.get(id(weight))
    if (
        target is None
        or not weight.requires_grad
        or weight._backward_hooks  # somebody wants to see or change the dense gradient
        or type(input) is not Tensor
        or torch._C._are_functorch_transforms_active()
    ):
        return _linear(input, weight, bias)
    inputs, cast, cast_bias = input.detach(), weight.detach(), bias
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        inputs, cast = _shared_cast(input, dtype), cast.to(dtype)
        cast_bias = None if bias is None else bias.to(dtype)
    return compact_linear(input, inputs, weight, cast, cast_bias, target)


def _shared_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` without its history in another dtype: queries, keys and values share one cast."""
    if x.dtype == dtype:
        return x.detach()
    last = getattr(_local, "cast", None)
    if last is not None:
        source, version, kept = last
        cast = kept()
        if source() is x and version == x._version and cast is not None and cast.dtype == dtype:
            return cast  # type: ignore[no-any-return]
    cast = x.detach().to(dtype)
    _local.cast = TensorWeakRef(x), x._version, TensorWeakRef(cast)
    return cast


def _scratch(weight: Tensor) -> Tensor:
    """The thread's memory for one dense weight gradient; what it holds is of no meaning."""
    kept: dict[tuple[torch.device, torch.dtype], Tensor]
    kept = _local.__dict__.setdefault("scratch", {})
    key = weight.device, weight.dtype
    if key not in kept or kept[key].numel() < weight.numel():
        kept[key] = torch.empty(weight.numel(), dtype=weight.dtype, device=weight.device)
    return kept[key][: weight.numel()].view(weight.shape)


class _CompactLinear(torch.autograd.Function):
    """`linear` whose backward gives the weight's gradient to `target` and none to autograd.

    `x` and `weight` carry the history, `inputs` and `cast` are what is multiplied.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        inputs: Tensor,
        weight: Tensor,
        cast: Tensor,
        bias: Tensor | None,
        target: CompactedParam,
    ) -> Tensor:
        ctx.save_for_backward(inputs, cast)
        ctx.target, ctx.dtype = target, x.dtype
        y: Tensor = torch._C._nn.linear(inputs, cast, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        target: CompactedParam = ctx.target
        scratch, some = _scratch(weight), slice(None) if target.whole else target.rows
        torch.mm(rows[:, some].t(), inputs.reshape(-1, inputs.shape[-1]), out=scratch[some])
        target.receive(scratch)
        db = rows.sum(0) if ctx.needs_input_grad[4] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (rows @ weight).view(*dy.shape[:-1], weight.shape[1]).to(ctx.dtype)
        return dx, None, None, None, db, None


compact_linear: Callable[..., Tensor] = _CompactLinear.apply
