"""The difference of two models at the selected entries."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from talos.errors import TalosTypeError, TalosValueError
from talos.fingerprints import fingerprints
from talos.masks import Mask
from talos.params import named_parameters
from talos_kernels import TensorIndex

from .sums import slices_of

__all__ = ["Weights", "difference"]

Weights = nn.Module | Mapping[str, Tensor]


def difference(
    base: Weights, tuned: Weights, mask: Mask | None, *, strict: bool
) -> tuple[Mask, Tensor, dict[str, str]]:
    """What `TaskVector.from_models` consists of: mask, values and fingerprints; see there."""
    before, after = _weights("base", base, tuned), _weights("tuned", tuned, base)
    _check_pairs(before, after)
    if mask is None:
        mask = Mask(
            {name: tuple(tensor.shape) for name, tensor in before.items()},
            {name: _every_entry(tensor) for name, tensor in before.items()},
        )
    _check_mask(mask, before)
    if strict:
        _check_outside(mask, before, after)
    values = torch.zeros(mask.nnz)
    for name, part in slices_of(mask).items():
        delta = _float32(after[name]).sub_(_float32(before[name])).reshape(-1)
        index = mask.indices[name]
        whole = index.encoding == "full"
        values[part] = delta if whole else delta[index.positions_int64()]
    touched = {name: before[name] for name in mask.names if mask.indices[name].nnz}
    return mask, values, fingerprints(touched)


def _weights(what: str, model: Weights, other: Weights) -> dict[str, Tensor]:
    """Floating-point parameters of a module, or tensors of a state dict; tied ones once."""
    if isinstance(model, nn.Module):
        return {n: p for n, p in named_parameters(model).items() if p.is_floating_point()}
    if not isinstance(model, Mapping):
        raise TalosTypeError(f"{what} must be a module or a state dict, got {type(model).__name__}")
    # A state dict beside a module also holds the module's buffers, which are not weights.
    ignored: set[str] = set()
    if isinstance(other, nn.Module):
        every_name = named_parameters(other, remove_duplicate=False)
        ignored = {n for n, _ in other.named_buffers()} | set(every_name) - set(
            named_parameters(other)
        )
    weights: dict[str, Tensor] = {}
    places: set[tuple[object, ...]] = set()
    for name, tensor in model.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or name in ignored:
            continue
        place = (tensor.data_ptr(), tensor.device, tensor.shape, tensor.stride())
        if tensor.numel() and place in places:
            continue
        places.add(place)
        weights[name] = tensor
    return weights


def _check_pairs(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    for what, other, lacking in (
        ("tuned", "base", [name for name in before if name not in after]),
        ("base", "tuned", [name for name in after if name not in before]),
    ):
        if lacking:
            known = after if what == "tuned" else before
            raise TalosValueError(
                f"{what} must have the weights of {other}, lacks {len(lacking)}: "
                + "; ".join(_with_nearest(name, known) for name in lacking[:5])
            )
    for name, tensor in before.items():
        if tensor.shape != after[name].shape:
            raise TalosValueError(
                f"tuned must have the shapes of base, got {tuple(after[name].shape)} for {name}, "
                f"which is {tuple(tensor.shape)} in base"
            )
        if tensor.is_meta or after[name].is_meta:
            raise TalosTypeError(f"base and tuned must hold values, got {name} on meta; load it")
    if not before:
        raise TalosValueError("base must have a floating-point weight, got none")


def _with_nearest(name: str, known: Mapping[str, Tensor]) -> str:
    nearest = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    return f"{name} (nearest: {', '.join(nearest)})" if nearest else name


def _check_mask(mask: Mask, before: Mapping[str, Tensor]) -> None:
    for name, shape in mask.shapes.items():
        if name not in before:
            raise TalosValueError(
                f"mask must name weights of base, got {_with_nearest(name, before)}"
            )
        if shape != tuple(before[name].shape):
            raise TalosValueError(
                f"mask must have the shapes of base, got {shape} for {name}, "
                f"which is {tuple(before[name].shape)}"
            )


def _check_outside(mask: Mask, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Refuse a change that the mask does not select; a NaN that stays one is no change."""
    outside = {}
    for name, tensor in before.items():
        own, other = tensor.detach(), after[name].detach().to(tensor.device)
        changed = (own != other) & ~(own.isnan() & other.isnan())
        count = int(changed.count_nonzero())
        if name in mask and count:
            selected = mask.to_dense(name).to(tensor.device)
            count = int((changed & ~selected).count_nonzero())
        if count:
            outside[name] = count
    if outside:
        listed = ", ".join(f"{name} ({count:,})" for name, count in list(outside.items())[:5])
        raise TalosValueError(
            f"tuned must differ from base only where mask selects, got {sum(outside.values()):,} "
            f"other entries: {listed}; leave mask out, or pass strict=False to drop them"
        )


def _every_entry(tensor: Tensor) -> TensorIndex:
    if tensor.numel() == 0:
        return TensorIndex.from_positions(torch.zeros(0, dtype=torch.int64), 0)
    return TensorIndex.from_buffers("full", tensor.numel())


def _float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)
