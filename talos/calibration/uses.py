"""How calls of torch's functions are recognised as uses of parameters: vectors, norms and tables.

The gain and bias of a norm are vectors of which every row has a copy, y = xhat * w + b: the
gradients of the copies are dy * xhat and dy. Norms that model libraries write themselves get such
copies by a hook, of which autograd computes the gradients. The relative position bias of T5 and its
relatives is looked up once for a whole batch; a hook hands out one copy a sample.

Nothing is kept for the backward that an ordinary forward would not keep: a norm keeps its input.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from talos.architecture.layers import is_norm
from talos.calibration import listeners
from talos.calibration.layouts import Origin, Use
from talos.calibration.listeners import Part, Sink
from talos.params import Candidates

__all__ = ["Parts", "Uses", "detached"]

Parts = tuple[Part | None, Part | None]  # of a weight and of a bias


class Uses:
    """Functions that compute what torch's do and tell of the parameters of a selection.

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
        self._params = {id(each.param): (name, each.param) for name, each in selection.items()}
        self._record = record
        self._receive = receive
        self._bias: list[list[Tensor]] = []  # ids that the position bias under way looks up
        self._silent = False

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Lets every function compute as ever, parameters' gradients included."""
        self._silent = True
        try:
            yield
        finally:
            self._silent = False

    def hook(self, stack: ExitStack, model: nn.Module) -> None:
        """Hands copies to what a model computes by itself, until `stack` closes."""
        for module in model.modules():
            if is_norm(module) and not isinstance(module, nn.LayerNorm | nn.RMSNorm):
                self._hook(stack, module)
            table = getattr(module, "relative_attention_bias", None)
            if isinstance(table, nn.Embedding) and id(table.weight) in self._params:
                self._hook_bias(stack, module, table.weight)

    def _listening(self) -> bool:
        return torch.is_grad_enabled() and not self._silent

    def _holds(self, tensor: object) -> bool:
        """Whether this is a parameter of the selection, or a view of one, and is listened to."""
        if not isinstance(tensor, Tensor):
            return False
        ours = id(tensor) in self._params or id(tensor._base) in self._params
        return ours and self._listening()

    def _find(self, tensor: Tensor | None, *, matrix: bool = False) -> Part | None:
        """The part of a parameter that `tensor` is: all of it, or a view of some of its entries.

        Args:
            tensor: what a call was given.
            matrix: whether the transpose of such a view will do.
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

    def _parts(
        self, weight: Tensor | None, bias: Tensor | None = None, *, matrix: bool = False
    ) -> Parts:
        """What a call uses of the parameters; nothing where it is to run as ever."""
        parts = self._find(weight, matrix=matrix), self._find(bias)
        for part, tensor in zip(parts, (weight, bias), strict=True):
            if part is None and tensor is not None and tensor.requires_grad:
                return None, None  # computed from a parameter: autograd will tell
        return parts if self._listening() else (None, None)

    def _use(self, part: Part, lead: Sequence[int], origin: Origin = "layer") -> Use:
        """A call on rows of the leading dimensions `lead`."""
        return Use(part.name, tuple(lead), origin, routed=len(lead) == 1 and not part.whole)

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
        sink = Sink(self._use(part, lead), self._receive, table=part, padding_idx=padding_idx)
        self._record(sink)
        return sink

    def _copies(self, part: Part, vector: Tensor, x: Tensor) -> Tensor:
        """A vector's copies for the rows of `x`, whose last dimensions are the vector's."""
        sink = self._shared(part, x, vector.dim())
        return listeners.copies(vector.detach(), part.param, x.shape, sink)

    def _shared(self, part: Part, x: Tensor, dims: int) -> Sink:
        """The sink of a vector of `dims` dimensions that every row of `x` shares."""
        sink = Sink(self._use(part, x.shape[: x.dim() - dims]), self._receive, vector=part)
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
            return original(x, shape, detached(weight), detached(bias), eps, cudnn_enable)

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
            return original(x, shape, detached(weight), eps)

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
        sinks = tuple(part and self._shared(part, x, len(options[0])) for part in parts)
        return listeners.norm(x, call, detached(weight), leaf, options, sinks)

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


def detached(tensor: Tensor | None) -> Tensor | None:
    """The tensor without its history."""
    return None if tensor is None else tensor.detach()
