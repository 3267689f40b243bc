"""Warnings about other optimizers of a model, and about training that changes nothing."""

import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from talos.masks import Mask

__all__ = ["at_work", "hold", "let_go", "note_step", "warn_of_no_gradient"]


def warn_of_no_gradient(stacklevel: int) -> None:
    """Warn that two steps found no gradient at all.

    Args:
        stacklevel: as of `warnings.warn`, from the caller of this function.
    """
    warnings.warn(
        "two steps found no gradient of any selected parameter, so nothing is trained; if "
        "parameters were replaced after the optimizer was made (load_state_dict(assign=True), "
        "fully_shard, a new module), make a new optimizer",
        stacklevel=stacklevel + 1,
    )


@dataclass(frozen=True)
class _Held:
    """What an optimizer at work holds.

    Attributes:
        names: the parameters that it trains, with their names in the mask.
        mask: the entries that it trains.
        frozen: names of the parameters that it froze, by identity.
        seen: the optimizers that were compared with it; each is warned of once.
        rivals: the optimizers that train entries of it, with the names of the parameters.
        stepped: those of them that made a step since it is at work.
    """

    names: Mapping[Tensor, str]
    mask: Mask
    frozen: Mapping[int, str]
    seen: "weakref.WeakSet[torch.optim.Optimizer]"
    rivals: "weakref.WeakKeyDictionary[torch.optim.Optimizer, str]"
    stepped: "weakref.WeakSet[torch.optim.Optimizer]"


_held = weakref.WeakKeyDictionary[torch.optim.Optimizer, _Held]()
# One hook for all, in here while there is something to watch: an optimizer that is collected during
# another one's step must not remove a hook of its own then.
_hooks: list[Any] = []


def hold(
    owner: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    mask: Mask,
    frozen: Mapping[str, Tensor],
) -> None:
    """Note what an optimizer trains and freezes.

    From then on another optimizer that steps a frozen parameter is warned of, and `note_step` warns
    of one that trains the same entries.

    Args:
        owner: the optimizer.
        names: the parameters that it trains, with their names in the mask.
        mask: the entries that it trains.
        frozen: the parameters that it froze, by name.
    """
    by_identity = {id(param): name for name, param in frozen.items()}
    own = _Held(
        *(names, mask, by_identity, weakref.WeakSet([owner])),
        *(weakref.WeakKeyDictionary(), weakref.WeakSet()),
    )
    for other, held in list(_held.items()):
        shared = [
            name
            for param, name in names.items()
            if other is not owner and param in held.names
            if _overlap(mask, name, held.mask, held.names[param])
        ]
        if shared:
            own.rivals[other] = held.rivals[owner] = _some(shared)
            held.stepped.discard(owner)
    _held[owner] = own
    if frozen and not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_look))


def note_step(owner: torch.optim.Optimizer, stacklevel: int) -> None:
    """Warn once of two optimizers at work that both step the same entries.

    An optimizer that is never stepped again does no harm, as the old one in a notebook.

    Args:
        owner: the optimizer that makes a step.
        stacklevel: as of `warnings.warn`, from the caller of this function.
    """
    if (own := _held.get(owner)) is None:
        return
    for other, shared in list(own.rivals.items()):
        if (held := _held.get(other)) is None:  # it was released
            continue
        held.stepped.add(owner)
        if other in own.stepped:
            del own.rivals[other], held.rivals[owner]
            warnings.warn(
                f"another SparseAdam trains entries of {shared}, and both step them; call "
                "release() of the one that is done",
                stacklevel=stacklevel + 1,
            )


def let_go(owner: torch.optim.Optimizer) -> bool:
    """Forget what `hold` noted; return whether there was anything."""
    held = _held.pop(owner, None)
    if not _held and _hooks:
        _hooks.pop().remove()
    return held is not None


def at_work(owner: torch.optim.Optimizer | None) -> bool:
    """Return whether an optimizer lives and was not released."""
    return owner is not None and owner in _held


def _overlap(mask: Mask, name: str, other: Mask, other_name: str) -> bool:
    return bool((mask.indices[name].decode() & other.indices[other_name].decode()).any())


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Warn of an optimizer that steps what another one has frozen."""
    for held in list(_held.values()):
        if optimizer in held.seen:
            continue
        held.seen.add(optimizer)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        found = [held.frozen[id(p)] for p in params if id(p) in held.frozen and not p.requires_grad]
        if found:
            warnings.warn(
                f"{type(optimizer).__name__} steps {_some(found)}, frozen by SparseAdam because "
                "its mask selects nothing there, so it gets no gradient; pass SparseAdam only the "
                "named parameters that it trains, or call its release()",
                stacklevel=4,
            )
