"""Fingerprints of weights: which base a task vector belongs to.

A fingerprint is the first 16 hex digits of the SHA-256 over dtype, shape and row-major bytes. A
search for a scaling coefficient applies a task vector many times, and hashing would cost it more
than applying, so a ledger of this process remembers what it hashed, and the edits that the engine
itself made since: after them the weights still count as the same base, plus our edits.

An entry of the ledger holds as long as the tensor has the same storage, the same version (every
in-place operation of torch counts it up; so does a kernel of ours) and the same checksum, which
notices what raises no version: a write through `.data` or NumPy. Where one of them differs, the
tensor is hashed anew.

The checksum lays the bits out as rows of 64-bit words and adds them up along both dimensions, in
plain sums at the speed of memory. Each of those sums counts with a weight of its own, so that words
that only changed places are noticed as well.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from talos.errors import TalosTypeError

__all__ = ["Edit", "base_fingerprints", "fingerprint", "fingerprints"]

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}

# Words in a row: a prime, so that no row or column of a tensor keeps step with it.
_ROW = 4093

_Key = tuple[int, int, torch.dtype, torch.Size, tuple[int, ...]]


@dataclass(frozen=True)
class _Entry:
    """What is known of one tensor.

    Attributes:
        storage: keeps the storage's identity from being given to another one.
        version: of the tensor, when the entry was made.
        total: its checksum then.
        base: fingerprint of the tensor without our edits.
        edits: those edits, oldest first.
    """

    storage: StorageWeakRef
    version: int
    total: int
    base: str
    edits: tuple[object, ...] = ()


# Keyed by storage rather than by a weak reference to the parameter, which would forbid
# `torch.utils.swap_tensors` on the user's parameters.
_ledger: dict[_Key, _Entry] = {}


def fingerprint(tensor: Tensor) -> str:
    """Hash a tensor's dtype, shape and bits.

    Args:
        tensor: dense, any shape, dtype, device and strides.

    Returns:
        16 hex digits: of the row-major bytes, so strides and device do not matter.

    Raises:
        TalosTypeError: the tensor holds no dense values (meta device, sparse layout).

    Example:
        >>> fingerprint(torch.zeros(2, 3)) == fingerprint(torch.zeros(3, 2).t())
        True
        >>> fingerprint(torch.zeros(2)) == fingerprint(torch.zeros(2, dtype=torch.bfloat16))
        False
    """
    if tensor.is_meta or tensor.layout != torch.strided:
        raise TalosTypeError(
            f"tensor must be dense and hold values, got layout {tensor.layout} on {tensor.device}; "
            "load the weights first"
        )
    digest = hashlib.sha256(f"{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def fingerprints(params: Mapping[str, Tensor]) -> dict[str, str]:
    """The fingerprint of each tensor as it is now; what the ledger knows is not hashed again.

    Args:
        params: tensors by name.

    Returns:
        16 hex digits by name.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> fingerprints({"w": w}) == {"w": fingerprint(w)}
        True
    """
    known = _known(params)
    fresh = {n: p for n, p in params.items() if n not in known or known[n].edits}
    hashed = {name: fingerprint(param) for name, param in fresh.items()}
    _remember({n: p for n, p in fresh.items() if n not in known}, hashed)
    return {name: hashed[name] if name in hashed else known[name].base for name in params}


def base_fingerprints(params: Mapping[str, Tensor]) -> dict[str, str]:
    """The fingerprint of each tensor without the edits of `apply_` and `applied` still on it.

    Args:
        params: tensors by name.

    Returns:
        16 hex digits by name. A tensor that anybody else wrote after our edits counts as it is.
    """
    return Edit(params).bases


class Edit:
    """One edit of ours on some tensors, told to the ledger before, after and when taken off.

    Create it before the write, call `done` right after, and `ready_to_undo` and `undone` around
    taking it off.

    Args:
        params: the tensors by name.
        verify: hash what the ledger does not know; otherwise that stays unknown.

    Attributes:
        bases: fingerprint of each tensor without our edits, by name.
    """

    def __init__(self, params: Mapping[str, Tensor], *, verify: bool = True) -> None:
        self._params = dict(params)
        self._before = _known(params)
        self.bases = {name: entry.base for name, entry in self._before.items()}
        if verify:
            fresh = {name: param for name, param in params.items() if name not in self._before}
            self.bases.update({name: fingerprint(param) for name, param in fresh.items()})
            self._before.update(_remember(fresh, self.bases))

    def done(self, *, keep: bool) -> None:
        """Count the tensors, just written, as their base plus this edit.

        Args:
            keep: the edit stays (`apply_`); it will not be taken off by `undo`.
        """
        params = {name: self._params[name] for name in self._before}
        mark = Edit if keep else self
        for name, total in _totals(params).items():
            before = self._before[name]
            edits = before.edits if keep and mark in before.edits else (*before.edits, mark)
            _set(params[name], replace(before, total=total, edits=edits))

    def ready_to_undo(self) -> dict[str, _Entry]:
        """What is known of the tensors right before the edit is taken off."""
        return {n: e for n, e in _known(self._params).items() if self in e.edits}

    def undone(self, ready: Mapping[str, _Entry]) -> None:
        """Count the tensors, just restored, as what they were before the edit.

        Args:
            ready: what `ready_to_undo` gave. A tensor not in it was written by somebody else.
        """
        kept = {n: self._params[n] for n, entry in ready.items() if entry.edits[-1] is not self}
        totals = _totals(kept)
        for name, entry in ready.items():
            if name in kept:  # a later edit of ours stays on what this one did not cover
                rest = tuple(edit for edit in entry.edits if edit is not self)
                _set(kept[name], replace(entry, total=totals[name], edits=rest))
            else:
                _set(self._params[name], self._before[name])

    def restored(self) -> None:
        """Count the tensors, bit for bit as they were before the edit, as what they were then."""
        for name, before in self._before.items():
            _set(self._params[name], before)


def _key(tensor: Tensor, storage: StorageWeakRef) -> _Key:
    return storage.cdata, int(tensor.storage_offset()), tensor.dtype, tensor.shape, tensor.stride()


def _can_be_known(tensor: Tensor) -> bool:
    """Inference tensors keep no version, others no single storage: those are always hashed."""
    return (
        not tensor.is_inference()
        and not tensor.is_meta
        and tensor.layout == torch.strided
        and tensor.element_size() in _INTEGERS
        and type(tensor) in (Tensor, torch.nn.Parameter)
    )


def _known(params: Mapping[str, Tensor]) -> dict[str, _Entry]:
    """The entries that hold now."""
    found = {}
    for name, param in params.items():
        if _can_be_known(param):
            entry = _ledger.get(_key(param, StorageWeakRef(param.untyped_storage())))
            if entry is not None and entry.version == param._version:
                found[name] = entry
    totals = _totals({name: params[name] for name in found})
    return {name: entry for name, entry in found.items() if entry.total == totals[name]}


def _remember(params: Mapping[str, Tensor], bases: Mapping[str, str]) -> dict[str, _Entry]:
    for key in [key for key, entry in _ledger.items() if entry.storage.expired()]:
        del _ledger[key]
    known = {name: param for name, param in params.items() if _can_be_known(param)}
    entries = {}
    for name, total in _totals(known).items():
        param = known[name]
        storage = StorageWeakRef(param.untyped_storage())
        entry = _Entry(storage, param._version, total, bases[name])
        entries[name] = _ledger[_key(param, storage)] = entry
    return entries


def _set(param: Tensor, entry: _Entry) -> None:
    """Store an entry under the tensor's storage and version of now."""
    storage = StorageWeakRef(param.untyped_storage())
    _ledger[_key(param, storage)] = replace(entry, storage=storage, version=param._version)


def _totals(params: Mapping[str, Tensor]) -> dict[str, int]:
    """The checksum of each tensor, with one transfer a device."""
    by_device: dict[torch.device, list[str]] = {}
    for name, param in params.items():
        by_device.setdefault(param.device, []).append(name)
    totals: dict[str, int] = {}
    for names in by_device.values():
        sums = torch.stack([_checksum(params[name]) for name in names])
        totals.update(zip(names, sums.tolist(), strict=True))
    return totals


def _checksum(tensor: Tensor) -> Tensor:
    """A checksum of the bits and of where they are: int64, 0-dim."""
    flat = tensor.detach().contiguous().reshape(-1)
    octets = 8 // flat.element_size()
    wide = flat.numel() % octets == 0 and flat.storage_offset() % octets == 0
    words = flat.view(_INTEGERS[8 if wide else flat.element_size()])
    rows = words[: len(words) // _ROW * _ROW].view(-1, _ROW)
    rest = words[rows.numel() :].to(torch.int64)
    sums = torch.cat([rows.sum(0), rows.sum(1), rest]) if len(rows) else rest
    # The product wraps: of the highest bits it would keep their number only, so they come down too.
    weights = _weights(1 << len(sums).bit_length(), sums.device)[: len(sums)]
    return ((sums ^ (sums >> 32)) * weights).sum()


@lru_cache(maxsize=32)
def _weights(size: int, device: torch.device) -> Tensor:
    """Odd numbers without a pattern: int64 [size], always the same."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.iinfo(torch.int64)
    numbers = torch.randint(
        ends.min, ends.max, (size,), generator=generator, device="cpu", dtype=torch.int64
    )
    return (numbers | 1).to(device)
