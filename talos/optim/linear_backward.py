"""Linear layers whose backward hands out the weight's gradient as its two factors.

Autograd multiplies dYᵀX and keeps it until the step. Of some weights only a part of that product is
wanted, or a product with it: while they are routed, `torch.nn.functional.linear`, by which most
layers reach their weight, is a function whose backward gives a `Receiver` dY and X, and autograd no
gradient of the weight. In code that torch.compile traces, of a weight that has hooks of its own,
and where a weight is reached otherwise, autograd does what it ever does.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional

from talos.errors import TalosRuntimeError
from talos.tensors import SharedCast

__all__ = ["Receiver", "route", "unroute"]


class Receiver(Protocol):
    """What takes the gradient of a weight.

    Attributes:
        param: the weight, [out, in].
        active: whether it still takes gradients; autograd gets them otherwise.
    """

    param: Tensor
    active: bool

    def multiply(self, dy: Tensor, x: Tensor) -> None:
        """Takes the gradient dyᵀ x.

        Args:
            dy: of the layer's output, [tokens, out].
            x: the layer's input, [tokens, in], of the same dtype, which is autocast's under it.
        """


_FUNCTION = "linear"
_lock = threading.Lock()
_routed: dict[int, Receiver] = {}
_replaced: Callable[..., Tensor] | None = None  # what functional.linear was before


class _Local(threading.local):
    """What each thread has for itself."""

    def __init__(self) -> None:
        self.cast = SharedCast()


_local = _Local()


def route(receivers: Sequence[Receiver]) -> None:
    """Hands the gradients of weights, [out, in], to their receivers.

    Args:
        receivers: one a weight.
    """
    global _replaced
    with _lock:
        if receivers and _replaced is None:
            _replaced = functional.linear
            setattr(functional, _FUNCTION, _routing_linear)
        _routed.update({id(each.param): each for each in receivers})


def unroute(receivers: Sequence[Receiver]) -> None:
    """Gives the gradients back to autograd, those of forwards that are over too.

    Args:
        receivers: those that were routed, or others, which changes nothing.
    """
    global _replaced
    with _lock:
        for each in receivers:
            each.active = False
            if _routed.get(id(each.param)) is each:
                del _routed[id(each.param)]
        if _routed:
            return
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
        return _linear_to(x, None, weight, None, bias, target)
    dtype = torch.get_autocast_dtype(device)
    bias = None if bias is None else bias.to(dtype)
    return _linear_to(x, _cast(x, dtype), weight, weight.detach().to(dtype), bias, target)


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


class _LinearTo(torch.autograd.Function):
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
        target: Receiver,
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
    """What the engine does with the weight's gradient, if it wants it at all."""
    node = get_gradient_edge(target.param).node
    try:
        return "accumulated" if torch._C._will_engine_execute_node(node) else ""
    except RuntimeError as error:
        if "autograd.grad" not in str(error):  # where torch does not tell of a leaf
            raise
        return "returned"


_linear_to: Callable[..., Tensor] = _LinearTo.apply
