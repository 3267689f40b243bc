"""Put a sparse delta on a model's weights, and take it off bit for bit."""

import weakref
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from talos.distributed import errors_on_all_ranks, local, mesh_of, reshard
from talos.errors import TalosRuntimeError, TalosTypeError, TalosValueError
from talos.masks import Mask
from talos.masks.parts import Parts
from talos.names import check_module, match_tensors, named_buffers, named_parameters
from talos.options import as_real
from talos.task_vectors.fingerprints import base_fingerprints, remember_bases
from talos.task_vectors.sums import slices_of
from talos.tensors import check_separate, place
from talos_kernels import Index, add_delta_, revert_delta_

__all__ = [
    "EDITABLE",
    "Launch",
    "ModelEdit",
    "check_base",
    "check_scale",
    "launches",
    "touched_weights",
]

EDITABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes of weights that `add_delta_` writes."""
# A search applies a few vectors many times; a packed index is small beside its model.
_MOST_PACKED = 8

_open: list["ModelEdit"] = []  # the edits that can be taken off, in the order of their writing

_PackedKey = tuple[int, tuple[str, ...], torch.device]
_packed: OrderedDict[_PackedKey, tuple[weakref.ref[Mask], Index]] = OrderedDict()


@dataclass
class Launch:
    """One vector's part for the weights of one device and dtype.

    Attributes:
        names: of the weights.
        params: the weights; of sharded ones the parts that this rank holds.
        index: their selected entries, on their device.
        values: `[nnz]` of the delta, on their device.
        dtype: of the weights.
        saved: `[nnz]`, room for the old bits; None: they are not kept.
    """

    names: list[str]
    params: list[Tensor]
    index: Index
    values: Tensor
    dtype: torch.dtype
    saved: Tensor | None = None

    def keep_bits(self, room: Tensor | None = None) -> None:
        """Keep the old bits, in the first entries of `room`; None: in new memory."""
        if room is None:
            room = torch.empty(self.index.nnz, dtype=self.dtype, device=self.index.device)
        self.saved = room[: self.index.nnz]

    def check(self, scale: float, largest: float) -> None:
        """Refuse a scale that makes a finite weight infinite or NaN; nothing is written.

        Raises:
            TalosValueError: it does; `largest` is the largest magnitude of the values.
        """
        limits = torch.finfo(self.dtype)
        # A change below half a unit of the largest number's last place rounds back to that number.
        if abs(scale * largest) < limits.eps * limits.max / 4:
            return
        wide = torch.promote_types(self.dtype, torch.float32)
        parts = zip(self.names, self.params, self.index.unpack(), self.index.slices, strict=True)
        for name, param, part, entries in parts:
            old = param.detach().reshape(-1)[part.positions_int64().to(param.device)]
            new = (old.to(wide) + scale * self.values[entries].to(wide)).to(param.dtype)
            lost = int((old.isfinite() & ~new.isfinite()).sum())
            if lost:
                raise TalosValueError(
                    f"scale must keep every weight finite, got {scale:g}, with which {lost:,} of "
                    f"{name} leave the range of {param.dtype}, {limits.max:g}; "
                    "take a smaller one, or convert the model to float32"
                )

    def put_on(self, scale: float) -> None:
        """Add the scaled values to the weights."""
        add_delta_(self.params, self.index, self.values, scale=scale, saved=self.saved)

    def take_off(self) -> None:
        """Write the old bits back, where they were kept."""
        if self.saved is not None:
            device = self.params[0].device  # the model may have been moved meanwhile
            index = self.index if self.index.device == device else self.index.to(device)
            revert_delta_(self.params, index, self.saved.to(device))


def launches(mask: Mask, values: Tensor, touched: Mapping[str, Tensor]) -> list[Launch]:
    """Return one launch per device and dtype of the weights that a vector touches, by its names."""
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, param in touched.items():
        groups.setdefault((param.device, param.dtype), []).append(name)
    slices = slices_of(mask)
    found = []
    for (device, dtype), names in groups.items():
        parts = Parts(mask, {name: touched[name] for name in names})
        if parts.sharded:
            part = torch.cat([parts.part(name, values[slices[name]]) for name in names])
            index = Index.pack([parts.indices[name] for name in names], device)
            params = [local(touched[name]) for name in names]
            found.append(Launch(names, params, index, part.to(device), dtype))
            continue
        whole = len(names) == len(touched)  # no copy then, where the model is on the CPU
        part = values if whole else torch.cat([values[slices[name]] for name in names])
        params = [touched[name] for name in names]
        index = _pack(mask, tuple(names), device)
        found.append(Launch(names, params, index, part.to(device), dtype))
    return found


class ModelEdit:
    """One delta for one model: the constructor checks, `put_on` writes, `take_off` restores."""

    def __init__(
        self,
        model: nn.Module,
        mask: Mask,
        values: Tensor,
        fingerprints: Mapping[str, str],
        *,
        force: bool,
    ) -> None:
        self._touched = touched_weights(model, mask)
        verify = bool(fingerprints) and not force
        self._bases = base_fingerprints(self._touched, verify=verify)
        if verify:
            check_base(self._bases, fingerprints)
        self._launches = launches(mask, values, self._touched)

    def put_on(self, scale: float, largest: float, *, keep: bool) -> None:
        """Add the scaled delta; `keep=False` saves the old bits for `take_off`.

        Raises:
            TalosValueError: a weight would overflow; nothing is written.
        """
        done: list[Launch] = []
        try:
            with self._together():
                for launch in self._launches:
                    launch.check(scale, largest)
            for launch in self._launches:
                if not keep:
                    launch.keep_bits()
            for launch in self._launches:
                launch.put_on(scale)
                done.append(launch)
        except BaseException:
            for launch in done:
                launch.take_off()
            raise
        remember_bases(self._touched, self._bases)
        if not keep:
            _open.append(self)

    def _together(self) -> AbstractContextManager[Any]:
        """Return a block in which ranks that share weights fail together."""
        mesh = mesh_of(self._touched.values())
        return nullcontext() if mesh is None else errors_on_all_ranks(mesh)

    def take_off(self) -> None:
        """Write the old bits back to the selected entries.

        A weight with a later edit that is still on counts as another base afterwards.

        Raises:
            TalosRuntimeError: a weight was cast or resized while the delta was on.
        """
        edits = list(_open)
        _open.remove(self)
        later = edits[edits.index(self) + 1 :]
        crossed = {place(param) for edit in later for param in edit._touched.values()}
        for launch in self._launches:
            for param, numel in zip(launch.params, launch.index.numels, strict=True):
                if param.dtype != launch.dtype or param.numel() != numel:
                    raise TalosRuntimeError(
                        f"model must keep its weights' dtype {launch.dtype} and shapes while a "
                        f"task vector is applied, got {param.dtype} of {tuple(param.shape)}; the "
                        "edit is still on, load the weights again"
                    )
        inner = {name: p for name, p in self._touched.items() if place(p) not in crossed}
        bases = base_fingerprints(inner, verify=False)
        for launch in self._launches:
            launch.take_off()
        remember_bases(self._touched, bases)


def check_scale(scale: object) -> float:
    """Return a finite real number as a float.

    Raises:
        TalosTypeError: it is no real number.
        TalosValueError: it is NaN or infinite.
    """
    number = as_real(scale)
    if number is None:
        raise TalosTypeError(f"scale must be a real number, got {type(scale).__name__}")
    if not isfinite(number):
        raise TalosValueError(f"scale must be finite, got {number}")
    return number


def touched_weights(model: nn.Module, mask: Mask) -> dict[str, Tensor]:
    """Return a model's weights where a mask selects entries, by the mask's names.

    Buffers are included, because the difference of two state dicts holds them. Modules of FSDP2
    hold their parts afterwards.

    Raises:
        TalosTypeError: `model` is no module, or such a weight has a dtype that is not supported.
        TalosValueError: the model lacks a tensor or has another shape of it.
    """
    check_module(model)
    reshard(model)
    every_name = {**named_buffers(model), **named_parameters(model, remove_duplicate=False)}
    matched = match_tensors(mask.shapes, every_name, what="task vector")
    touched = {name: param for name, param in matched.items() if mask.indices[name].nnz}
    for name, param in touched.items():
        if param.dtype not in EDITABLE or param.is_meta:
            raise TalosTypeError(
                "model must have weights of floating point where it is edited, got "
                f"{name} of {param.dtype} on {param.device}; convert or load it first"
            )
    check_separate(touched, "edited weights of the model")
    return touched


def check_base(found: Mapping[str, str], wanted: Mapping[str, str], what: str = "model") -> None:
    """Refuse tensors whose fingerprints are not the wanted ones of the same names.

    Args:
        found: fingerprints by name.
        wanted: those of a task vector's base.
        what: the owner of the tensors, for the message.

    Raises:
        TalosValueError: one differs.
    """
    differing = [n for n, base in found.items() if n in wanted and wanted[n] != base]
    if differing:
        name = differing[0]
        more = f" and {len(differing) - 1} tensors more differ" if len(differing) > 1 else ""
        raise TalosValueError(
            f"{what} must be the base that the task vector was made from, got {name} with "
            f"fingerprint {found[name]}, wanted {wanted[name]}{more}; load that base in the same "
            "dtype, or pass force=True to edit this one"
        )


def _pack(mask: Mask, names: tuple[str, ...], device: torch.device) -> Index:
    """Return the packed index of some of the mask's tensors; the last few are kept."""
    key = (id(mask), names, device)
    if key in _packed and _packed[key][0]() is mask:
        _packed.move_to_end(key)
        return _packed[key][1]
    with torch.inference_mode(False):  # the index outlives the caller's mode
        index = mask.pack(names, device)

    def forget(_: Any) -> None:
        _packed.pop(key, None)

    _packed[key] = (weakref.ref(mask, forget), index)
    while len(_packed) > _MOST_PACKED:
        _packed.popitem(last=False)
    return index
