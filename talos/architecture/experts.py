"""Mixtures of experts: the weights of all experts of a layer, stacked in one tensor.

Since version 5 transformers holds the experts of a layer as 3-d parameters, [experts, out, in] or
[experts, in, out], with biases [experts, out]. Every slice is a linear layer. An option of the
model decides how they are multiplied: one after another, which can be scored, or all at once.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["expert_weights", "is_router", "one_by_one"]

_OPTION = "_experts_implementation_internal"  # of a configuration of transformers

_logger = logging.getLogger(__name__)


def expert_weights(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the stacked weights and biases of experts among one module's own parameters.

    Stacked weights are 3-d, and the module is named after experts, or has a number of experts that
    is their dimension 0. They may be 2-d, [experts * out, in], if both hold.

    Example:
        >>> import torch
        >>> class Experts(nn.Module):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.gate_up_proj = nn.Parameter(torch.randn(4, 16, 8))
        >>> [tuple(param.shape) for param in expert_weights(Experts())]
        [(4, 16, 8)]
    """
    kind = type(module)
    if kind.__module__.startswith("torch."):  # Conv1d and Bilinear have 3-d weights too
        return
    own = {
        name: param
        for name, param in module.named_parameters(recurse=False)
        if not is_lazy(param) and param.is_floating_point()
    }
    counts = _counts(module)
    named, most = "expert" in kind.__name__.lower(), max(counts, default=0)
    stacks = {
        name
        for name, param in own.items()
        if param.dim() == 3 and "bias" not in name and (named or len(param) in counts)
    }
    sizes = {len(own[name]) for name in stacks}
    for name, param in own.items():
        flat = named and len(param) > most > 1 and len(param) % most == 0
        matrix = param.dim() == 2 and (len(param) in sizes if "bias" in name else flat)
        if name in stacks or matrix:
            yield param


def is_router(module: nn.Module) -> bool:
    """Return whether a module is a router: one row of weights for each expert.

    A router decides which expert sees a token. The presets leave that to the base model.
    """
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Linear) or weight is None or is_lazy(weight) or weight.dim() != 2:
        return False
    return len(weight) in _counts(module)


def _counts(module: nn.Module) -> set[int]:
    """Return a module's integer attributes whose names contain "expert"."""
    return {
        value
        for name, value in vars(module).items()
        if "expert" in name and isinstance(value, int) and not isinstance(value, bool)
    }


@contextmanager
def one_by_one(model: nn.Module, params: Sequence[Tensor]) -> Iterator[None]:
    """Make experts of transformers multiply one after another inside this context.

    Args:
        model: any module.
        params: modules that hold none of these stay as they are.
    """
    wanted = {id(param) for param in params}
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, _OPTION, None) not in (None, "eager") and any(
            id(param) in wanted for param in expert_weights(module)
        ):
            configs[id(config)] = config
    before = [(config, getattr(config, _OPTION)) for config in configs.values()]
    try:
        for config, name in before:
            setattr(config, _OPTION, "eager")
            _logger.info(
                "experts multiply one after another while they are scored: "
                "experts_implementation='eager' in the place of %r",
                name,
            )
        yield
    finally:
        for config, name in before:
            setattr(config, _OPTION, name)
