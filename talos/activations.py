"""Two options that keep fewer activations of frozen layers for the backward, each at a price.

A frozen linear layer keeps no input, so what an MLP keeps is what its activation function needs.

`checkpoint_frozen_mlps` computes it again: nothing is approximated, time is the price.
`few_bit_backward` keeps the derivative instead of the input, one byte an entry: gradients are
approximated (Novikov et al. 2022, "Few-bit backward", arXiv 2202.00441; here on a uniform grid).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from talos.architecture.structure import kind_of
from talos.errors import TalosRuntimeError, TalosValueError
from talos.names import named_modules

__all__ = ["checkpoint_frozen_mlps", "few_bit_backward"]

_STEPS = 200
_ZERO = 27
_NAN = 255
"""A derivative d is kept as the byte round(200 d) + 27: -.135 to 1.135, 0 and 1 exactly.

255 is NaN.
"""

_KINDS = {
    "ReLU": "relu",
    **dict.fromkeys(("SiLU", "SiLUActivation"), "silu"),
    **dict.fromkeys(("QuickGELU", "QuickGELUActivation"), "quick_gelu"),
    **dict.fromkeys(("GELU", "GELUActivation"), "none"),
    **dict.fromkeys(("GELUTanh", "NewGELUActivation"), "tanh"),
}
_LIBRARIES = ("torch", "transformers", "open_clip", "timm")

Forward = Callable[..., Tensor]


@contextmanager
def checkpoint_frozen_mlps(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """Compute the MLPs whose weights are all frozen again in the backward.

    An MLP is a module that holds nothing but the layers that `talos.architecture.structure` calls
    "mlp in" and "mlp out", and activation functions; of BERT, whose layer holds the second one
    itself, the module of the first one with its activation. It runs under `torch.utils.checkpoint`
    (not reentrant), so that only its input is kept. Dropout draws the same numbers again. An MLP
    with buffers is left out: what it notes in them it would note twice.

    Cost: the products into the hidden layer and the activation run once more; the product out of it
    does not, for the recomputation stops when it has what the backward needs. With `n` tokens,
    width `d` and a hidden layer of `h`: 2ndh more operations, 4ndh where the MLP is gated.
    Gain: `nhb` bytes an MLP, `3nhb` where it is gated, with `b` bytes an entry in autocast's dtype,
    less the input, `nd` entries in its own dtype, unless something else keeps that anyway.

    Args:
        model: any module. Frozen is what is frozen when the context is entered.

    Yields:
        The names of the MLPs.

    Raises:
        TalosValueError: the model has no such MLP.

    Example:
        >>> from collections import OrderedDict
        >>> layers = {"fc1": nn.Linear(4, 8), "act": nn.GELU(), "fc2": nn.Linear(8, 4)}
        >>> model = nn.ModuleDict({"mlp": nn.Sequential(OrderedDict(layers))}).requires_grad_(False)
        >>> with checkpoint_frozen_mlps(model) as names:
        ...     y = model["mlp"](torch.randn(2, 4, requires_grad=True))
        >>> names
        ('mlp',)
    """
    found = _frozen_mlps(model)
    if not found:
        raise TalosValueError(
            "model must have an MLP whose weights are all frozen, got none; make the optimizer "
            "first, which freezes what its mask leaves out; a mask of params='qk' leaves out every "
            "MLP, for others use torch.utils.checkpoint"
        )
    with _replaced(found, lambda _, forward: partial(checkpoint, forward, use_reentrant=False)):
        yield tuple(found)


@contextmanager
def few_bit_backward(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """Keep derivatives of activation functions in one byte an entry instead of their inputs.

    GELU (both forms, and the one of CLIP), SiLU and ReLU, where they are modules of torch,
    transformers, open_clip or timm and not in place. Outputs keep their bits. The gradient of ReLU
    is exact. The derivative of the others is rounded to a multiple of 1/200: an entry of the
    gradient is wrong by at most .0025 times the entry that arrives from above, and by the rounding
    of its dtype. Where it is NaN, NaN is what arrives. A backward with `create_graph=True` is
    refused (TalosRuntimeError).

    Cost: a pass over the activation's input in the forward, in fp32. Gain, of `n` entries: in bf16
    `n` of the `2n` bytes that torch keeps, in fp32 `3n` of `4n`. Where the next layer is trained,
    torch keeps the activation's output for it; ReLU's backward uses that one too, so that one byte
    an entry is lost there.

    Args:
        model: any module.

    Yields:
        The names of the activation functions.

    Raises:
        TalosValueError: the model has no such activation function.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU())
        >>> with few_bit_backward(model) as names:
        ...     model(torch.randn(2, 4)).sum().backward()
        >>> names
        ('1',)
    """
    found = {name: module for name, module in named_modules(model) if _kind(module) is not None}
    if not found:
        raise TalosValueError(
            "model must have an activation function that is a module, GELU, SiLU or ReLU, and not "
            "in place, got none"
        )
    with _replaced(found, _keeping_bytes):
        yield tuple(found)


def _frozen_mlps(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules that are nothing but a frozen MLP."""
    found: dict[str, nn.Module] = {}
    inside: set[int] = set()
    for name, module in named_modules(model):
        if id(module) in inside or isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue
        if next(module.children(), None) is None:
            continue
        kinds = set()
        for own, part in module.named_modules():
            if next(part.parameters(recurse=False), None) is not None:
                kinds.add(kind_of(".".join(filter(None, [name, own, "weight"]))))
        frozen = not any(param.requires_grad for param in module.parameters())
        frozen = frozen and next(module.buffers(), None) is None
        if frozen and "mlp in" in kinds and kinds <= {"mlp in", "mlp out"}:
            found[name] = module
            inside.update(map(id, module.modules()))
    return found


@contextmanager
def _replaced(
    modules: Mapping[str, nn.Module], replace: Callable[[nn.Module, Forward], Forward]
) -> Iterator[None]:
    """Other forwards for some modules."""
    before = {name: module.__dict__.get("forward") for name, module in modules.items()}
    try:
        for module in modules.values():
            module.__dict__["forward"] = replace(module, module.forward)
        yield
    finally:
        for name, module in modules.items():
            module.__dict__.pop("forward", None)
            if before[name] is not None:
                module.__dict__["forward"] = before[name]


def _kind(module: nn.Module) -> str | None:
    foreign = type(module).__module__.partition(".")[0] not in _LIBRARIES
    if foreign or getattr(module, "inplace", False):
        return None
    kind = _KINDS.get(type(module).__name__)
    return getattr(module, "approximate", kind) if kind == "none" else kind


def _keeping_bytes(module: nn.Module, forward: Forward) -> Forward:
    kind = _kind(module)

    def keep(*args: Tensor, **named: Tensor) -> Tensor:
        x, *more = *args, *named.values()
        in_place = getattr(module, "inplace", False)  # it may have been set meanwhile
        if more or in_place or not (torch.is_grad_enabled() and x.requires_grad):
            return forward(*args, **named)
        return _relu(x) if kind == "relu" else _smooth(x, forward, kind)

    return keep


def _derivative(x: Tensor, kind: str) -> Tensor:
    """The derivative in fp32 or more, by torch's own backward."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if kind == "quick_gelu":  # x sigmoid(1.702 x) is SiLU in other units
        wide, kind = 1.702 * wide, "silu"
    ones = torch.ones_like(wide)
    if kind == "silu":
        found: Tensor = torch.ops.aten.silu_backward(ones, wide)
    else:
        found = torch.ops.aten.gelu_backward(ones, wide, approximate=kind)
    return found


class _Smooth(torch.autograd.Function):
    """An activation function that keeps a byte an entry."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Forward, kind: str) -> Tensor:
        steps = _derivative(x, kind).mul_(_STEPS).round_().add_(_ZERO).nan_to_num_(_NAN)
        ctx.save_for_backward(steps.to(torch.uint8))
        y: Tensor = forward(x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise TalosRuntimeError(
                "gradients of few_bit_backward must not be differentiated, got create_graph=True; "
                "leave the context for that"
            )
        (steps,) = ctx.saved_tensors
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        derivative = steps.to(wide).sub_(_ZERO).div_(_STEPS).masked_fill_(steps == _NAN, math.nan)
        return derivative.mul_(grads[0]).to(grads[0].dtype), None, None


class _Relu(torch.autograd.Function):
    """ReLU that keeps where its input is not positive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x <= 0)
        return torch.relu(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        (flat,) = ctx.saved_tensors
        return (grads[0].masked_fill(flat, 0),)


_smooth: Callable[..., Tensor] = _Smooth.apply
_relu: Callable[..., Tensor] = _Relu.apply
