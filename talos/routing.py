"""How models reach their layers: functions of torch, routed to autograd Functions that listen.

While a `Router` is active, `linear`, `conv2d`, `layer_norm` and `rms_norm` compute what they ever
do, but where their weight or bias is listened to, the backward hands the gradient of their output
to a listener instead of computing the parameter's. That catches `nn.Linear`, `nn.LayerNorm`, ...
and their subclasses, `nn.MultiheadAttention` with its fused or split projections, and all code that
calls `torch.nn.functional` with such a parameter or with a view of some of its rows.

`addmm` is routed for those who write a linear layer with it, their weight [in, out], as Conv1D of
transformers does.

A convolution becomes the linear layer of its unfolded image. The gain and bias of a norm become
vectors of which every row gets a copy, y = xhat * w + b, so that autograd itself computes the
gradients of the copies; norms that model libraries write themselves get such copies by a hook.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from .layouts import Origin, Use
from .params import Selection, is_norm

__all__ = ["Part", "Router", "Sink"]


@dataclass(frozen=True)
class Part:
    """Rows `[start, stop)` of dimension 0 of a listened-to parameter: what one call uses of it."""

    name: str
    param: nn.Parameter
    start: int
    stop: int


@dataclass(frozen=True)
class Sink:
    """Where one call sends the gradient of its output: of a linear layer, or of a vector's copies.

    Attributes:
        use: the call.
        matrix: the weight of a linear layer, if it is listened to.
        vector: its bias, or the vector of which copies were made, if it is listened to.
        receive: called with the sink, dY and, where there is a matrix, the layer's input.
        transposed: whether the matrix is [in, out].
    """

    use: Use
    matrix: Part | None
    vector: Part | None
    receive: Callable[["Sink", Tensor, Tensor | None], None]
    transposed: bool = False


class _Linear(torch.autograd.Function):
    """`linear` with a listener; `leaf`, a parameter, makes the output require a gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, leaf: Tensor, sink: Sink
    ) -> Tensor:
        ctx.save_for_backward(x if sink.matrix else None, weight)
        ctx.sink = sink
        return torch._C._nn.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.sink.receive(ctx.sink, grads[0], x)
        return grads[0] @ weight if ctx.needs_input_grad[0] else None, None, None, None, None


class _Copies(torch.autograd.Function):
    """One copy of a vector for every row, with a listener to the gradients of the copies."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, leaf: Tensor, shape: torch.Size, sink: Sink) -> Tensor:
        ctx.sink = sink
        return vector.expand(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        ctx.sink.receive(ctx.sink, grads[0], None)
        return None, None, None, None


Parts = tuple[Part | None, Part | None]  # of a weight and of a bias
_linear: Callable[..., Tensor] = _Linear.apply
_copies: Callable[..., Tensor] = _Copies.apply


class Router:
    """Routes the functions by which a model reaches the parameters of a selection.

    Args:
        selection: the parameters to listen to.
        record: called in the forward with every use of them.
        receive: called in the backward; see `Sink`.
    """

    def __init__(
        self,
        selection: Selection,
        record: Callable[[Use], None],
        receive: Callable[[Sink, Tensor, Tensor | None], None],
    ) -> None:
        self._params = {id(each.param): (name, each.param) for name, each in selection.items()}
        self._record = record
        self._receive = receive
        self._attention: list[tuple[int, ...]] = []  # [T, B] of the attention calls under way

    def install(self, stack: ExitStack, model: nn.Module) -> None:
        """Routes until `stack` closes."""
        # The fused inference kernels of attention would bypass these functions.
        fused = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
        torch.backends.mha.set_fastpath_enabled(False)
        if "torch._dynamo" in sys.modules:  # and so would code that was compiled before
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for owner, name, ours in (
            (functional, "linear", self._linear),
            (functional, "conv2d", self._conv2d),
            (functional, "multi_head_attention_forward", self._multi_head),
            (torch, "addmm", self._addmm),
            (torch, "layer_norm", self._layer_norm),  # functional's call these
            (torch, "rms_norm", self._rms_norm),
        ):
            original = getattr(owner, name)
            stack.callback(setattr, owner, name, original)
            setattr(owner, name, partial(ours, original))
        for module in model.modules():
            if is_norm(module) and not isinstance(module, nn.LayerNorm | nn.RMSNorm):
                self._hook(stack, module)

    def _find(self, tensor: Tensor | None) -> Part | None:
        """The part of a parameter that `tensor` is: all of it, or a view of some rows."""
        if tensor is None:
            return None
        if id(tensor) in self._params:
            name, param = self._params[id(tensor)]
            return Part(name, param, 0, len(param))
        if id(tensor._base) not in self._params:
            return None
        name, param = self._params[id(tensor._base)]
        width = max(param.numel() // max(len(param), 1), 1)
        start, rest = divmod(int(tensor.storage_offset()) - int(param.storage_offset()), width)
        if rest or tensor.shape[1:] != param.shape[1:]:
            return None
        if not (tensor.is_contiguous() and param.is_contiguous()):
            return None
        return Part(name, param, start, start + len(tensor))

    def _parts(self, weight: Tensor | None, bias: Tensor | None = None) -> Parts:
        """What a call uses of the parameters; nothing where it is to run as ever."""
        parts = self._find(weight), self._find(bias)
        for part, tensor in zip(parts, (weight, bias), strict=True):
            if part is None and tensor is not None and tensor.requires_grad:
                return None, None  # computed from a parameter: autograd will tell
        return parts if torch.is_grad_enabled() else (None, None)

    def _listen(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        parts: Parts,
        lead: Sequence[int],
        origin: Origin,
        transposed: bool = False,
    ) -> Tensor:
        """A linear layer with a listener, in autocast's dtype where that is on."""
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        part = cast(Part, parts[0] or parts[1])
        use = Use(part.name, tuple(lead), origin)
        self._record(use)
        sink = Sink(use, *parts, self._receive, transposed)
        return _linear(x, weight, bias, part.param, sink)

    def _linear(
        self, original: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        parts = self._parts(weight, bias)
        if not any(parts):
            return original(x, weight, bias)
        lead: Sequence[int] = x.shape[:-1]
        if self._attention and x.dim() == 2:
            lead = self._attention[-1]
        origin: Origin = "attention" if self._attention else "layer"
        return self._listen(x, weight.detach(), _detached(bias), parts, lead, origin)

    def _addmm(self, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        parts: Parts = None, None
        if len(args) == 3 and not kwargs and args[0].shape == args[2].shape[1:]:
            parts = self._parts(args[2], args[0])
        if not any(parts):
            return original(*args, **kwargs)
        bias, x, weight = args
        transposed, lead = weight.detach().t(), x.shape[:-1]
        return self._listen(x, transposed, bias.detach(), parts, lead, "layer", transposed=True)

    def _conv2d(
        self,
        original: Callable[..., Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        parts = self._parts(weight, bias)
        if not any(parts):
            return original(x, weight, bias, stride, padding, dilation, groups)
        images = x if x.dim() == 4 else x[None]
        kernel, steps, strides = weight.shape[2:], _pair(dilation), _pair(stride)
        pads = (0, 0) if isinstance(padding, str) else _pair(padding)
        if padding == "same":  # what is odd goes to the end, as in torch
            spans = [step * (size - 1) for step, size in zip(steps, kernel, strict=True)]
            edges = [(span // 2, span - span // 2) for span in reversed(spans)]
            images = functional.pad(images, (*edges[0], *edges[1]))
        height, width = (
            (images.shape[2 + i] + 2 * pads[i] - steps[i] * (kernel[i] - 1) - 1) // strides[i] + 1
            for i in (0, 1)
        )
        # [B, L, C * kh * kw], the channels of a group next to each other
        patches = functional.unfold(images, kernel, steps, pads, strides).transpose(1, 2)
        flat, length = weight.detach().flatten(1), len(weight) // groups
        outputs = []
        for group, inputs in enumerate(patches.chunk(groups, 2)):
            own = slice(group * length, group * length + length)
            own_parts = _narrow(parts[0], own), _narrow(parts[1], own)
            own_bias = None if bias is None else bias.detach()[own]
            lead = inputs.shape[:2]
            outputs.append(self._listen(inputs, flat[own], own_bias, own_parts, lead, "image"))
        # [B, O, L]; contiguous, for the strides of a view look like channels_last where B is 1, and
        # the backward of a batch norm then reads its gradient wrongly.
        output = torch.cat(outputs, 2).transpose(1, 2).contiguous()
        output = output.view(len(images), len(weight), height, width)
        return output if x.dim() == 4 else output[0]

    def _multi_head(
        self, original: Callable[..., Any], query: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        self._attention.append((*query.shape[:-1], 1)[:2])  # unbatched attention adds a batch of 1
        try:
            return original(query, *args, **kwargs)
        finally:
            self._attention.pop()

    def _copies(self, part: Part, vector: Tensor, x: Tensor) -> Tensor:
        """A vector's copies for the rows of `x`, whose last dimensions are the vector's."""
        use = Use(part.name, tuple(x.shape[: x.dim() - vector.dim()]), "layer")
        self._record(use)
        sink = Sink(use, None, part, self._receive)
        return _copies(vector.detach(), part.param, x.shape, sink)

    def _layer_norm(
        self,
        original: Callable[..., Tensor],
        x: Tensor,
        shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        parts = self._parts(weight, bias)
        if not any(parts):
            return original(x, shape, weight, bias, *args, **kwargs)
        xhat = original(x, shape, None, None, *args, **kwargs)
        return self._affine(xhat, weight, bias, parts)

    def _rms_norm(
        self,
        original: Callable[..., Tensor],
        x: Tensor,
        shape: Sequence[int],
        weight: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        parts = self._parts(weight)
        copies = weight is not None and weight.dim() > len(shape)  # made by the hook below
        if not any(parts) and not copies:
            return original(x, shape, weight, *args, **kwargs)
        return self._affine(original(x, shape, None, *args, **kwargs), weight, None, parts)

    def _affine(
        self,
        xhat: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        parts: Parts,
    ) -> Tensor:
        """Weight and bias applied to xhat, in its dtype."""
        y = xhat
        if weight is not None:
            y = y * (self._copies(parts[0], weight, xhat) if parts[0] else weight)
        if bias is not None:
            y = y + (self._copies(parts[1], bias, xhat) if parts[1] else bias)
        return y.to(xhat.dtype)

    def _hook(self, stack: ExitStack, norm: nn.Module) -> None:
        """Puts copies in the place of a norm's own parameters while its forward runs."""
        own = {
            name: param
            for name, param in norm.named_parameters(recurse=False)
            if id(param) in self._params
        }

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
            for name, param in own.items():
                part = self._find(param)
                if part is not None and torch.is_grad_enabled():
                    module.__dict__[name] = self._copies(part, param, x)

        def leave(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            for name in own:
                module.__dict__.pop(name, None)

        if own:
            stack.callback(norm.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(norm.register_forward_hook(leave, always_call=True).remove)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _narrow(part: Part | None, rows: slice) -> Part | None:
    if part is None:
        return None
    return Part(part.name, part.param, part.start + rows.start, part.start + rows.stop)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
