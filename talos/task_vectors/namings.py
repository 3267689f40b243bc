"""The tensors of two models under all their names, and which of one is which of the other.

A model is a module, a state dict or a checkpoint; the tensors of a checkpoint stand here without
values until one is read.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from talos.distributed import local, whole
from talos.errors import TalosTypeError, TalosValueError
from talos.files import Checkpoint
from talos.masks import Mask
from talos.names import listed, named_buffers, named_parameters, resolve_names, with_nearest
from talos.tensors import first_names, moved_buffers, place

__all__ = ["NamedTensors", "Weights", "comparable", "known_names", "moved", "translated"]

Weights = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]


@dataclass(frozen=True)
class NamedTensors:
    """The tensors of a model under all their names: floating-point ones, buffers, integers.

    Those of a checkpoint are on the meta device; `read` reads them.
    """

    what: str
    tensors: dict[str, Tensor]
    buffers: dict[str, Tensor]
    integers: dict[str, Tensor]
    checkpoint: Checkpoint | None

    @classmethod
    def of(cls, what: str, model: Weights) -> Self:
        """Return the tensors of a model; `what` is its name in messages.

        Raises:
            TalosTypeError: it is no model.
        """
        checkpoint = None
        if isinstance(model, str | os.PathLike):
            model = Checkpoint(model)
        if isinstance(model, Checkpoint):
            checkpoint, buffers = model, {}
            found: Mapping[str, object] = {
                name: torch.empty(shape, dtype=model.dtypes[name], device="meta")
                for name, shape in model.shapes.items()
            }
        elif isinstance(model, nn.Module):
            found = named_parameters(model, remove_duplicate=False)
            buffers = named_buffers(model)
        elif isinstance(model, Mapping):
            found, buffers = model, {}
        else:
            raise TalosTypeError(
                f"{what} must be a module or a state dict, or the path of a checkpoint, got "
                f"{type(model).__name__}"
            )
        every = {name: each for name, each in found.items() if isinstance(each, Tensor)}
        tensors = {name: each for name, each in every.items() if each.is_floating_point()}
        integers = {name: each for name, each in every.items() if name not in tensors}
        return cls(what, tensors, buffers, integers, checkpoint)

    @property
    def every(self) -> dict[str, Tensor]:
        """All tensors, buffers of modules too."""
        return self.buffers | self.tensors | self.integers

    def has_values(self, name: str) -> bool:
        """Return whether a tensor can be read; one on the meta device cannot."""
        return self.checkpoint is not None or not self.tensors[name].is_meta

    def read(self, name: str) -> Tensor:
        """Return a tensor with its values; of a sharded one the whole, and all ranks call this."""
        if self.checkpoint is not None:
            return self.checkpoint[name]
        named = (self.tensors, self.integers, self.buffers)
        found = next(each[name] for each in named if name in each)
        return whole(local(found), found)

    def first_names(self) -> dict[str, str]:
        """Return for every name the first name of the same memory."""
        return first_names(self.tensors)

    def once(self) -> dict[str, Tensor]:
        """Return the tensors by their first names, tied ones once."""
        return {first: self.tensors[first] for first in self.first_names().values()}


def translated(theirs: NamedTensors, ours: NamedTensors) -> dict[str, str]:
    """Return their names by our first names; wrappers and ties do not matter."""
    first, known = ours.first_names(), resolve_names(theirs.tensors, ours.tensors)
    found: dict[str, str] = {}
    for name, own in known.items():
        target = first[own]
        other = found.setdefault(target, name)
        tied = place(theirs.tensors[other]) == place(theirs.tensors[name])
        if not tied and not _same(theirs.read(other), theirs.read(name)):
            raise TalosValueError(
                f"{theirs.what} must hold one value of {target}, which is tied in {ours.what}, got "
                f"{other} and {name}, which differ; tie them, or untie {ours.what}"
            )
    seen = {place(theirs.tensors[name]) for name in known}
    bare = resolve_names(theirs.tensors, ours.buffers)  # a state dict holds a module's buffers too
    extra = [
        name for name, each in theirs.once().items() if place(each) not in seen and name not in bare
    ]
    buffers = resolve_names(ours.tensors, theirs.buffers)
    lacking = [name for name in ours.once() if name not in found and name not in buffers]
    _refuse_lacking(theirs.what, ours.what, lacking, theirs.tensors)
    _refuse_lacking(ours.what, theirs.what, extra, ours.tensors)
    return found


def moved(ours: NamedTensors, theirs: NamedTensors) -> list[str]:
    """Return the names of buffers and integers that differ; a state dict holds some buffers."""
    names = dict.fromkeys(first_names(ours.buffers or theirs.buffers).values()) | ours.integers
    one, other = (resolve_names(names, each.every) for each in (ours, theirs))
    return [
        name
        for name in names
        if name in one
        and name in other
        and moved_buffers({name: ours.read(one[name])}, {name: theirs.read(other[name])})
    ]


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    one, other = (comparable(each.detach().cpu().to(one.dtype)) for each in (one, other))
    return torch.equal(one.nan_to_num(), other.nan_to_num())


def _refuse_lacking(what: str, other: str, lacking: list[str], known: Mapping[str, Tensor]) -> None:
    if lacking:
        raise TalosValueError(
            f"{what} must have the weights of {other}, lacks {len(lacking)}: "
            + listed(lacking, known)
        )


def known_names(mask: Mask, ours: NamedTensors, before: Mapping[str, Tensor]) -> dict[str, str]:
    """Return our first name of each tensor of a mask."""
    first, known = ours.first_names(), resolve_names(mask.names, ours.tensors)
    found: dict[str, str] = {}
    for name, shape in mask.shapes.items():
        own = first.get(known.get(name, ""), "")
        if own not in before:
            raise TalosValueError(
                f"mask must name weights of base, got {with_nearest(name, before)}"
            )
        if shape != tuple(before[own].shape):
            raise TalosValueError(
                f"mask must have the shapes of base, got {shape} for {name}, "
                f"which is {tuple(before[own].shape)}"
            )
        if own in found.values():
            other = next(each for each, target in found.items() if target == own)
            raise TalosValueError(
                f"mask must name a tied parameter once, got {other} and {name}, which are one "
                "parameter; drop one of them"
            )
        found[name] = own
    return found


def comparable(tensor: Tensor) -> Tensor:
    """Return a tensor that torch can compare; it cannot compare floats of eight bits."""
    return tensor.float() if tensor.element_size() == 1 else tensor
