"""How models reach their layers: functions of torch, routed to autograd Functions that listen.

While a `Router` is active, `linear`, `conv2d`, `embedding`, `layer_norm` and `rms_norm` compute
what they ever do, but where their weight or bias is listened to, the backward hands the gradient of
their output to a listener instead of computing the parameter's. That catches `nn.Linear`,
`nn.LayerNorm`, ... and their subclasses, `nn.MultiheadAttention` with its fused or split
projections, and all code that calls `torch.nn.functional` with such a parameter or with a view of
some of its rows. Nothing is kept for the backward that an ordinary forward would not keep: a norm
keeps its input, and layers that share an input share its cast to autocast's dtype.

Products are routed for those who write a linear layer with them, their weight [out, in] or
[in, out]: `x @ w.T`, `w @ x`, `matmul`, `mm`, `addmm` (Conv1D of transformers), and `bmm` or
`matmul` with a stack of weights [experts, in, out], of which every one is a linear layer. So are
sums, of which one term may be a bias.

A convolution becomes the linear layer of its unfolded image. `talos.calibration.uses` has norms and
embeddings.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from talos.architecture.experts import one_by_one
from talos.calibration import listeners
from talos.calibration.layouts import Origin, leading
from talos.calibration.listeners import Part, Sink
from talos.calibration.patches import unfolded
from talos.calibration.uses import Parts, Uses, detached
from talos.params import Candidates
from talos.tensors import SharedCast

__all__ = ["Router"]


_installing = threading.RLock()


class Router(Uses):
    """Routes the functions by which a model reaches the parameters of a selection.

    Args:
        selection: the parameters to listen to.
        record: called in the forward with every sink.
        receive: called in the backward; see `Sink`.
    """

    def __init__(
        self,
        selection: Candidates,
        record: Callable[[Sink], None],
        receive: Callable[[Sink, Tensor, Tensor | None], None],
    ) -> None:
        super().__init__(selection, record, receive)
        self._attention: list[tuple[int, ...]] = []  # [T, B] of the attention calls under way
        self._cast = SharedCast()

    def forget(self) -> None:
        """Drops the last input's cast."""
        self._cast = SharedCast()

    def install(self, stack: ExitStack, model: nn.Module) -> None:
        """Routes until `stack` closes."""
        _installing.acquire()  # two threads would put back what they found in the wrong order
        stack.callback(_installing.release)
        # The fused inference kernels of attention would bypass these functions.
        fused = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
        torch.backends.mha.set_fastpath_enabled(False)
        if "torch._dynamo" in sys.modules:  # and so would code that was compiled before
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(one_by_one(model, [param for _, param in self._params.values()]))
        for ours, owner, names in (
            (self._linear, functional, ("linear",)),
            (self._conv2d, functional, ("conv2d",)),
            (self._embedding, functional, ("embedding",)),
            (self._multi_head, functional, ("multi_head_attention_forward",)),
            (self._layer_norm, torch, ("layer_norm",)),  # functional's call these
            (self._rms_norm, torch, ("rms_norm",)),
            (self._addmm, torch, ("addmm",)),
            (self._addmm, Tensor, ("addmm",)),
            (self._matmul, torch, ("matmul", "mm", "bmm")),
            (self._matmul, Tensor, ("matmul", "mm", "bmm", "__matmul__")),
            (self._add, torch, ("add",)),
            (self._add, Tensor, ("add", "__add__")),
            (self._add_, Tensor, ("add_", "__iadd__")),
        ):
            for name in names:
                _replace(stack, owner, name, ours)
        self.hook(stack, model)

    def _listen(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        parts: Parts,
        lead: Sequence[int],
        origin: Origin,
    ) -> Tensor:
        """A linear layer with a listener, in autocast's dtype where that is on."""
        device = x.device.type
        inputs = x.detach()
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            inputs, weight = self._cast(x, dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        part = cast(Part, parts[0] or parts[1])
        transposed = parts[0] is not None and parts[0].flipped
        sink = Sink(self._use(part, lead, origin), self._receive, *parts, transposed=transposed)
        self._record(sink)
        return listeners.linear(x, inputs, weight, bias, part.param, sink)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """X Wᵀ + b with a listener; None where no parameter is listened to."""
        parts = self._parts(weight, bias, matrix=True)
        if not any(parts) or weight.dim() != 2:
            return None
        lead = leading(x)
        if self._attention and x.dim() == 2:
            lead = self._attention[-1]
        origin: Origin = "attention" if self._attention else "layer"
        return self._listen(x, weight.detach(), detached(bias), parts, lead, origin)

    def _linear(
        self, original: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        y = self._product(x, weight, bias)
        return original(x, weight, bias) if y is None else y

    def _addmm(
        self, original: Callable[..., Tensor], bias: Tensor, x: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        y = None
        if len(args) == 1 and not kwargs and bias.shape == args[0].shape[1:]:
            y = self._product(x, args[0].t(), bias)
        return original(bias, x, *args, **kwargs) if y is None else y

    def _matmul(self, original: Callable[..., Tensor], x: Any, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs or self._holds(x) == self._holds(args[0]):
            return original(x, *args, **kwargs)
        (other,) = args
        y = None
        if self._holds(x):  # on the left: W X = (Xᵀ Wᵀ)ᵀ
            if x.dim() == 2 and other.dim() >= 1:
                y = self._product(other.mT if other.dim() > 1 else other, x)
                y = y if y is None or other.dim() == 1 else y.mT.contiguous()
        elif other.dim() == 2:
            y = self._product(x, other.t())
        elif other.dim() == 3 and (x.dim() == 2 or (x.dim() == 3 and len(x) == len(other))):
            rows = x.expand(len(other), *x.shape[-2:])
            y = torch.stack([self._matmul(torch.mm, rows[i], other[i]) for i in range(len(other))])
        return original(x, other) if y is None else y

    def _add(self, original: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and self._holds(x) and not self._holds(args[0]):
            return original(self._as_bias(x, args[0]), *args)
        return self._add_(original, x, *args, **kwargs)

    def _add_(self, original: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and self._holds(args[0]) and not self._holds(x):
            args = (self._as_bias(args[0], x),)
        return original(x, *args, **kwargs)

    def _as_bias(self, vector: Tensor, x: Any) -> Tensor:
        """Copies of a vector for the rows of `x`, or the vector where it is no bias of them."""
        part = self._find(vector)
        fits = isinstance(x, Tensor) and vector.dim() == 1 and x.shape[-1:] == vector.shape
        return self._copies(part, vector, x) if part is not None and fits else vector

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
        kernel = weight.shape[2:]
        patches, grid = unfolded(images, kernel, stride, padding, dilation)
        weights = weight.detach().flatten(1).chunk(groups)
        biases = [None] * groups if bias is None else bias.detach().chunk(groups)
        outputs = []
        for group, inputs in enumerate(patches.chunk(groups, 2)):
            own = (
                parts[0] and parts[0].chunk(group, groups),
                parts[1] and parts[1].chunk(group, groups),
            )
            lead = inputs.shape[:2]
            outputs.append(self._listen(inputs, weights[group], biases[group], own, lead, "image"))
        # [B, O, L]; contiguous, for the strides of a view look like channels_last where B is 1, and
        # the backward of a batch norm then reads its gradient wrongly.
        output = torch.cat(outputs, 2).transpose(1, 2).contiguous()
        output = output.view(len(images), len(weight), *grid)
        return output if x.dim() == 4 else output[0]

    def _multi_head(
        self, original: Callable[..., Any], query: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        self._attention.append((*query.shape[:-1], 1)[:2])  # unbatched attention adds a batch of 1
        try:
            return original(query, *args, **kwargs)
        finally:
            self._attention.pop()


# What torch calls the operands, in their order.
_OPERANDS = ("input", "mat1", "other", "mat2")


def _by_torchs_names(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function for callers that name its arguments as torch does."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            args += tuple(kwargs.pop(name) for name in _OPERANDS if name in kwargs)
            if "normalized_shape" in kwargs:
                kwargs["shape"] = kwargs.pop("normalized_shape")
        return function(*args, **kwargs)

    return call


def _replace(stack: ExitStack, owner: Any, name: str, ours: Callable[..., Any]) -> None:
    """Puts a function in the place of one of torch until `stack` closes."""
    original = getattr(owner, name)
    if name in vars(owner):
        stack.callback(setattr, owner, name, original)
    else:  # a method that it inherits
        stack.callback(delattr, owner, name)
    setattr(owner, name, _by_torchs_names(partial(ours, original)))
