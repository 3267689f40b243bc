"""Match the tensors of a mask with the parameters of a model, or say why they do not fit."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from torch import Tensor

from .errors import TalosValueError

__all__ = ["match_tensors"]


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
    missing = [name for name in shapes if name not in params]
    if missing:
        raise TalosValueError(
            f"{what} must name parameters of the model, got {len(missing)} that it lacks: "
            + "; ".join(_with_nearest(name, params) for name in missing[:5])
            + ("; ..." if len(missing) > 5 else "")
        )
    differing = [
        f"{name} is {tuple(shape)} in the {what}, {tuple(params[name].shape)} in the model"
        for name, shape in shapes.items()
        if tuple(shape) != tuple(params[name].shape)
    ]
    if differing:
        raise TalosValueError(
            f"{what} must have the model's shapes, got {len(differing)} that differ: "
            + "; ".join(differing[:5])
        )
    first: dict[int, str] = {}
    for name in shapes:
        other = first.setdefault(id(params[name]), name)
        if other != name:
            raise TalosValueError(
                f"{what} must name a tied parameter once, got {other} and {name}, which are one "
                "parameter; drop one of them"
            )
    return {name: params[name] for name in shapes}


def _with_nearest(name: str, params: Mapping[str, Tensor]) -> str:
    nearest = difflib.get_close_matches(name, params, n=2, cutoff=0.5)
    return f"{name} (nearest: {', '.join(nearest)})" if nearest else name
