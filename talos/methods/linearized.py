"""Linearized fine-tuning: the model's first-order expansion around its pretrained weights.

    f_lin(x; theta) = f(x; theta_0) + J_theta0(x) (theta - theta_0)

One forward pass of `torch.func.jvp` computes both terms, so that dropout draws one mask for both.
One backward pass computes the gradient with respect to theta: J^T times that of the logits.
Parameters that require no gradient and all buffers are not part of the expansion. Activation
checkpointing is not possible: torch refuses it inside `jvp`.

Source: Ortiz-Jimenez et al. 2023, "Task arithmetic in the tangent space", arXiv 2305.12827.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from talos.batches import default_logits
from talos.errors import TalosTypeError, TalosValueError
from talos.methods.base import (
    LogitsFunction,
    Method,
    Phase,
    Setup,
    check_unsharded,
    logits_with,
    trainable,
)
from talos.methods.nonlinear import Dense
from talos.names import unwrapped

__all__ = ["Linearized", "LinearizedModel", "first_order"]


class LinearizedModel(nn.Module):
    """The first-order expansion of a model around its present weights.

    It shares the model's parameters as theta: training or editing the model (with a `TaskVector`)
    moves along the expansion. It holds a copy of theta_0.

    Args:
        model: the model; the modes of its modules count as they are at each call.
        logits_fn: `logits_fn(model, batch)`, the function to expand.
        base: theta_0 by the names of `talos.names.named_parameters`, not copied; None: a copy of
            the present weights.

    Attributes:
        model: the model.

    Raises:
        TalosTypeError: the model is no module.
        TalosValueError: no parameter requires a gradient, or the model is wrapped or sharded.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        >>> linear = LinearizedModel(model)
        >>> x = torch.ones(1, 2)
        >>> torch.equal(linear(x), model(x))  # there is nothing to expand yet
        True
        >>> with torch.no_grad():
        ...     _ = model[0].bias.add_(100.0)
        >>> bool(model(x).abs().max() <= 1), bool(linear(x).abs().max() > 1)
        (True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        logits_fn: LogitsFunction | None = None,
        *,
        base: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if unwrapped(model) is not model:
            raise TalosValueError(
                f"model must not be wrapped for the method {Linearized.name}, got "
                f"{type(model).__name__}; pass the module inside it"
            )
        params = trainable(model)
        check_unsharded(params, Linearized.name)
        own = {id(param): name for name, param in model.named_parameters()}
        self.model = model
        self.logits_fn = logits_fn or default_logits
        self._names = list(params)
        self._places = [own[id(param)] for param in params.values()]
        for number, (name, param) in enumerate(params.items()):  # buffers move with the module
            initial = param.detach().clone() if base is None else base[name]
            self.register_buffer(f"base_{number}", initial, persistent=False)

    @property
    def base(self) -> dict[str, Tensor]:
        """theta_0 of the parameters that require a gradient, by name."""
        return {name: self.get_buffer(f"base_{i}") for i, name in enumerate(self._names)}

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """Call `forward`; refuse the model's own signature, which may return a loss.

        Raises:
            TalosTypeError: the arguments are not one batch.
        """
        if len(args) != 1 or inputs:
            raise TalosTypeError(
                f"a LinearizedModel must be called with one batch, got {len(args)} and "
                f"{', '.join(inputs) or 'no keywords'}; it returns logits: compute the loss of "
                "model(batch) and the batch's labels in loss_fn"
            )
        return super().__call__(*args)

    def forward(self, batch: Any) -> Tensor:
        """Return the expansion's logits of a batch, as `logits_fn` does: [B, C] or [B, T, V]."""
        primals = dict(zip(self._places, self.base.values(), strict=True))
        tangents = {
            name: self.model.get_parameter(name) - primal for name, primal in primals.items()
        }
        constant, change = first_order(self.model, self.logits_fn, primals, tangents, batch)
        return constant + change


def first_order(
    model: nn.Module,
    logits_fn: LogitsFunction,
    weights: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    batch: Any,
) -> tuple[Tensor, Tensor]:
    """Return the logits of a batch and their derivative along a direction in the weights.

    Args:
        model: the model; it stays as it is, buffers too.
        logits_fn: `logits_fn(model, batch)`, the function to differentiate.
        weights: where to differentiate, by the names of `model.named_parameters()` or of its
            buffers; the others are as in the model.
        direction: the direction, by the same names, in the shapes and dtypes of the weights.
        batch: as `logits_fn` takes it.

    Returns:
        f(x; theta) and J_theta(x) direction, both as `logits_fn` returns logits.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> along = {"weight": torch.ones(1, 2)}
        >>> first_order(model, default_logits, {"weight": model.weight}, along, torch.ones(1, 2))[1]
        tensor([[2.]], grad_fn=<...>)
    """
    buffers = dict(model.named_buffers())

    def logits(*primals: Tensor) -> Tensor:
        # A layer writes its buffers; it writes clones, which are dropped.
        swapped = {name: buffer.clone() for name, buffer in buffers.items()}
        return logits_with(
            model, logits_fn, swapped | dict(zip(weights, primals, strict=True)), batch
        )

    _load_forward_derivatives()
    tangents = tuple(direction[name] for name in weights)
    with _forward_differentiable():
        both = torch.func.jvp(logits, tuple(weights.values()), tangents)
    return both[0], both[1]


@dataclass(frozen=True)
class Linearized(Method):
    """AdamW over every parameter that requires a gradient, on the expansion.

    The task vector belongs to the expansion: evaluate it on a `LinearizedModel`.

    Example:
        >>> Linearized().metadata
        {'method': 'linearized'}
    """

    name = "linearized"
    usual_lr = 5e-5

    def _first_phase(self, setup: Setup) -> Phase:
        # A loss function is called with the `LinearizedModel`.
        linear = LinearizedModel(setup.model, setup.logits_fn)
        setup = replace(setup, model=linear, logits_fn=lambda module, batch: module(batch))
        return Dense(setup, trainable(linear.model), linear.base)


@contextmanager
def _forward_differentiable() -> Iterator[None]:
    """Turn off fused attention and inference mode, which have no forward derivative."""
    fastpath, graph = torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(graph),
            sdpa_kernel(SDPBackend.MATH),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


@cache
def _load_forward_derivatives() -> None:
    """Load torch's rules without the warning that torch gives at their first use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.func.jvp(
            torch.sin,
            (torch.zeros((), dtype=torch.float32, device="cpu"),),
            (torch.ones((), dtype=torch.float32, device="cpu"),),
        )
