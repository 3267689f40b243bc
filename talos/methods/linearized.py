"""Linearized fine-tuning: the model's first-order expansion around its pretrained weights.

    f_lin(x; theta) = f(x; theta_0) + J_theta0(x) (theta - theta_0)

One forward pass of `torch.func.jvp` computes both terms: dropout draws one mask for both. The
gradient with respect to theta is J^T times that of the logits, which one backward pass computes.
Parameters that require no gradient and all buffers are not part of the expansion. Activation
checkpointing is not possible: torch refuses it inside of `jvp`.

Source: Ortiz-Jimenez et al. 2023, "Task arithmetic in the tangent space", arXiv 2305.12827.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from talos.batches import default_logits
from talos.errors import TalosTypeError
from talos.methods.base import Hyperparameters, LogitsFunction, Method, Phase, check_bare, trainable
from talos.methods.nonlinear import Dense

__all__ = ["Linearized", "LinearizedModel"]


class LinearizedModel(nn.Module):
    """A model's expansion around the weights that it has when this is made.

    It shares the model's parameters: they are theta, so what trains or edits the model (a
    `TaskVector`, say) moves along the expansion. Only a copy of theta_0 is held beside them.

    Args:
        model: the model; its modules' modes count as they are at each call.
        logits_fn: `logits_fn(model, batch)`, the function that is expanded.
        base: theta_0 by the names of `talos.names.named_parameters`, shared and not copied; None:
            a copy of the weights as they are now.

    Attributes:
        model: the model.

    Raises:
        TalosValueError: no parameter requires a gradient, or the model is wrapped.

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
        check_bare(model, Linearized.name)
        params = trainable(model)
        own = {id(param): name for name, param in model.named_parameters()}
        self.model = model
        self.logits_fn = logits_fn or default_logits
        self._names = list(params)
        self._places = [f"model.{own[id(param)]}" for param in params.values()]
        for number, (name, param) in enumerate(params.items()):  # buffers move with the module
            initial = param.detach().clone() if base is None else base[name]
            self.register_buffer(f"base_{number}", initial, persistent=False)
        _load_forward_derivatives()

    @property
    def base(self) -> dict[str, Tensor]:
        """theta_0, of the parameters that require a gradient."""
        return {name: self.get_buffer(f"base_{i}") for i, name in enumerate(self._names)}

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """Refuses a call as of the model: a loss that it computes is no part of the expansion.

        Raises:
            TalosTypeError: it is called with anything but one batch.
        """
        if len(args) != 1 or inputs:
            raise TalosTypeError(
                f"a LinearizedModel must be called with one batch, got {len(args)} and "
                f"{', '.join(inputs) or 'no keywords'}; it returns logits: let loss_fn compute the "
                "loss of model(batch) and the batch's labels"
            )
        return super().__call__(*args)

    def forward(self, batch: Any) -> Tensor:
        """The logits of a batch on the expansion.

        Args:
            batch: what `logits_fn` takes.

        Returns:
            As `logits_fn` returns them, `[B, C]` or `[B, T, V]`.
        """
        caller = _Caller(self.model, self.logits_fn)
        buffers = {f"model.{name}": buffer for name, buffer in self.model.named_buffers()}

        def logits(*weights: Tensor) -> Tensor:
            # Clones: what a layer notes in its buffers is noted in them, and forgotten.
            swapped = {name: buffer.clone() for name, buffer in buffers.items()}
            swapped |= dict(zip(self._places, weights, strict=True))
            output: Tensor = torch.func.functional_call(caller, swapped, (batch,))
            return output

        primals = tuple(self.base.values())
        tangents = tuple(map(torch.sub, map(self.get_parameter, self._places), primals))
        with _forward_differentiable():
            both = torch.func.jvp(logits, primals, tangents)
        total: Tensor = both[0] + both[1]
        return total


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

    def start(self, model: nn.Module, hyper: Hyperparameters, logits_fn: LogitsFunction) -> Phase:
        """See `Method.start`; a loss function is called with the `LinearizedModel`."""
        linear = LinearizedModel(model, logits_fn)
        params = trainable(model)
        return Dense(
            linear, params, hyper, lambda module, batch: module(batch), self.metadata, linear.base
        )


class _Caller(nn.Module):
    """Logits as a module's output, so that weights can be swapped all the while."""

    def __init__(self, model: nn.Module, logits_fn: LogitsFunction) -> None:
        super().__init__()
        self.model, self.logits_fn = model, logits_fn

    def forward(self, batch: Any) -> Tensor:
        return self.logits_fn(self.model, batch)


@contextmanager
def _forward_differentiable() -> Iterator[None]:
    """No fused attention, which has no forward derivative; no inference mode, which drops it."""
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
    """Torch loads its rules at the first use, and warns then of its own use of `torch.jit`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.func.jvp(
            torch.sin,
            (torch.zeros((), dtype=torch.float32, device="cpu"),),
            (torch.ones((), dtype=torch.float32, device="cpu"),),
        )
