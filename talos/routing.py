"""How models reach their layers: functions of torch, routed to autograd Functions that listen.

While a `Router` is active, `linear`, `conv2d`, `embedding`, `layer_norm` and `rms_norm` compute
what they ever do, but where their weight or bias is listened to, the backward hands the gradient of
their output to a listener instead of computing the parameter's. That catches `nn.Linear`,
`nn.LayerNorm`, ... and their subclasses, `nn.MultiheadAttention` with its fused or split
projections, and all code that calls `torch.nn.functional` with such a parameter or with a view of
some of its rows. Nothing is kept for the backward that an ordinary forward would not keep: a norm
keeps its input, and layers that share an input share its cast to autocast's dtype.

`addmm` is routed for those who write a linear layer with it, their weight [in, out], as Conv1D of
transformers does.

A convolution becomes the linear layer of its unfolded image. The gain and bias of a norm are
vectors of which every row has a copy, y = xhat * w + b: the gradients of the copies are dy * xhat
and dy. Norms that model libraries write themselves get such copies by a hook, of which autograd
computes the gradients. The relative position bias of T5 and its relatives is looked up once for a
whole batch; a hook hands out one copy a sample.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import listeners
from .layouts import Origin, Use, leading
from .listeners import Part, Sink
from .params import Selection, is_norm
from .patches import unfolded
from .shared_cast import SharedCast

__all__ = ["Router"]


_installing = threading.RLock()

Parts = tuple[Part | None, Part | None]  # of a weight and of a bias


class Router:
    """Routes the functions by which a model reaches the parameters of a selection.

    Args:
        selection: the parameters to listen to.
        record: called in the forward with every sink.
        receive: called in the backward; see `Sink`.
    """

    def __init__(
        self,
        selection: Selection,
        record: Callable[[Sink], None],
        receive: Callable[[Sink, Tensor, Tensor | None], None],
    ) -> None:
        self._params = {id(each.param): (name, each.param) for name, each in selection.items()}
        self._record = record
        self._receive = receive
        self._attention: list[tuple[int, ...]] = []  # [T, B] of the attention calls under way
        self._bias: list[list[Tensor]] = []  # ids that the position bias under way looks up
        self._cast = SharedCast()
        self._silent = False

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Lets every function compute as ever, parameters' gradients included."""
        self._silent = True
        try:
            yield
        finally:
            self._silent = False

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
        for owner, name, ours in (
            (functional, "linear", self._linear),
            (functional, "conv2d", self._conv2d),
            (functional, "embedding", self._embedding),
            (functional, "multi_head_attention_forward", self._multi_head),
            (torch, "addmm", self._addmm),
            (torch, "layer_norm", self._layer_norm),  # functional's call these
            (torch, "rms_norm", self._rms_norm),
        ):
            original = getattr(owner, name)
            stack.callback(setattr, owner, name, original)
            setattr(owner, name, _by_torchs_names(partial(ours, original)))
        for module in model.modules():
            if is_norm(module) and not isinstance(module, nn.LayerNorm | nn.RMSNorm):
                self._hook(stack, module)
            table = getattr(module, "relative_attention_bias", None)
            if isinstance(table, nn.Embedding) and id(table.weight) in self._params:
                self._hook_bias(stack, module, table.weight)

    def _listening(self) -> bool:
        return torch.is_grad_enabled() and not self._silent

    def _find(self, tensor: Tensor | None) -> Part | None:
        """The part of a parameter that `tensor` is: all of it, or a view of some rows."""
        if tensor is None:
            return None
        if id(tensor) in self._params:
            name, param = self._params[id(tensor)]
            return Part(name, param, 0, len(param))
        if id(tensor._base) not in self._params or tensor.grad_fn is None:
            return None  # a view made under no_grad hands no gradient to its base
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
        return parts if self._listening() else (None, None)

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
        inputs = x.detach()
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            inputs, weight = self._cast(x, dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        part = cast(Part, parts[0] or parts[1])
        use = Use(part.name, tuple(lead), origin)
        sink = Sink(use, self._receive, *parts, transposed=transposed)
        self._record(sink)
        return listeners.linear(x, inputs, weight, bias, part.param, sink)

    def _linear(
        self, original: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        parts = self._parts(weight, bias)
        if not any(parts):
            return original(x, weight, bias)
        lead = leading(x)
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
        flipped = weight.detach().t()
        return self._listen(x, flipped, bias.detach(), parts, leading(x), "layer", transposed=True)

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
        flat, length = weight.detach().flatten(1), len(weight) // groups
        outputs = []
        for group, inputs in enumerate(patches.chunk(groups, 2)):
            own = slice(group * length, group * length + length)
            own_parts = parts[0] and parts[0].narrowed(own), parts[1] and parts[1].narrowed(own)
            own_bias = None if bias is None else bias.detach()[own]
            lead = inputs.shape[:2]
            outputs.append(self._listen(inputs, flat[own], own_bias, own_parts, lead, "image"))
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

    def _embedding(
        self,
        original: Callable[..., Tensor],
        x: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:
        options = padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        (part, _) = self._parts(weight)
        if part is None or max_norm is not None or scale_grad_by_freq:
            return original(x, weight, *options)
        found = original(x, weight.detach(), *options)
        if self._bias:
            self._bias[-1].append(x)
            return found
        sink = self._looked_up(part, tuple(x.shape), padding_idx)
        return listeners.look_up(found, x, part.param, tuple(range(found.dim())), sink)

    def _looked_up(self, part: Part, lead: tuple[int, ...], padding_idx: int | None) -> Sink:
        use = Use(part.name, lead, "layer")
        sink = Sink(use, self._receive, table=part, padding_idx=padding_idx)
        self._record(sink)
        return sink

    def _copies(self, part: Part, vector: Tensor, x: Tensor) -> Tensor:
        """A vector's copies for the rows of `x`, whose last dimensions are the vector's."""
        return listeners.copies(vector.detach(), part.param, x.shape, self._shared(part, x))

    def _shared(self, part: Part, x: Tensor) -> Sink:
        """The sink of a vector that every row of `x` shares."""
        use = Use(part.name, tuple(x.shape[: x.dim() - part.param.dim()]), "layer")
        sink = Sink(use, self._receive, vector=part)
        self._record(sink)
        return sink

    def _layer_norm(
        self,
        original: Callable[..., Tensor],
        x: Tensor,
        shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enable: bool = True,
    ) -> Tensor:
        parts = self._parts(weight, bias)
        if not any(parts):
            return original(x, shape, weight, bias, eps, cudnn_enable)

        def call(x: Tensor) -> Tensor:
            return original(x, shape, _detached(weight), _detached(bias), eps, cudnn_enable)

        return self._normalise(x, call, weight, parts, (tuple(shape), eps, True))

    def _rms_norm(
        self,
        original: Callable[..., Tensor],
        x: Tensor,
        shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor:
        parts = self._parts(weight)
        if not any(parts):
            if weight is not None and weight.dim() > len(shape):  # copies, made by the hook below
                return (original(x, shape, None, eps) * weight).to(x.dtype)
            return original(x, shape, weight, eps)

        def call(x: Tensor) -> Tensor:
            return original(x, shape, _detached(weight), eps)

        wide = torch.promote_types(
            x.dtype, torch.float32
        )  # torch computes in it, and takes its eps
        least = torch.finfo(wide).eps if eps is None else eps
        return self._normalise(x, call, weight, parts, (tuple(shape), least, False))

    def _normalise(
        self,
        x: Tensor,
        call: Callable[[Tensor], Tensor],
        weight: Tensor | None,
        parts: Parts,
        options: tuple[tuple[int, ...], float, bool],
    ) -> Tensor:
        leaf = cast(Part, parts[0] or parts[1]).param
        sinks = tuple(part and self._shared(part, x) for part in parts)
        return listeners.norm(x, call, _detached(weight), leaf, options, sinks)

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
                if part is not None and self._listening():
                    module.__dict__[name] = self._copies(part, param, x)

        def leave(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            for name in own:
                module.__dict__.pop(name, None)

        if own:
            stack.callback(norm.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(norm.register_forward_hook(leave, always_call=True).remove)

    def _hook_bias(self, stack: ExitStack, attention: nn.Module, weight: Tensor) -> None:
        """Hands each sample a copy of the position bias [1, H, Q, K] that `compute_bias` makes."""
        compute = getattr(attention, "compute_bias", None)
        if compute is None or "compute_bias" in attention.__dict__:
            return
        samples: list[int] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
            samples[:] = [len(x)]

        def compute_copies(*args: Any, **kwargs: Any) -> Tensor:
            part = self._find(weight)
            if part is None or not samples or not self._listening():
                return cast(Tensor, compute(*args, **kwargs))
            self._bias.append([])
            try:
                values: Tensor = compute(*args, **kwargs)
            finally:
                looked_up = self._bias.pop()
            ids = looked_up[0]
            if len(looked_up) != 1 or values.shape != (1, weight.shape[1], *ids.shape):
                return cast(Tensor, compute(*args, **kwargs))  # another layout: told as such
            sink = self._looked_up(part, (samples[0], *ids.shape), None)
            copies = values.expand(samples[0], -1, -1, -1)
            ids = ids.expand(samples[0], *ids.shape)  # [B, Q, K]
            return listeners.look_up(copies, ids, part.param, (0, 2, 3, 1), sink)

        stack.callback(attention.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(attention.__dict__.pop, "compute_bias", None)
        attention.__dict__["compute_bias"] = compute_copies


_OURS = {"input": "x", "normalized_shape": "shape"}  # what torch's arguments are called here


def _by_torchs_names(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function for callers that name its arguments as torch does."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{_OURS.get(name, name): value for name, value in kwargs.items()})

    return call


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
