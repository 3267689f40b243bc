"""Warnings about an optimizer's use that only show during training; each is given once."""

import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

__all__ = ["warn_of_no_gradient", "watch_frozen"]


def warn_of_no_gradient(stacklevel: int) -> None:
    """Warn that two steps found no gradient at all.

    Args:
        stacklevel: as of `warnings.warn`, from the caller of this function.
    """
    warnings.warn(
        "two steps found no gradient of any selected parameter, so nothing is trained; if "
        "parameters were replaced after the optimizer was made (load_state_dict(assign=True), a "
        "new module), make a new optimizer",
        stacklevel=stacklevel + 1,
    )


def watch_frozen(owner: torch.optim.Optimizer, frozen: Mapping[str, Tensor]) -> Callable[[], Any]:
    """Warn when another optimizer steps a parameter that `owner` has frozen.

    Args:
        owner: the optimizer that froze them; the watch ends with it.
        frozen: the frozen parameters by name.

    Returns:
        A function that ends the watch.
    """
    names = {id(param): name for name, param in frozen.items()}
    seen = weakref.WeakSet([owner])

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if optimizer in seen:
            return
        seen.add(optimizer)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        found = [names[id(p)] for p in params if id(p) in names and not p.requires_grad]
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            warnings.warn(
                f"{type(optimizer).__name__} steps {found[0]}{more}, frozen by SparseAdam because "
                "its mask selects nothing there, so it gets no gradient; pass SparseAdam only the "
                "named parameters that it trains, or call its release()",
                stacklevel=4,
            )

    return weakref.finalize(owner, register_optimizer_step_pre_hook(look).remove)
