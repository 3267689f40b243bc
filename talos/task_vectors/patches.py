"""Sparse patches: the weights that changed, as they are now, for a replica of the model.

    weights.flat[positions] = values

A patch replaces, where a task vector adds. So the replica gets the same bits, in every dtype, and
to apply a patch twice is harmless. Nothing is checked against a base: apply patches in order.

A patch that changes only entries of a mask, which both sides hold, can be sent as ranks in the mask
(`Patch.encode`): neither names nor positions travel.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Self

import torch
from torch import Tensor, nn

from talos.architecture.layers import kind_of, layer_of
from talos.errors import TalosTypeError, TalosValueError
from talos.files import Checkpoint, check_entries, load_file, save_file
from talos.masks import Mask
from talos.masks.table import MaskTable, MaskTableRow
from talos.names import listed, match_tensors, named_tensors, resolve_names
from talos.task_vectors.editing import EDITABLE, check_base, check_scale
from talos.task_vectors.exports import base_of, copies_in, names_in, warn_of_copies
from talos.task_vectors.fingerprints import base_fingerprints
from talos.task_vectors.namings import Weights
from talos.task_vectors.ranks import decode_ranks, encode_ranks
from talos.task_vectors.sums import slices_of
from talos.task_vectors.vector import TaskVector
from talos.tensors import INTEGERS, check_separate, equal_bits, first_names, readable_size
from talos_kernels import Index, TensorIndex, add_delta_

__all__ = ["Patch", "changed_bits"]

Shape = tuple[int, ...]
_PLAIN = (Tensor, nn.Parameter)
_CHUNK = 1 << 18  # entries that are checked at a time


class _Parts:
    """The three dictionaries of a patch, as they grow."""

    def __init__(self) -> None:
        self.dicts: tuple[dict[str, Shape], dict[str, Tensor], dict[str, Tensor]] = ({}, {}, {})

    def put(self, name: str, shape: Shape, where: Tensor, values: Tensor) -> None:
        shapes, positions, replacements = self.dicts
        shapes[name], positions[name], replacements[name] = shape, where, values

    def add(self, name: str, tensor: Tensor, where: Tensor, values: Tensor) -> None:
        """Add what changed of a tensor, if anything did."""
        if len(where):
            self.put(name, tuple(tensor.shape), where, values)


@dataclass(frozen=True, eq=False, repr=False)
class Patch:
    """Replacement values at flat positions of named tensors.

    Attributes:
        shapes: the full shape of each tensor, by its name in the checkpoint.
        positions: `[n]` of each tensor, strictly ascending and row-major: int32, or int64 for a
            tensor of more than 2**31 entries. Other integers are converted.
        values: `[n]` of each tensor, in the tensor's own dtype, on any device.

    Raises:
        TalosTypeError: positions are no integers.
        TalosValueError: the names or lengths differ; positions are unsorted or out of
            range; a value is NaN or infinite.

    Example:
        >>> base, tuned = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> patch = Patch.from_models(base, tuned)
        >>> patch.apply_(base)
        >>> torch.equal(base.weight, tuned.weight)
        True
    """

    shapes: dict[str, Shape]
    positions: dict[str, Tensor]
    values: dict[str, Tensor]

    def __post_init__(self) -> None:
        """Check and convert; see the class."""
        if not self.shapes.keys() == self.positions.keys() == self.values.keys():
            raise TalosValueError("shapes, positions and values must name the same tensors")
        shapes = {name: tuple(shape) for name, shape in self.shapes.items()}
        object.__setattr__(self, "shapes", shapes)
        checked = {n: _checked(n, shapes[n], self.positions[n], self.values[n]) for n in shapes}
        object.__setattr__(self, "positions", checked)
        values = {name: _flat(self.values[name]) for name in shapes}
        object.__setattr__(self, "values", values)

    @classmethod
    def from_models(cls, base: Weights, tuned: Weights) -> Self:
        """Return the patch that makes one model into another: the entries whose bits differ.

        Buffers are compared, too, and integers. -0 differs from 0.

        Args:
            base: a module, its state dict, or a checkpoint or its path; tensors are read one at a
                time.
            tuned: the same model after fine-tuning.

        Raises:
            TalosValueError: names, shapes or dtypes differ, or a value is NaN or infinite.
        """
        ours, theirs = named_tensors("base", base), named_tensors("tuned", tuned)
        known, first = resolve_names(theirs, ours), _first_names(base, ours)
        there, firsts = {first[own] for own in known.values()}, _first_names(tuned, theirs)
        found = {firsts[name] for name in known}
        extra = [name for name in theirs if firsts[name] not in found]
        _refuse_lacking("base", extra, ours)
        _refuse_lacking("tuned", [name for name in ours if first[name] not in there], theirs)
        parts, sources = _Parts(), dict[str, str]()
        for name, own in known.items():
            before, after = ours[own], theirs[name]
            _check_same(own, before, after)
            source = sources.setdefault(first[own], name)
            if source != name:
                if not equal_bits(theirs[source], after):
                    raise TalosValueError(
                        f"tuned must hold one value of {first[own]}, which is tied in base, got "
                        f"{source} and {name}, which differ; tie them, or untie base"
                    )
                continue
            where = changed_bits(before.to(after.device), after)
            parts.add(first[own], after, where, after.detach().reshape(-1)[where])
        return cls(*parts.dicts)

    @classmethod
    def between(
        cls, base: Weights, vector: TaskVector, scale: float = 1.0, force: bool = False
    ) -> Self:
        """Return the patch that puts a task vector on a model; the model stays as it is.

        Args:
            base: a module, its state dict, or a checkpoint or its path; tensors are read one at a
                time.
            vector: what to put on it.
            scale: the scaling coefficient.
            force: take a base whose weights have other fingerprints, too.

        Returns:
            The bits that `vector.apply_(base, scale)` would write, where they differ, by the names
            of the base. Copies of tied weights in a checkpoint are changed, too, with a warning, as
            by `TaskVector.export`.

        Raises:
            TalosValueError: the base lacks a tensor, has another shape or another fingerprint, or
                a weight would overflow.

        Example:
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> mask = Mask.from_dense({"weight": torch.tensor([[False, True]])})
            >>> Patch.between(model, TaskVector(mask, torch.ones(1))).positions
            {'weight': tensor([1], dtype=torch.int32)}
        """
        scale, ours = check_scale(scale), named_tensors("base", base)
        touched = [name for name, index in vector.mask.indices.items() if index.nnz]
        copies: dict[str, str] = {}
        if isinstance(ours, Checkpoint):
            known = names_in(ours, vector.mask)
            edited = [known[name] for name in touched]
            copies = copies_in(ours, edited, set(known.values()))
            warn_of_copies(copies, stacklevel=3)
        else:
            known = resolve_names(touched, ours)
            _refuse_lacking("base", [name for name in touched if name not in known], ours)
            shapes = {name: vector.mask.shapes[name] for name in touched}
            match_tensors(shapes, ours, what="task vector")  # refuses what does not fit
        slices, parts = slices_of(vector.mask), _Parts()
        for name in touched:
            before, index = ours[known[name]], vector.mask.indices[name]
            _check_editable(name, before)
            if name in vector.fingerprints and not force:
                if isinstance(ours, Checkpoint):
                    bases = {name: base_of(before, vector.fingerprints[name])}
                else:
                    bases = base_fingerprints({name: before})
                check_base(bases, vector.fingerprints, "base")
            where = index.positions_int64().to(before.device)
            old = before.detach().reshape(-1)[where]
            new, every = old.clone(), TensorIndex.from_buffers("full", len(old))
            delta = vector.values[slices[name]].to(old.device)
            add_delta_([new], Index.pack([every], old.device), delta, scale=scale)
            changed = changed_bits(old, new)
            same = [copy for copy, own in copies.items() if own == known[name]]
            for own in (known[name], *same):
                parts.add(own, before, where[changed], new[changed])
        return cls(*parts.dicts)

    def apply_(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        """Write the values into a model, in place. Everything is checked before the first write.

        Names match whatever wraps the model (DDP, compile). Afterwards the weights count as another
        base: a vector for the old ones is refused.

        Args:
            model: a module or its state dict, on any device, with weights of the patch's dtypes.

        Raises:
            TalosTypeError: a tensor has another dtype, or cannot be written (meta, sharded), or
                `model` is a checkpoint.
            TalosValueError: the model lacks a tensor or has another shape of it.
        """
        every = named_tensors("model", model)
        if isinstance(every, Checkpoint):  # each access reads another tensor
            raise TalosTypeError(
                "model must be in memory, got a checkpoint; export another instead"
            )
        matched = match_tensors(self.shapes, every, what="patch")
        for name, tensor in matched.items():
            _check_writable(name, tensor, self.values[name].dtype)
        check_separate(matched, "patched weights of the model")
        with torch.no_grad():
            for name, tensor in matched.items():
                where = self.positions[name].to(tensor.device, torch.int64)
                # torch writes floats of eight bits only so
                bits = INTEGERS.get(tensor.element_size(), tensor.dtype)
                values = self.values[name].to(tensor.device).view(bits)
                target = tensor.detach().view(bits)
                if target.is_contiguous():
                    target.view(-1).index_copy_(0, where, values)
                else:
                    target[torch.unravel_index(where, target.shape)] = values

    def encode(self, mask: Mask) -> dict[str, Tensor]:
        """Code the patch for one who holds the mask: ranks instead of names and positions.

        Args:
            mask: selects every position of the patch. Both sides must hold the same.

        Returns:
            Four flat uint8 buffers on the CPU, to send as they are: `mask`, its fingerprint;
            `dtypes`, a code for each tensor of the mask; `gaps`, the ranks (see
            `talos.task_vectors.ranks`); `values`, the values' bytes in rank order.

        Raises:
            TalosValueError: the patch changes an entry that the mask does not select.
            TalosTypeError: its values are no float32, bfloat16, float16 or float64.

        Example:
            >>> mask = Mask.from_dense({"w": torch.tensor([True, False, True])})
            >>> patch = Patch({"w": (3,)}, {"w": torch.tensor([2])}, {"w": torch.tensor([0.5])})
            >>> buffers = patch.encode(mask)
            >>> buffers["gaps"], Patch.decode(buffers, mask) == patch
            (tensor([1], dtype=torch.uint8), True)
        """
        return encode_ranks(mask, self.shapes, self.positions, self.values)

    @classmethod
    def decode(cls, buffers: Mapping[str, Tensor], mask: Mask) -> Self:
        """Return the patch that `encode` coded.

        Args:
            buffers: what `encode` returned; they may come from a network and are checked.
            mask: the same mask.

        Raises:
            TalosValueError: the buffers belong to another mask, or are damaged.
        """
        positions, values = decode_ranks(mask, buffers)
        return cls({name: mask.shapes[name] for name in positions}, positions, values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the patch to a safetensors file, atomically; docs/format.md has the layout.

        Raises:
            TalosOSError: the file cannot be written; an older one is left as it was.
        """
        buffers = {f"{name}.positions": each for name, each in self.positions.items()}
        buffers |= {f"{name}.values": each for name, each in self.values.items()}
        entries = [
            {
                "name": name,
                "shape": list(shape),
                "encoding": str(self.positions[name].dtype).removeprefix("torch."),
                "nnz": len(self.positions[name]),
            }
            for name, shape in self.shapes.items()
        ]
        save_file(path, "patch", buffers, {"tensors": entries})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a patch from a file and check all of it.

        Raises:
            TalosValueError: the file is not a patch, is damaged, or has another version.
            TalosOSError: it cannot be read.
        """
        buffers, content = load_file(path, "patch")
        try:
            check_entries(content["tensors"])
            parts = _Parts()
            for entry in content["tensors"]:
                name = entry["name"]
                where, values = buffers.pop(f"{name}.positions"), buffers.pop(f"{name}.values")
                if len(where) != entry["nnz"]:
                    raise TalosValueError(f"{name} must have {entry['nnz']} entries")
                parts.put(name, tuple(entry["shape"]), where, values)
            if buffers:
                raise TalosValueError(f"it must hold only a patch, got {sorted(buffers)[:5]}")
            return cls(*parts.dicts)
        except (TalosTypeError, TalosValueError, KeyError, TypeError) as error:
            raise TalosValueError(f"{path}: not a valid patch: {error}") from None

    @property
    def names(self) -> tuple[str, ...]:
        """Tensors that the patch changes."""
        return tuple(self.shapes)

    def describe(self, *, layers: bool = False) -> MaskTable:
        """Return a table of the positions, with one row a kind of weights; `print` it.

        Args:
            layers: print a row for each layer and kind.

        Example:
            >>> shapes, where = {"h.0.q.weight": (2, 2)}, {"h.0.q.weight": torch.tensor([3])}
            >>> print(Patch(shapes, where, {"h.0.q.weight": torch.ones(1)}).describe())
            type   tensors  entries  selected  density  encoding  bytes
            query        1        4         1    0.250  int32         4
            total        1        4         1    0.250  int32         4
        """
        rows = [
            MaskTableRow(
                name,
                layer_of(name),
                kind_of(name),
                prod(shape),
                len(where),
                str(where.dtype)[6:],
                where.nbytes,
            )
            for name, shape in self.shapes.items()
            for where in [self.positions[name]]
        ]
        return MaskTable(tuple(rows), layers)

    @property
    def nbytes(self) -> int:
        """Bytes of positions and values."""
        every = [*self.positions.values(), *self.values.values()]
        return sum(each.nbytes for each in every)

    def __len__(self) -> int:
        """Return the number of entries that the patch replaces."""
        return sum(len(each) for each in self.positions.values())

    def __eq__(self, other: object) -> bool:
        """Return whether two patches write the same bits to the same entries."""
        if not isinstance(other, Patch):
            return NotImplemented
        return self.shapes == other.shapes and all(
            equal_bits(mine[name].cpu(), theirs[name].cpu())
            for mine, theirs in ((self.positions, other.positions), (self.values, other.values))
            for name in self.shapes
        )

    def __repr__(self) -> str:
        where = f"{len(self.shapes)} tensors, {readable_size(self.nbytes)}"
        return f"Patch({len(self):,} values in {where})"


def changed_bits(before: Tensor, after: Tensor) -> Tensor:
    """Return the flat positions where the bits of two tensors differ: int64 `[n]`, ascending.

    Args:
        before: any dtype and shape.
        after: the same dtype, shape and device.
    """
    one, other = (_flat(each) for each in (before, after))
    bits = INTEGERS.get(one.element_size(), torch.int64)
    differ = one.view(bits) != other.view(bits)
    if one.element_size() > 8:  # a double complex number is two integers
        differ = differ.view(-1, 2).any(-1)
    return differ.nonzero()[:, 0]


def _flat(tensor: Tensor) -> Tensor:
    """Return a tensor's entries in a row, at a stride of 1: only then are its bits in view."""
    flat = tensor.detach().reshape(-1)
    return flat if flat.stride() == (1,) else flat.clone(memory_format=torch.contiguous_format)


def _first_names(model: Weights, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return for each name the first name of the same memory; in a checkpoint nothing is tied."""
    if not isinstance(model, nn.Module | dict):
        return {name: name for name in tensors}
    return first_names(tensors)


def _refuse_lacking(what: str, lacking: Sequence[str], known: Mapping[str, Tensor]) -> None:
    if lacking:
        raise TalosValueError(
            f"{what} must have every tensor of the change, lacks {len(lacking)}: "
            + listed(lacking, known)
        )


def _check_same(name: str, before: Tensor, after: Tensor) -> None:
    if before.shape != after.shape or before.dtype != after.dtype:
        raise TalosValueError(
            f"tuned must have the shapes and dtypes of base, got {tuple(after.shape)} of "
            f"{after.dtype} for {name}, which is {tuple(before.shape)} of {before.dtype} in base"
        )
    if any(each.is_meta or each.layout != torch.strided for each in (before, after)):
        raise TalosTypeError(
            f"base and tuned must hold dense tensors with values, got {name} of layout "
            f"{after.layout} on {after.device}; load it, or convert it with to_dense()"
        )


def _check_editable(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in EDITABLE or tensor.is_meta:
        raise TalosTypeError(
            "base must have weights of floating point where it is edited, got "
            f"{name} of {tensor.dtype} on {tensor.device}; convert or load it first"
        )


def _check_writable(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TalosTypeError(
            f"model must have the patch's dtypes, got {tensor.dtype} for {name}, which is {dtype} "
            "in the patch; convert the model, or make the patch from weights of its dtype"
        )
    if tensor.is_meta or tensor.layout != torch.strided or type(tensor) not in _PLAIN:
        raise TalosTypeError(
            f"model must hold {name} as one dense tensor with values, got "
            f"{type(tensor).__name__} of layout {tensor.layout} on {tensor.device}; load or "
            "gather it first"
        )


def _checked(name: str, shape: Shape, positions: Tensor, values: Tensor) -> Tensor:
    """Return a tensor's positions in their dtype; refuse positions and values that do not fit."""
    numel = prod(shape)
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise TalosTypeError(f"positions of {name} must be integers, got {positions.dtype}")
    if positions.dim() != 1 or positions.shape != values.shape:
        raise TalosValueError(
            f"positions and values of {name} must be two flat tensors of one length, got shapes "
            f"{tuple(positions.shape)} and {tuple(values.shape)}"
        )
    if len(positions):
        first, last = int(positions[0]), int(positions[-1])
        if first < 0 or last >= numel or not _ascends(positions):
            raise TalosValueError(
                f"positions of {name} must be strictly ascending in [0, {numel}), got {first} .. "
                f"{last}; sort them and drop repeats"
            )
    if not all(map(_is_finite, values.detach().split(_CHUNK))):
        raise TalosValueError(
            f"values of {name} must be finite, got NaN or infinity; the training diverged, or a "
            "scale is out of range"
        )
    dtype = torch.int32 if numel <= 1 << 31 else torch.int64
    return _flat(positions.to(dtype))


def _ascends(positions: Tensor) -> bool:
    """Return whether integers ascend strictly."""
    chunks = range(0, len(positions), _CHUNK)  # differences of small integers would wrap around
    parts = (positions[first : first + _CHUNK + 1].to(torch.int64) for first in chunks)
    return not any(bool((part.diff() <= 0).any()) for part in parts)


def _is_finite(values: Tensor) -> bool:
    wide = values.float() if values.dtype.itemsize == 1 else values  # torch knows no infinite fp8
    return bool(torch.isfinite(wide).all())
