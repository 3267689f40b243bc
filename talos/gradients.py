"""Weight gradients that are never dense, or only one at a time.

Autograd makes the dense gradient of every weight that is trained and keeps it until the step. Here
a gradient is compacted the moment it exists, into float32 memory that all steps share:

- a hook behind autograd's accumulation gathers what it has made and drops it;
- `torch.nn.functional.linear`, by which most layers reach their weight, is routed for the selected
  weights to a function whose backward multiplies into one reused scratch, only the rows that hold
  selected entries (the values of a fused QKV need none), and gathers from there, so that autograd
  sees no weight gradient at all; or, where that is asked for, computes the selected entries alone.

`param.grad` is a `CompactGradient` then. In code that torch.compile traces, of a weight that has
hooks of its own, and where a weight is reached otherwise, the hook alone does it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional

from talos_kernels import Index, gather_grad_, sddmm_

from .compact_gradient import CompactGradient
from .errors import TalosRuntimeError
from .shared_cast import SharedCast

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
        sampled: whether a linear layer's gradient is made by `sddmm_`, never dense.
        norm: the sum of squares of the last dense gradient, 0-dim, and the version of `values`
            that was gathered from it.
        active: whether gradients are still to be compacted.
    """

    param: Tensor
    index: Index
    values: Tensor
    rows: slice
    whole: bool = False
    sampled: bool = False
    norm: tuple[Tensor, int] | None = None
    active: bool = True

    @property
    def dense_square(self) -> Tensor | None:
        """The sum of squares of the dense gradient, 0-dim; None: of this gradient it is not known.

        Of a sum of gradients it is not the sum of theirs, nor known of one that was changed.
        """
        known = self.norm is not None and self.norm[1] == self.values._version
        return self.norm[0] if known and self.norm is not None else None

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
        _write(self.values, gradient, self.index)
        if self.whole:
            self.norm = gradient[0].float().square().sum(), self.values._version
        self.param.grad = CompactGradient.of(self.param, self.index, self.values)

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
    _route([each for each in params if each.param.dim() == 2])

    def stop() -> None:
        _unroute(params)
        for hook in hooks:
            hook.remove()

    return stop


_FUNCTION = "linear"
_lock = threading.Lock()
_routed: dict[int, CompactedParam] = {}
_replaced: Callable[..., Tensor] | None = None  # what functional.linear was before
_scratches: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}


class _Local(threading.local):
    """What each thread has for itself."""

    def __init__(self) -> None:
        self.cast = SharedCast()


_local = _Local()


def _route(params: list[CompactedParam]) -> None:
    global _replaced
    with _lock:
        if params and _replaced is None:
            _replaced = functional.linear
            setattr(functional, _FUNCTION, _routing_linear)
        _routed.update({id(each.param): each for each in params})


def _unroute(params: list[CompactedParam]) -> None:
    global _replaced
    with _lock:
        for each in params:
            each.active = False
            if _routed.get(id(each.param)) is each:
                del _routed[id(each.param)]
        if _routed:
            return
        _scratches.clear()
        if functional.linear is _routing_linear:  # else somebody has wrapped it, and it stays
            setattr(functional, _FUNCTION, _replaced)
            _replaced = None


def _routing_linear(*args: Any, **kwargs: Any) -> Tensor:
    """`torch.nn.functional.linear` as long as a weight is routed."""
    operands: list[Any] = [
        args[place] if place < len(args) else kwargs.get(name)
        for place, name in enumerate(("input", "weight", "bias"))
    ]
    x, weight, bias = operands
    target = None if torch.compiler.is_compiling() else _routed.get(id(weight))
    if target is None or not _plain(x, weight):
        return (_replaced or torch._C._nn.linear)(*args, **kwargs)
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return compact_linear(x, None, weight, None, bias, target)
    dtype = torch.get_autocast_dtype(device)
    bias = None if bias is None else bias.to(dtype)
    return compact_linear(x, _cast(x, dtype), weight, weight.detach().to(dtype), bias, target)


def _plain(x: Tensor, weight: Tensor) -> bool:
    """Whether this is ordinary training, in which nobody asks for the dense gradient."""
    return (
        torch.is_grad_enabled()
        and weight.requires_grad
        and not weight._backward_hooks
        and type(x) is Tensor
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch._C._is_tracing()
    )


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` without its history in another dtype: queries, keys and values share one cast.

    Only what autograd has made is shared: a user's tensor may be written unseen.
    """
    return x.detach().to(dtype) if x.grad_fn is None else _local.cast(x, dtype)


def _scratch(weight: Tensor) -> Tensor:
    """Memory for one dense weight gradient; what it holds is of no meaning.

    Each thread and stream has its own, so that nobody writes what another still reads.
    """
    stream = torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else 0
    key = threading.get_ident(), stream, weight.device, weight.dtype
    kept = _scratches.get(key)
    if kept is None or kept.numel() < weight.numel():
        kept = torch.empty(weight.numel(), dtype=weight.dtype, device=weight.device)
        _scratches[key] = kept
    return kept[: weight.numel()].view(weight.shape)


class _CompactLinear(torch.autograd.Function):
    """`linear` whose backward gives the weight's gradient to `target` and none to autograd.

    Under autocast `inputs` and `cast` are `x` and `weight` in its dtype, without their history.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        inputs: Tensor | None,
        weight: Tensor,
        cast: Tensor | None,
        bias: Tensor | None,
        target: CompactedParam,
    ) -> Tensor:
        ctx.target, ctx.dtype, ctx.casts = target, x.dtype, cast is not None
        inputs, weight = (x if inputs is None else inputs), (weight if cast is None else cast)
        ctx.save_for_backward(inputs, weight)
        if inputs.is_contiguous():
            y: Tensor = torch._C._nn.linear(inputs, weight, bias)
            return y
        # Flat, as torch does it where there is a history: without one it would make a product of
        # each matrix of the batch, and in bf16 on a CPU copy the weight for every one of them.
        y = torch.mm(inputs.reshape(-1, inputs.shape[-1]), weight.t())
        y = y.view(*inputs.shape[:-1], len(weight))
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (inputs, weight) = grads, ctx.saved_tensors
        if torch.is_grad_enabled() and ctx.casts:
            raise TalosRuntimeError(
                "compact gradients cannot be differentiated under autocast (create_graph=True); "
                "call optimizer.compact_gradients(False), or compute this loss in float32"
            )
        rows, inputs = dy.reshape(-1, dy.shape[-1]), inputs.reshape(-1, inputs.shape[-1])
        needs_x, _, _, _, needs_bias, _ = ctx.needs_input_grad
        dx = dw = None
        if needs_x:
            dx = (rows @ weight).view(*dy.shape[:-1], weight.shape[1]).to(ctx.dtype)
        target: CompactedParam = ctx.target
        if wanted := _wanted(target):
            plain = target.active and not target.param._backward_hooks
            if wanted == "returned" or torch.is_grad_enabled() or not plain:
                dw = (rows.t() @ inputs).to(target.param.dtype)
            elif target.sampled:
                target.receive(rows, inputs)
            else:
                scratch = _scratch(weight)
                some = slice(None) if target.whole else target.rows
                torch.mm(rows[:, some].t(), inputs, out=scratch[some])
                target.receive(scratch)
        return dx, None, dw, None, rows.sum(0) if needs_bias else None, None


def _wanted(target: CompactedParam) -> Literal["", "accumulated", "returned"]:
    """What the engine does with the weight's gradient, if it wants it at all."""
    node = get_gradient_edge(target.param).node
    try:
        return "accumulated" if torch._C._will_engine_execute_node(node) else ""
    except RuntimeError as error:
        if "autograd.grad" not in str(error):  # where torch does not tell of a leaf
            raise
        return "returned"


compact_linear: Callable[..., Tensor] = _CompactLinear.apply
