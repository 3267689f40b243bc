"""Autograd functions whose backward hands the gradient of their output to a sink.

Each stands for a use of parameters: a linear layer, a norm, a vector of which every row has a copy,
a table in which rows are looked up. The backward computes the gradient of the input as usual, hands
dY to the sink, and leaves the parameters without a gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from talos.calibration.layouts import Use

__all__ = ["Part", "Sink", "copies", "linear", "look_up", "norm"]


@dataclass(frozen=True)
class Part:
    """Entries `[start, stop)` of a scored parameter, flattened: what one call uses of it.

    Attributes:
        flipped: whether the call uses the transpose of the matrix that lies there.
    """

    name: str
    param: nn.Parameter = field(compare=False)
    start: int
    stop: int
    flipped: bool = field(default=False, compare=False)

    @property
    def numel(self) -> int:
        """The number of its entries."""
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        """Whether it is all of the parameter."""
        return self.numel == self.param.numel()

    def chunk(self, number: int, count: int) -> "Part":
        """Return one of `count` equal parts of it, in the order of its entries."""
        size = self.numel // count
        start = self.start + number * size
        return Part(self.name, self.param, start, start + size)


@dataclass(frozen=True)
class Sink:
    """Where one use of parameters sends the gradient of its output.

    Attributes:
        use: the use.
        receive: called with the sink, dY and, where there is a matrix or a table, the layer's
            input or the ids.
        matrix: the weight of a linear layer, if it is scored.
        vector: its bias, or the vector of which copies were made, if it is scored.
        table: the embedding that was looked up in, if it is scored.
        transposed: whether the matrix is [in, out].
        padding_idx: the row of the table that has no gradient.
    """

    use: Use
    receive: Callable[["Sink", Tensor, Tensor | None], None]
    matrix: Part | None = None
    vector: Part | None = None
    table: Part | None = None
    transposed: bool = False
    padding_idx: int | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """The scored parts of parameters that it uses."""
        return tuple(part for part in (self.matrix, self.vector, self.table) if part is not None)


class _Linear(torch.autograd.Function):
    """`linear` with a sink; `leaf`, a parameter, makes the output require a gradient.

    `inputs` is `x` without its history, in the dtype of the weight. Layers that share their input
    share it, so it is kept once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        leaf: Tensor,
        sink: Sink,
    ) -> Tensor:
        ctx.save_for_backward(inputs if sink.matrix else None, weight)
        ctx.sink, ctx.dtype = sink, x.dtype
        # Flat: without a history, torch would run strided rows as a batch of products.
        rows = inputs.flatten(0, -2) if inputs.dim() > 2 else inputs
        y: Tensor = torch._C._nn.linear(rows, weight, bias)
        if inputs.dim() <= 2:
            return y
        # No view to autograd, so that an activation may work in place.
        return cast(Tensor, torch.ops.aten._unsafe_view(y, (*inputs.shape[:-1], len(weight))))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        dy = grads[0].flatten(0, -2) if grads[0].dim() > 1 else grads[0][None]  # one copy at most
        ctx.sink.receive(ctx.sink, dy, inputs)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight).view(*grads[0].shape[:-1], weight.shape[1]).to(ctx.dtype)
        return dx, None, None, None, None, None


class _Norm(torch.autograd.Function):
    """`layer_norm` or `rms_norm` with sinks for gain and bias; keeps its input only."""

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., Tensor],
        x: Tensor,
        shape: tuple[int, ...],
        eps: float | None,
        leaf: Tensor,
        sinks: tuple[Sink | None, Sink | None],
        weight: Tensor | None,
        *bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.shape, ctx.eps, ctx.sinks = shape, eps, sinks
        ctx.centred = function is functional.layer_norm
        return function(x, shape, weight, *bias, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gain, shift = ctx.sinks
        narrow = torch.promote_types(x.dtype, torch.float32)  # torch's rms_norm takes its eps
        eps = torch.finfo(narrow).eps if ctx.eps is None else ctx.eps
        wide = torch.promote_types(narrow, grads[0].dtype)
        dy, inputs = grads[0].to(wide), x.to(wide)
        dims = tuple(range(-len(ctx.shape), 0))
        if ctx.centred:
            xhat, mean, rstd = torch.native_layer_norm(inputs, ctx.shape, None, None, eps)
        else:
            rstd = (inputs.square().mean(dims, keepdim=True) + eps).rsqrt_()
            xhat = inputs * rstd
        if shift is not None:
            shift.receive(shift, dy, None)
        if gain is not None:
            gain.receive(gain, dy * xhat, None)
        dx = None
        if ctx.needs_input_grad[1] and ctx.centred:
            scale = None if weight is None else weight.to(wide)
            dx = torch.ops.aten.native_layer_norm_backward(
                dy, inputs, ctx.shape, mean, rstd, scale, None, (True, False, False)
            )[0].to(x.dtype)
        elif ctx.needs_input_grad[1]:
            scaled = dy if weight is None else dy * weight.to(wide)
            dx = (scaled - xhat * (scaled * xhat).mean(dims, keepdim=True)) * rstd
            dx = dx.to(x.dtype)
        return None, dx, *[None] * (len(ctx.needs_input_grad) - 2)


class _Copies(torch.autograd.Function):
    """One copy of a vector for every row, with a sink for the gradients of the copies."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, leaf: Tensor, shape: torch.Size, sink: Sink) -> Tensor:
        ctx.sink = sink
        return vector.expand(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        ctx.sink.receive(ctx.sink, grads[0], None)
        return None, None, None, None


class _LookUp(torch.autograd.Function):
    """Rows looked up in a table, with a sink; `order` makes their gradient [..., D]."""

    @staticmethod
    def forward(
        ctx: Any,
        found: Tensor,
        ids: Tensor,
        leaf: Tensor,
        order: tuple[int, ...],
        sink: Sink,
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.order, ctx.sink = order, sink
        if found._is_view():  # T5's copies
            return found.view_as(found)
        ctx.mark_dirty(found)  # the output itself, so that a model may change it in place
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        (ids,) = ctx.saved_tensors
        ctx.sink.receive(ctx.sink, grads[0].permute(ctx.order), ids)
        return None, None, None, None, None


linear: Callable[..., Tensor] = _Linear.apply
norm: Callable[..., Tensor] = _Norm.apply
copies: Callable[..., Tensor] = _Copies.apply
look_up: Callable[..., Tensor] = _LookUp.apply
