"""The difference of two models at the selected entries."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from talos.errors import TalosTypeError, TalosValueError
from talos.masks import Mask
from talos.names import named_buffers, named_parameters, resolve_names, with_nearest
from talos.task_vectors.fingerprints import fingerprint
from talos.task_vectors.sums import slices_of
from talos.tensors import check_separate, moved_buffers, place
from talos_kernels import TensorIndex

__all__ = ["Weights", "difference"]

Weights = nn.Module | Mapping[str, Tensor]


def difference(
    base: Weights, tuned: Weights, mask: Mask | None, *, strict: bool
) -> tuple[Mask, Tensor, dict[str, str], list[str]]:
    """Return mask, values, fingerprints and the names of buffers that differ.

    See `TaskVector.from_models`.
    """
    ours, theirs = _Named.of("base", base), _Named.of("tuned", tuned)
    after = _translated(theirs, ours)
    before = {name: each for name, each in ours.once().items() if name in after}
    if not before:
        raise TalosValueError("base must have a floating-point weight, got none")
    _check_shapes(before, after)
    if mask is None:
        mask = Mask(
            {name: tuple(tensor.shape) for name, tensor in before.items()},
            {name: _every_entry(tensor) for name, tensor in before.items()},
        )
    mask_names = _known_names(mask, ours, before)
    chosen = {name: before[mask_names[name]] for name in mask.names}
    for name, tensor in chosen.items():
        if mask.indices[name].nnz and (tensor.is_meta or after[mask_names[name]].is_meta):
            raise TalosTypeError(f"base and tuned must hold values, got {name} on meta; load it")
    check_separate(chosen, "weights of base")
    check_separate({name: after[mask_names[name]] for name in mask.names}, "weights of tuned")
    if strict:
        _check_outside({known: name for name, known in mask_names.items()}, mask, before, after)
    values = torch.zeros(mask.nnz, dtype=torch.float32, device="cpu")
    for name, part in slices_of(mask).items():
        delta = _change(chosen[name], after[mask_names[name]])
        index = mask.indices[name]
        whole = index.encoding == "full"
        values[part] = delta if whole else delta[index.positions_int64()]
    bases = {n: fingerprint(tensor) for n, tensor in chosen.items() if mask.indices[n].nnz}
    return mask, values, bases, _moved(ours, theirs)


@dataclass(frozen=True)
class _Named:
    """The tensors of a model under all their names: floating-point ones, buffers, integers."""

    what: str
    tensors: dict[str, Tensor]
    buffers: dict[str, Tensor]
    integers: dict[str, Tensor]

    @classmethod
    def of(cls, what: str, model: Weights) -> Self:
        if isinstance(model, nn.Module):
            found: Mapping[str, object] = named_parameters(model, remove_duplicate=False)
            buffers = named_buffers(model)
        elif isinstance(model, Mapping):
            found, buffers = model, {}
        else:
            raise TalosTypeError(
                f"{what} must be a module or a state dict, got {type(model).__name__}"
            )
        every = {name: each for name, each in found.items() if isinstance(each, Tensor)}
        tensors = {name: each for name, each in every.items() if each.is_floating_point()}
        integers = {name: each for name, each in every.items() if name not in tensors}
        return cls(what, tensors, buffers, integers)

    def first_names(self) -> dict[str, str]:
        """Return for every name the first name of the same memory."""
        first: dict[Hashable, str] = {}
        return {name: first.setdefault(place(each), name) for name, each in self.tensors.items()}

    def once(self) -> dict[str, Tensor]:
        """Return the tensors by their first names, tied ones once."""
        return {first: self.tensors[first] for first in self.first_names().values()}


def _translated(theirs: _Named, ours: _Named) -> dict[str, Tensor]:
    """Return their tensors by our first names; wrappers and ties do not matter."""
    first, known = ours.first_names(), resolve_names(theirs.tensors, ours.tensors)
    found: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    for name, own in known.items():
        tensor, target = theirs.tensors[name], first[own]
        other = found.setdefault(target, tensor)
        sources.setdefault(target, name)
        if place(other) != place(tensor) and not _same(other, tensor):
            raise TalosValueError(
                f"{theirs.what} must hold one value of {target}, which is tied in {ours.what}, got "
                f"{sources[target]} and {name}, which differ; tie them, or untie {ours.what}"
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


def _moved(ours: _Named, theirs: _Named) -> list[str]:
    """Return the names of buffers and integers that differ; a state dict holds some buffers."""
    names = [*(ours.buffers or theirs.buffers), *ours.integers]
    both = []
    for each in (ours, theirs):
        every = each.buffers | each.tensors | each.integers
        known = resolve_names(names, every)
        both.append({name: every[found] for name, found in known.items()})
    return moved_buffers(*both)


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    one, other = (_comparable(each.detach().cpu().to(one.dtype)) for each in (one, other))
    return torch.equal(one.nan_to_num(), other.nan_to_num())


def _refuse_lacking(what: str, other: str, lacking: list[str], known: Mapping[str, Tensor]) -> None:
    if lacking:
        raise TalosValueError(
            f"{what} must have the weights of {other}, lacks {len(lacking)}: "
            + "; ".join(with_nearest(name, known) for name in lacking[:5])
        )


def _check_shapes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    for name, tensor in before.items():
        if tensor.shape != after[name].shape:
            raise TalosValueError(
                f"tuned must have the shapes of base, got {tuple(after[name].shape)} for {name}, "
                f"which is {tuple(tensor.shape)} in base"
            )


def _known_names(mask: Mask, ours: _Named, before: Mapping[str, Tensor]) -> dict[str, str]:
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


def _check_outside(
    mask_names: Mapping[str, str],
    mask: Mask,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
) -> None:
    """Refuse a change that the mask does not select; a NaN that stays one is no change.

    `mask_names` holds the mask's names by those of `before`.
    """
    outside = {}
    for name, tensor in before.items():
        own, other = tensor.detach(), after[name].detach()
        if own.is_meta or other.is_meta:  # without values, and the mask selects nothing of it
            continue
        own, other = (_comparable(each.to(tensor.device)) for each in (own, other))
        changed = (own != other) & ~(own.isnan() & other.isnan())
        count = int(changed.count_nonzero())
        if name in mask_names and count:
            selected = mask.to_dense(mask_names[name]).to(tensor.device)
            count = int((changed & ~selected).count_nonzero())
        if count:
            outside[name] = count
    if outside:
        listed = ", ".join(f"{name} ({count:,})" for name, count in list(outside.items())[:5])
        raise TalosValueError(
            f"tuned must differ from base only where mask selects, got {sum(outside.values()):,} "
            f"other entries: {listed}; leave mask out, or pass strict=False to drop them"
        )


def _comparable(tensor: Tensor) -> Tensor:
    """Return a tensor that torch can compare; it cannot compare floats of eight bits."""
    return tensor.float() if tensor.element_size() == 1 else tensor


def _every_entry(tensor: Tensor) -> TensorIndex:
    if tensor.numel() == 0:
        return TensorIndex.from_positions(torch.zeros(0, dtype=torch.int64, device="cpu"), 0)
    return TensorIndex.from_buffers("full", tensor.numel())


def _change(before: Tensor, after: Tensor) -> Tensor:
    """Return after - before, flat float32; float64 weights are rounded after the subtraction."""
    double = torch.float64 in (before.dtype, after.dtype)
    wide = torch.float64 if double else torch.float32
    one, other = (each.detach().to("cpu", wide, copy=True) for each in (before, after))
    return other.sub_(one).float().reshape(-1)
