"""Hooks for modules whose parameters cannot be scored from single calls of torch.

A norm that a model library writes itself multiplies its gain by elementwise products. A hook hands
it a copy of the gain for every row, whose gradients autograd computes. The relative position bias
of T5 is looked up once for a whole batch; a hook hands out one copy a sample.
"""

from contextlib import ExitStack
from typing import Any, cast

from torch import Tensor, nn

from talos.architecture.layers import is_norm
from talos.calibration import autograd
from talos.calibration.routing import Router

__all__ = ["hook_modules"]


def hook_modules(stack: ExitStack, model: nn.Module, router: Router) -> None:
    """Put hooks on the modules of a model until `stack` closes."""
    for module in model.modules():
        if is_norm(module) and not isinstance(module, nn.LayerNorm | nn.RMSNorm):
            _hook_norm(stack, module, router)
        table = getattr(module, "relative_attention_bias", None)
        if isinstance(table, nn.Embedding):
            _hook_bias(stack, module, table, router)


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))


def _hook_norm(stack: ExitStack, norm: nn.Module, router: Router) -> None:
    """Put copies in the place of a norm's own parameters while its forward runs."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name, param in module.named_parameters(recurse=False):
            part = router.part(param)  # now: a sharded model has other parameters in its forward
            if part is not None and router.active:
                module.__dict__[name] = router.copies(part, param, _first_tensor(args, kwargs))

    def leave(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        for name, _ in module.named_parameters(recurse=False):
            module.__dict__.pop(name, None)

    stack.callback(norm.register_forward_pre_hook(enter, with_kwargs=True).remove)
    stack.callback(norm.register_forward_hook(leave, always_call=True).remove)


def _hook_bias(stack: ExitStack, attention: nn.Module, table: nn.Embedding, router: Router) -> None:
    """Hand each sample a copy of the position bias [1, H, Q, K] that `compute_bias` makes."""
    compute = getattr(attention, "compute_bias", None)
    if compute is None or "compute_bias" in attention.__dict__:
        return
    samples: list[int] = []
    looked_up: list[Tensor] = []  # ids

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        samples[:] = [len(_first_tensor(args, kwargs))]

    def look_up(module: nn.Module, args: tuple[Any, ...]) -> None:
        looked_up.extend(args)

    def compute_copies(*args: Any, **kwargs: Any) -> Tensor:
        part = router.part(table.weight)
        if part is None or not samples or not router.active:
            return cast(Tensor, compute(*args, **kwargs))
        looked_up.clear()
        with router.silence(), table.register_forward_pre_hook(look_up):
            values: Tensor = compute(*args, **kwargs).detach()
        if len(looked_up) != 1 or values.shape != (1, table.embedding_dim, *looked_up[0].shape):
            return cast(Tensor, compute(*args, **kwargs))  # another layout: refused later
        (ids,) = looked_up
        sink = router.table_sink(part, (samples[0], *ids.shape))
        copies = values.expand(samples[0], -1, -1, -1)
        ids = ids.expand(samples[0], *ids.shape)  # [B, Q, K]
        return autograd.look_up(copies, ids, part.param, (0, 2, 3, 1), sink)

    stack.callback(attention.register_forward_pre_hook(enter, with_kwargs=True).remove)
    stack.callback(attention.__dict__.pop, "compute_bias", None)
    attention.__dict__["compute_bias"] = compute_copies
