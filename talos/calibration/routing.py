"""Route the calls by which a model uses its parameters to autograd functions with a sink.

`Router` is a mode of torch: inside it, every call of torch's functions comes to it first. A call
with a scored weight or bias computes the same output, but its backward hands the output's gradient
to a sink instead of computing the parameter's. All other calls run as usual. This covers
`nn.Linear`, `nn.LayerNorm`, `nn.MultiheadAttention` and all code that calls torch with a scored
parameter or with a view of some of its rows. `talos.calibration.hooks` covers the modules that need
more than that.

Linear layers may also be written as products, their weight [out, in] or [in, out]: `x @ w.T`,
`w @ x`, `matmul`, `mm`, `addmm` (Conv1D of transformers), and `bmm` or `matmul` with a stack of
weights [experts, in, out], each of which is a linear layer. A bias may be one term of a sum. A
convolution becomes the linear layer of its unfolded image.

A norm's gain and bias are vectors of which every row has a copy, y = xhat * w + b: the gradients of
the copies are dy * xhat and dy. Nothing is kept for the backward that an ordinary forward would not
keep: a norm keeps its input, and layers that share an input share its cast to autocast's dtype.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from talos.calibration import autograd
from talos.calibration.autograd import Part, Sink
from talos.calibration.layouts import Use, leading
from talos.params import Candidates
from talos.tensors import SharedCast

__all__ = ["Router", "eager"]

Parts = tuple[Part | None, Part | None]  # of a weight and of a bias
Pair = int | Sequence[int]


def _without_dispatch(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a function of torch that does not ask modes; calls inside it still do."""
    original = cast(FunctionType, function)
    scope = original.__globals__ | {"has_torch_function": lambda _: False}
    copy = FunctionType(original.__code__, scope, original.__name__, original.__defaults__)
    copy.__kwdefaults__ = original.__kwdefaults__
    return copy


# A mode is off while it handles a call. These two call torch in their turn, with the mode on.
_attend = _without_dispatch(functional.multi_head_attention_forward)
_grad = _without_dispatch(torch.autograd.grad)

_compiler = threading.RLock()


@contextmanager
def eager() -> Iterator[None]:
    """Run code that torch has compiled, or would compile, eagerly: compiled code asks no mode."""
    with _compiler, torch.compiler.set_stance("force_eager"):  # the stance is the process's
        yield


class Router(TorchFunctionMode):
    """Routes the calls of torch that use the parameters of `candidates`.

    Args:
        candidates: the parameters to score.
        record: called in the forward with every sink.
        receive: called in the backward; see `Sink`.
    """

    def __init__(
        self,
        candidates: Candidates,
        record: Callable[[Sink], None],
        receive: Callable[[Sink, Tensor, Tensor | None], None],
    ) -> None:
        super().__init__()
        self._params = {id(each.param): (name, each.param) for name, each in candidates.items()}
        self._record = record
        self._receive = receive
        self._cast = SharedCast()
        self._silent = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one call of torch."""
        kwargs = kwargs or {}
        replaced = func is functional.linear  # while compact gradients are on
        ours = Router._linear if replaced else _ROUTES.get(func)
        if ours is not None and self.active:
            operands = [kwargs[name] for name in _OPERANDS if name in kwargs]
            options = {name: each for name, each in kwargs.items() if name not in _OPERANDS}
            output = ours(self, *args, *operands, **options)
            if output is not None:
                return output
        return func(*args, **kwargs)

    @property
    def active(self) -> bool:
        """Whether calls are routed."""
        return torch.is_grad_enabled() and not self._silent

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Let every call run as usual, with parameters' gradients by autograd."""
        self._silent = True
        try:
            yield
        finally:
            self._silent = False

    def forget(self) -> None:
        """Drop the cast of the last input."""
        self._cast = SharedCast()

    def part(self, tensor: Tensor | None, *, matrix: bool = False) -> Part | None:
        """Return the part of a parameter that `tensor` is: all of it, or a view of some entries.

        Args:
            tensor: what a call was given.
            matrix: whether the transpose of such a view counts, too.
        """
        if tensor is None:
            return None
        if id(tensor) in self._params:
            name, param = self._params[id(tensor)]
            return Part(name, param, 0, param.numel())
        if id(tensor._base) not in self._params or tensor.grad_fn is None:
            return None  # a view made under no_grad hands no gradient to its base
        name, param = self._params[id(tensor._base)]
        start = int(tensor.storage_offset()) - int(param.storage_offset())
        views = (tensor, tensor.t()) if matrix and tensor.dim() == 2 else (tensor,)
        for flipped, view in enumerate(views):
            same = view.shape == param.shape and view.stride() == param.stride() and start == 0
            if same or (view.is_contiguous() and param.is_contiguous()):
                return Part(name, param, start, start + view.numel(), bool(flipped))
        return None

    def copies(self, part: Part, vector: Tensor, x: Tensor) -> Tensor:
        """Return a vector's copies for the rows of `x`, whose last dimensions are the vector's."""
        sink = self._vector_sink(part, x, vector.dim())
        return autograd.copies(vector.detach(), part.param, x.shape, sink)

    def table_sink(self, part: Part, lead: Sequence[int], padding_idx: int | None = None) -> Sink:
        """Return the sink of a table in which ids [*lead] are looked up."""
        return self._sink(part, lead, table=part, padding_idx=padding_idx)

    def _vector_sink(self, part: Part, x: Tensor, dims: int) -> Sink:
        """Return the sink of a vector of `dims` dimensions that every row of `x` shares."""
        return self._sink(part, x.shape[: x.dim() - dims], vector=part)

    def _sink(self, part: Part, lead: Sequence[int], **options: Any) -> Sink:
        """Return the sink of a call on rows of the leading dimensions `lead`."""
        use = Use(part.name, tuple(lead), routed=len(lead) == 1 and not part.whole)
        sink = Sink(use, self._receive, **options)
        self._record(sink)
        return sink

    def _holds(self, tensor: object) -> bool:
        """Whether this is a scored parameter or a view of one."""
        if not isinstance(tensor, Tensor):
            return False
        return id(tensor) in self._params or id(tensor._base) in self._params

    def _parts(
        self, weight: Tensor | None, bias: Tensor | None = None, *, matrix: bool = False
    ) -> Parts:
        """Return what a call uses of the parameters; nothing if autograd is to handle it."""
        parts = self.part(weight, matrix=matrix), self.part(bias)
        for part, tensor in zip(parts, (weight, bias), strict=True):
            if part is None and tensor is not None and tensor.requires_grad:
                return None, None  # computed from a parameter: refused in the backward
        return parts

    # Routes: each returns None where the call is to run as usual.

    def _backward(self, *args: Any, **kwargs: Any) -> Any:
        with self:  # a checkpoint runs its forward again
            return _grad(*args, **kwargs)

    def _multi_head(self, *args: Any, **kwargs: Any) -> Any:
        with self:  # for its projections
            return _attend(*args, **kwargs)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """X Wᵀ + b."""
        parts = self._parts(weight, bias, matrix=True)
        if not any(parts) or weight.dim() != 2:
            return None
        return self._layer(x, weight.detach(), _detached(bias), parts)

    def _layer(self, x: Tensor, weight: Tensor, bias: Tensor | None, parts: Parts) -> Tensor:
        """Return a linear layer with a sink, in autocast's dtype where that is on."""
        device = x.device.type
        inputs = x.detach()
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            inputs, weight = self._cast(x, dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        matrix, vector = parts
        part = cast(Part, matrix or vector)
        transposed = matrix is not None and matrix.flipped
        sink = self._sink(part, leading(x), matrix=matrix, vector=vector, transposed=transposed)
        return autograd.linear(x, inputs, weight, bias, part.param, sink)

    def _addmm(self, bias: Tensor, x: Any, *others: Any, **options: Any) -> Tensor | None:
        if len(others) != 1 or options or bias.shape != others[0].shape[1:]:
            return None
        return self._linear(x, others[0].t(), bias)

    def _matmul(self, x: Any, *others: Any, **options: Any) -> Tensor | None:
        if len(others) != 1 or options or self._holds(x) == self._holds(others[0]):
            return None
        (other,) = others
        if self._holds(x):  # on the left: W X = (Xᵀ Wᵀ)ᵀ
            if x.dim() != 2 or other.dim() == 0:
                return None
            y = self._linear(other.mT if other.dim() > 1 else other, x)
            return y if y is None or other.dim() == 1 else y.mT.contiguous()
        if other.dim() == 2:
            return self._linear(x, other.t())
        if other.dim() != 3 or not (x.dim() == 2 or (x.dim() == 3 and len(x) == len(other))):
            return None
        rows = x.expand(len(other), *x.shape[-2:])
        products = [self._linear(rows[i], other[i].t()) for i in range(len(other))]
        found = [each for each in products if each is not None]  # all or none
        return torch.stack(found) if found else None

    def _add(self, x: Any, *others: Any, **options: Any) -> Tensor | None:
        if len(others) != 1 or options:
            return None
        for vector, other in ((x, *others), (*others, x)):
            if (copies := self._bias(vector, other)) is not None:
                return cast(Tensor, other + copies)
        return None

    def _add_(self, x: Any, *others: Any, **options: Any) -> Tensor | None:
        copies = None if len(others) != 1 or options else self._bias(others[0], x)
        return None if copies is None else x.add_(copies)

    def _bias(self, vector: object, x: object) -> Tensor | None:
        """Return copies of a scored bias for the rows of `x`; None where it is no such bias."""
        if not self._holds(vector) or self._holds(x) or not isinstance(x, Tensor):
            return None
        bias = cast(Tensor, vector)
        part = self.part(bias)
        fits = bias.dim() == 1 and x.shape[-1:] == bias.shape
        return self.copies(part, bias, x) if part is not None and fits else None

    def _conv2d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Pair = 1,
        padding: str | Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
    ) -> Tensor | None:
        parts = self._parts(weight, bias)
        if not any(parts):
            return None
        images = x if x.dim() == 4 else x[None]
        patches, grid = _unfolded(images, weight.shape[2:], stride, padding, dilation)
        weights = weight.detach().flatten(1).chunk(groups)
        biases = [None] * groups if bias is None else bias.detach().chunk(groups)
        outputs = []
        for group, inputs in enumerate(patches.chunk(groups, 2)):
            own = (
                parts[0] and parts[0].chunk(group, groups),
                parts[1] and parts[1].chunk(group, groups),
            )
            outputs.append(self._layer(inputs, weights[group], biases[group], own))
        # [B, O, L]; contiguous, for the strides of a view look like channels_last where B is 1, and
        # the backward of a batch norm then reads its gradient wrongly.
        output = torch.cat(outputs, 2).transpose(1, 2).contiguous()
        output = output.view(len(images), len(weight), *grid)
        return output if x.dim() == 4 else output[0]

    def _embedding(self, x: Tensor, weight: Tensor, **options: Any) -> Tensor | None:
        (part, _) = self._parts(weight)
        if part is None or options["max_norm"] is not None or options["scale_grad_by_freq"]:
            return None
        found = functional.embedding(x, weight.detach(), **options)
        sink = self.table_sink(part, x.shape, options["padding_idx"])
        return autograd.look_up(found, x, part.param, tuple(range(found.dim())), sink)

    def _layer_norm(
        self,
        x: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enable: bool = True,
    ) -> Tensor | None:
        return self._norm(functional.layer_norm, x, normalized_shape, (weight, bias), eps)

    def _rms_norm(
        self,
        x: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor | None:
        if weight is not None and weight.dim() > len(normalized_shape):  # copies that a hook made
            return (functional.rms_norm(x, normalized_shape, None, eps) * weight).to(x.dtype)
        return self._norm(functional.rms_norm, x, normalized_shape, (weight,), eps)

    def _norm(
        self,
        function: Callable[..., Tensor],
        x: Tensor,
        shape: Sequence[int],
        vectors: tuple[Tensor | None, ...],
        eps: float | None,
    ) -> Tensor | None:
        parts = self._parts(*vectors)
        if not any(parts):
            return None
        leaf = cast(Part, parts[0] or parts[1]).param
        sinks = tuple(part and self._vector_sink(part, x, len(shape)) for part in parts)
        plain = tuple(map(_detached, vectors))
        return autograd.norm(function, x, tuple(shape), eps, leaf, sinks, *plain)


_ROUTES: dict[Any, Callable[..., Any]] = {
    torch.autograd.grad: Router._backward,
    functional.multi_head_attention_forward: Router._multi_head,
    torch._C._nn.linear: Router._linear,
    torch.conv2d: Router._conv2d,
    functional.embedding: Router._embedding,
    **dict.fromkeys((functional.layer_norm, torch.layer_norm), Router._layer_norm),
    **dict.fromkeys((functional.rms_norm, torch.rms_norm), Router._rms_norm),
    **dict.fromkeys((torch.addmm, Tensor.addmm), Router._addmm),
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm), Router._matmul),
    **dict.fromkeys((Tensor.matmul, Tensor.mm, Tensor.bmm), Router._matmul),
    **dict.fromkeys((torch.add, Tensor.add), Router._add),  # "+" is Tensor.add, "+=" Tensor.add_
    Tensor.add_: Router._add_,
}
_OPERANDS = ("input", "mat1", "other", "mat2")  # torch's names for the first arguments, in order


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _unfolded(
    images: Tensor, kernel: Sequence[int], stride: Pair, padding: str | Pair, dilation: Pair
) -> tuple[Tensor, tuple[int, int]]:
    """Return a 2-d convolution's patches [B, L, C * kh * kw] and the size of its output."""
    steps, strides = _pair(dilation), _pair(stride)
    pads = (0, 0) if isinstance(padding, str) else _pair(padding)
    if padding == "same":  # what is odd goes to the end, as in torch
        spans = [step * (size - 1) for step, size in zip(steps, kernel, strict=True)]
        edges = [(span // 2, span - span // 2) for span in reversed(spans)]
        images = functional.pad(images, (*edges[0], *edges[1]))
    height, width = (
        (images.shape[2 + i] + 2 * pads[i] - steps[i] * (kernel[i] - 1) - 1) // strides[i] + 1
        for i in (0, 1)
    )
    patches = functional.unfold(images, tuple(kernel), steps, pads, strides).transpose(1, 2)
    return patches, (height, width)


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
