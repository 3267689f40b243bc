"""The difference of two models, one tensor at a time.

Modules, state dicts and checkpoints go one way. Names, shapes and ties are compared first; the
tensors of a checkpoint stand there without values. Then each tensor of both is read once.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from talos.errors import TalosTypeError, TalosValueError
from talos.files import OnTensor
from talos.masks import Mask
from talos.task_vectors.fingerprints import fingerprint
from talos.task_vectors.namings import (
    NamedTensors,
    Weights,
    comparable,
    known_names,
    moved,
    translated,
)
from talos.task_vectors.sums import joined, slices_of
from talos.tensors import INTEGERS, check_separate, trim_heap, true_places
from talos_kernels import TensorIndex

__all__ = ["Difference", "Entries", "difference"]

Entries = Mask | Literal["changed"] | None

_BLOCK = 1 << 24  # 64 MB: the C library maps blocks of this size and gives them back at once


@dataclass(frozen=True)
class Difference:
    """What two models differ by.

    Attributes:
        mask: the entries.
        values: float32 `[nnz]`, tuned minus base.
        fingerprints: of the base's tensors with a selected entry.
        moved: names of buffers that differ.
        inexact: entries of "changed" at which base + value has other bits than the tuned weight.
    """

    mask: Mask
    values: Tensor
    fingerprints: dict[str, str]
    moved: list[str] = field(default_factory=list)
    inexact: int = 0


def difference(
    base: Weights, tuned: Weights, mask: Entries, *, strict: bool, on_tensor: OnTensor | None
) -> Difference:
    """Return the difference of two models; see `TaskVector.from_models`."""
    if not (mask is None or isinstance(mask, Mask) or mask == "changed"):
        raise TalosValueError(f"mask must be a Mask, 'changed' or None, got {mask!r}")
    ours, theirs = NamedTensors.of("base", base), NamedTensors.of("tuned", tuned)
    pairs = _Pairs(ours, theirs, translated(theirs, ours), on_tensor)
    before = {name: each for name, each in ours.once().items() if name in pairs.sources}
    after = {name: theirs.tensors[pairs.sources[name]] for name in before}
    if not before:
        raise TalosValueError("base must have a floating-point weight, got none")
    _check_shapes(before, after)
    if mask is None:
        mask = Mask(
            {name: tuple(tensor.shape) for name, tensor in before.items()},
            {name: _every_entry(tensor) for name, tensor in before.items()},
        )
    names = {name: name for name in before}  # ours by the mask's
    if isinstance(mask, Mask):
        names = known_names(mask, ours, before)
    check_separate({name: before[own] for name, own in names.items()}, "weights of base")
    check_separate({name: after[own] for name, own in names.items()}, "weights of tuned")
    if isinstance(mask, Mask):
        for name, own in names.items():
            if mask.indices[name].nnz:
                pairs.check_values(own)
        others = [name for name in before if name not in names.values()]
        found = _selected(pairs, mask, names, others if strict else [], strict=strict)
    else:
        for name in before:
            pairs.check_values(name)
        found = _changed(pairs, before)
    return replace(found, moved=moved(ours, theirs))


def _selected(
    pairs: "_Pairs", mask: Mask, names: Mapping[str, str], others: Sequence[str], *, strict: bool
) -> Difference:
    """Return the difference at a mask's entries; `strict` refuses one at any other entry.

    `names` holds our names by the mask's; `others` are weights that the mask does not cover.
    """
    slices, masked = slices_of(mask), {own: name for name, own in names.items()}
    values = torch.zeros(mask.nnz, dtype=torch.float32, device="cpu")
    bases: dict[str, str] = {}
    outside: dict[str, int] = {}
    for own, old, new in pairs.read([*masked, *others]):
        index = mask.indices[masked[own]] if own in masked else None
        if strict and (count := _count_outside(old, new, index)):
            outside[own] = count
        if index is not None and index.nnz:
            places = None if index.encoding == "full" else index.positions_int64()
            values[slices[masked[own]]] = _change(_at(old, places), _at(new, places))
            bases[masked[own]] = fingerprint(old)
        del old, new  # before the next pair is read
    if outside:
        listed = ", ".join(f"{name} ({count:,})" for name, count in list(outside.items())[:5])
        raise TalosValueError(
            f"tuned must differ from base only where mask selects, got {sum(outside.values()):,} "
            f"other entries: {listed}; leave mask out, or pass strict=False to drop them"
        )
    return Difference(mask, values, bases)


def _changed(pairs: "_Pairs", weights: Mapping[str, Tensor]) -> Difference:
    """Return the difference at the entries whose bits differ."""
    indices: dict[str, TensorIndex] = {}
    bases: dict[str, str] = {}
    collected = _Collected()
    inexact = 0
    for name, old, new in pairs.read(weights):
        changed = (_bits(old, new) != _bits(new, old)).reshape(-1)
        indices[name] = TensorIndex.encode(changed)
        if indices[name].nnz:
            places = true_places(changed)
            before, after = _at(old, places), _at(new, places)
            values = _change(before, after)
            inexact += _count_inexact(before, after, values)
            collected.add(values)
            bases[name] = fingerprint(old)
        del old, new  # before the next pair is read
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    return Difference(Mask(shapes, indices), joined(collected.blocks()), bases, inexact=inexact)


class _Collected:
    """Values whose number is not known, in large blocks.

    Small tensors that stay, between large ones that come and go, would leave holes in the heap
    whose size grows with the model.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._room = 0

    def add(self, values: Tensor) -> None:
        while len(values):
            if not self._room:
                self._blocks.append(torch.empty(_BLOCK, dtype=torch.float32, device="cpu"))
                self._room = _BLOCK
            taken = values[: self._room]
            start = _BLOCK - self._room
            self._blocks[-1][start : start + len(taken)] = taken
            self._room -= len(taken)
            values = values[len(taken) :]

    def blocks(self) -> list[Tensor]:
        if self._blocks:
            self._blocks[-1] = self._blocks[-1][: _BLOCK - self._room]
        return self._blocks


class _Pairs:
    """Base and tuned weights, by the names of the base."""

    def __init__(
        self,
        ours: NamedTensors,
        theirs: NamedTensors,
        sources: Mapping[str, str],
        on_tensor: OnTensor | None,
    ) -> None:
        self.sources = sources
        self._ours, self._theirs = ours, theirs
        self._on_tensor = on_tensor

    def check_values(self, name: str) -> None:
        if not self._hold(name):
            raise TalosTypeError(f"base and tuned must hold values, got {name} on meta; load it")

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield name, base and tuned weight, one pair after the other; none on meta."""
        for done, name in enumerate(names, 1):
            if self._hold(name):
                yield name, self._ours.read(name), self._theirs.read(self.sources[name])
                trim_heap()
            if self._on_tensor is not None:
                self._on_tensor(done, len(names))

    def _hold(self, name: str) -> bool:
        return self._ours.has_values(name) and self._theirs.has_values(self.sources[name])


def _check_shapes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    for name, tensor in before.items():
        if tensor.shape != after[name].shape:
            raise TalosValueError(
                f"tuned must have the shapes of base, got {tuple(after[name].shape)} for {name}, "
                f"which is {tuple(tensor.shape)} in base"
            )


def _count_outside(before: Tensor, after: Tensor, index: TensorIndex | None) -> int:
    """Count the changes that an index does not select; a NaN that stays one is no change."""
    if index is not None and index.encoding == "full":
        return 0
    own, other = before.detach(), after.detach()
    own, other = (comparable(each.to(own.device)) for each in (own, other))
    changed = (own != other) & ~(own.isnan() & other.isnan())
    count = int(changed.count_nonzero())
    if count and index is not None:
        selected = index.decode().view(changed.shape).to(changed.device)
        count = int((changed & ~selected).count_nonzero())
    return count


def _every_entry(tensor: Tensor) -> TensorIndex:
    if tensor.numel() == 0:
        return TensorIndex.from_positions(torch.zeros(0, dtype=torch.int64, device="cpu"), 0)
    return TensorIndex.from_buffers("full", tensor.numel())


def _bits(tensor: Tensor, other: Tensor) -> Tensor:
    """Return the bits of a tensor as integers, in the dtype that holds both tensors' values."""
    dtype = tensor.dtype
    if dtype != other.dtype:
        dtype = _wide(tensor, other)
    return tensor.detach().to("cpu", dtype).contiguous().view(INTEGERS[dtype.itemsize])


def _at(tensor: Tensor, places: Tensor | None) -> Tensor:
    """Return the entries of a tensor at flat positions, flat and on the CPU; None: all."""
    flat = tensor.detach().cpu().reshape(-1)
    if places is None:
        return flat
    bits = flat.view(INTEGERS[flat.element_size()])  # torch gathers floats of eight bits only so
    return bits[places].view(flat.dtype)


def _change(before: Tensor, after: Tensor) -> Tensor:
    """Return after - before: float32; float64 is rounded after the subtraction."""
    wide = _wide(before, after)
    return (after.to(wide) - before.to(wide)).float()


def _count_inexact(before: Tensor, after: Tensor, values: Tensor) -> int:
    """Count the entries at which base + value, as `add_delta_` adds, has not the tuned bits."""
    wide = _wide(before, before)
    restored = (before.to(wide) + values.to(wide)).to(before.dtype)
    return int((_bits(restored, after) != _bits(after, restored)).count_nonzero())


def _wide(before: Tensor, after: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (before.dtype, after.dtype) else torch.float32
