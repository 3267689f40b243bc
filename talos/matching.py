"""Match names of tensors with the parameters of a model, or say why they do not fit.

`torch.compile`, DDP, FSDP and checkpointing put a part of their own into the names. A name is first
taken as it is, then without such parts, and without a leading `module.` where every name has it.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Mapping, Sequence

from torch import Tensor

from .errors import TalosValueError
from .memory import place

__all__ = ["match_tensors", "resolve_names", "with_nearest"]

# What wrappers call the module inside; no module of a model is called so.
_HIDDEN = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def resolve_names(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Find the known name of each, whatever wrappers the two come from.

    Args:
        names: of parameters.
        known: of a model's parameters.

    Returns:
        The known name of each that has one.

    Example:
        >>> resolve_names(["module._orig_mod.a.weight"], ["a.weight", "a.bias"])
        {'module._orig_mod.a.weight': 'a.weight'}
    """
    names, known = list(names), list(known)
    exact = set(known)
    bare_known = {bare: name for name, bare in zip(known, _bare(known), strict=True)}
    found = {}
    for name, bare in zip(names, _bare(names), strict=True):
        if name in exact:
            found[name] = name
        elif bare in bare_known:
            found[name] = bare_known[bare]
    return found


def _bare(names: Sequence[str]) -> list[str]:
    """Names without what wrappers put into them."""
    bare = [".".join(part for part in name.split(".") if part not in _HIDDEN) for name in names]
    while bare and all(name.startswith("module.") for name in bare):
        bare = [name.removeprefix("module.") for name in bare]
    return bare


def match_tensors(
    shapes: Mapping[str, Sequence[int]], params: Mapping[str, Tensor], *, what: str = "mask"
) -> dict[str, Tensor]:
    """Find the parameter of every named shape.

    Args:
        shapes: shape of each wanted tensor.
        params: a model's parameters by name.
        what: whose tensors the shapes are, for the message.

    Returns:
        The parameter of each name in `shapes`, in its order.

    Raises:
        TalosValueError: a name is not in `params` (the nearest names are told), a shape differs, or
            two names are one tied parameter.
    """
    found = resolve_names(shapes, params)
    missing = [name for name in shapes if name not in found]
    if missing:
        raise TalosValueError(
            f"{what} must name parameters of the model, got {len(missing)} that it lacks: "
            + "; ".join(with_nearest(name, params) for name in missing[:5])
            + ("; ..." if len(missing) > 5 else "")
        )
    matched = {name: params[found[name]] for name in shapes}
    differing = [
        f"{name} is {tuple(shape)} in the {what}, {tuple(matched[name].shape)} in the model"
        for name, shape in shapes.items()
        if tuple(shape) != tuple(matched[name].shape)
    ]
    if differing:
        raise TalosValueError(
            f"{what} must have the model's shapes, got {len(differing)} that differ: "
            + "; ".join(differing[:5])
        )
    first: dict[Hashable, str] = {}
    for name, param in matched.items():
        other = first.setdefault(place(param), name)
        if other != name:
            raise TalosValueError(
                f"{what} must name a tied parameter once, got {other} and {name}, which are one "
                "parameter; drop one of them"
            )
    return matched


def with_nearest(name: str, params: Mapping[str, Tensor]) -> str:
    """Say a name that is not known, and the known ones that are most like it.

    Args:
        name: the unknown one.
        params: by the known names.

    Returns:
        For a message.

    Example:
        >>> with_nearest("a.wieght", {"a.weight": Tensor()})
        'a.wieght (nearest: a.weight)'
    """
    nearest = difflib.get_close_matches(name, params, n=2, cutoff=0.5)
    return f"{name} (nearest: {', '.join(nearest)})" if nearest else name
