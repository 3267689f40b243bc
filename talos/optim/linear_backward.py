"""Linear layers whose backward gives the two factors of the weight's gradient to a receiver.

Autograd multiplies dYᵀX and keeps the product until the step. Some users need only a part of it,
or another product of the factors. While a weight is routed, `torch.nn.functional.linear` is a
function whose backward gives dY and X to a `Receiver` and no weight gradient to autograd. In code
that torch.compile traces, for weights with hooks of their own, and for weights used in other ways,
autograd works as usual.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

from talos.errors import TalosRuntimeError
from talos.tensors import SharedCast

__all__ = ["Receiver", "route", "unroute"]


class Receiver(Protocol):
    """Takes the gradient of a weight.

    Attributes:
        param: the weight, [out, in].
        active: whether it still takes gradients; else autograd gets them.
    """

    param: Tensor
    active: bool

    def multiply(self, dy: Tensor, x: Tensor) -> None:
        """Take the gradient dyᵀ x.

        Args:
            dy: gradient of the layer's output, [tokens, out].
            x: the layer's input, [tokens, in], in the same dtype; under autocast in autocast's.
        """


_FUNCTION = "linear"
_lock = threading.Lock()
_routed: dict[int, Receiver] = {}
_replaced: Callable[..., Tensor] | None = None  # what functional.linear was before


class _Local(threading.local):
    """Each thread's own cast."""

    def __init__(self) -> None:
        self.cast = SharedCast()


_local = _Local()


def route(receivers: Sequence[Receiver]) -> None:
    """Send the gradients of weights, [out, in], to their receivers, one for each weight."""
    global _replaced
    with _lock:
        if receivers and _replaced is None:
            _replaced = functional.linear
            setattr(functional, _FUNCTION, _routing_linear)
        _routed.update({id(each.param): each for each in receivers})


def unroute(receivers: Sequence[Receiver]) -> None:
    """Give the gradients back to autograd, also those of finished forwards.

    Receivers that were not routed are ignored.
    """
    global _replaced
    with _lock:
        for each in receivers:
            each.active = False
            if _routed.get(id(each.param)) is each:
                del _routed[id(each.param)]
        if _routed:
            return
        if functional.linear is _routing_linear:  # else other code wrapped it, and it stays
            setattr(functional, _FUNCTION, _replaced)
            _replaced = None


def _routing_linear(*args: Any, **kwargs: Any) -> Tensor:
    """Stand in for `torch.nn.functional.linear` while a weight is routed."""
    operands: list[Any] = [
        args[place] if place < len(args) else kwargs.get(name)
        for place, name in enumerate(("input", "weight", "bias"))
    ]
    x, weight, bias = operands
    target = None if torch.compiler.is_compiling() else _routed.get(id(weight))
    if target is not None and has_torch_function((x, weight)):  # as the mode of a default device
        found: Tensor = handle_torch_function(_routing_linear, (x, weight), *args, **kwargs)
        return found
    if target is None or not _plain(x, weight):
        return (_replaced or torch._C._nn.linear)(*args, **kwargs)
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return _linear_to(x, None, weight, None, bias, target)
    dtype = torch.get_autocast_dtype(device)
    bias = None if bias is None else bias.to(dtype)
    return _linear_to(x, _cast(x, dtype), weight, weight.detach().to(dtype), bias, target)


def _plain(x: Tensor, weight: Tensor) -> bool:
    """Return whether this is ordinary training, which needs no dense gradient."""
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
    """Cast `x` without its history; queries, keys and values share one cast.

    Only tensors made by autograd are shared: a user's own tensor may change unseen.
    """
    return x.detach().to(dtype) if x.grad_fn is None else _local.cast(x, dtype)


class _LinearTo(torch.autograd.Function):
    """`linear` whose backward gives the weight's gradient to `target` instead of autograd.

    Under autocast `inputs` and `cast` are `x` and `weight` in its dtype, without history.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        inputs: Tensor | None,
        weight: Tensor,
        cast: Tensor | None,
        bias: Tensor | None,
        target: Receiver,
    ) -> Tensor:
        ctx.target, ctx.dtype, ctx.casts = target, x.dtype, cast is not None
        inputs, weight = (x if inputs is None else inputs), (weight if cast is None else cast)
        ctx.save_for_backward(inputs, weight)
        if inputs.is_contiguous():
            y: Tensor = torch._C._nn.linear(inputs, weight, bias)
            return y
        # Flat, as torch does with autograd: without it torch multiplies each matrix of the batch
        # by itself, and in bf16 on a CPU copies the weight for each.
        y = torch.mm(inputs.reshape(-1, inputs.shape[-1]), weight.t())
        y = y.view(*inputs.shape[:-1], len(weight))
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (inputs, weight) = grads, ctx.saved_tensors
        if torch.is_grad_enabled() and ctx.casts:
            raise TalosRuntimeError(
                "compact gradients and those of l_lora cannot be differentiated under autocast "
                "(create_graph=True); compute this loss in float32, or call "
                "optimizer.compact_gradients(False)"
            )
        rows, inputs = dy.reshape(-1, dy.shape[-1]), inputs.reshape(-1, inputs.shape[-1])
        needs_x, _, _, _, needs_bias, _ = ctx.needs_input_grad
        dx = dw = None
        if needs_x:
            dx = (rows @ weight).view(*dy.shape[:-1], weight.shape[1]).to(ctx.dtype)
        target: Receiver = ctx.target
        if wanted := _wanted(target):
            plain = target.active and not target.param._backward_hooks
            if wanted == "returned" or torch.is_grad_enabled() or not plain:
                dw = (rows.t() @ inputs).to(target.param.dtype)
            else:
                target.multiply(rows, inputs)
        return dx, None, dw, None, rows.sum(0) if needs_bias else None, None


def _wanted(target: Receiver) -> Literal["", "accumulated", "returned"]:
    """Return what autograd's engine does with the weight's gradient; empty: it needs none."""
    node = get_gradient_edge(target.param).node
    try:
        return "accumulated" if torch._C._will_engine_execute_node(node) else ""
    except RuntimeError as error:
        if "autograd.grad" not in str(error):  # torch does not answer for a leaf
            raise
        return "returned"


_linear_to: Callable[..., Tensor] = _LinearTo.apply
