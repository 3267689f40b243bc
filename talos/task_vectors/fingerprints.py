"""Fingerprints of weights: the base that a task vector belongs to.

A fingerprint is the first 16 hex digits of the SHA-256 over dtype, shape and row-major bytes.

A tensor is hashed at its first use only. Later its record gives the fingerprint of its base: the
tensor without the edits of this library. A record holds while the tensor has the same storage, the
same version and the same sum of bits. Every in-place operation of torch raises the version. The sum
finds other writes, through `.data` or NumPy, unless they keep the sum, as a permutation does.
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from talos.distributed import is_sharded, local, reduced, sharding, whole
from talos.errors import TalosTypeError, TalosValueError
from talos.files import digest
from talos.tensors import INTEGERS, place

__all__ = ["base_fingerprints", "bit_sums", "fingerprint", "one_base", "remember_bases"]


@dataclass(frozen=True)
class _Record:
    """What is known of one tensor; the weak reference keeps its storage's identity in use."""

    storage: StorageWeakRef
    version: int
    bit_sum: int
    base: str


# By memory, not by a weak reference to the parameter: that would forbid `swap_tensors` on it.
_records: dict[Hashable, _Record] = {}


def fingerprint(tensor: Tensor) -> str:
    """Hash a tensor's dtype, shape and bits.

    Args:
        tensor: dense, any shape, dtype, device and strides. Of a sharded one the whole is hashed,
            and all ranks call this.

    Returns:
        16 hex digits, of the row-major bytes: strides and device do not matter.

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
    return digest(whole(local(tensor), tensor))[:16]


def one_base(found: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Return the fingerprints of the base that several vectors share, by name.

    Args:
        found: the fingerprints of each vector, by name.

    Raises:
        TalosValueError: two of them differ for a tensor.
    """
    bases: dict[str, str] = {}
    for fingerprints in found:
        for name, base in fingerprints.items():
            if bases.setdefault(name, base) != base:
                raise TalosValueError(
                    "task vectors must belong to one base, got the fingerprints "
                    f"{bases[name]} and {base} of {name}; make them from the same weights"
                )
    return bases


def base_fingerprints(params: Mapping[str, Tensor], *, verify: bool = True) -> dict[str, str]:
    """Return the fingerprint of each tensor's base: without the edits of this library on it.

    Args:
        params: tensors by name.
        verify: hash the tensors without a record; False leaves them out. All ranks that hold
            parts of a sharded one hash it together.

    Returns:
        16 hex digits by name.
    """
    found = ((name, _records.get(place(local(param)))) for name, param in params.items())
    records = {name: record for name, record in found if record is not None}
    bases = {}
    for name, bit_sum in bit_sums({name: params[name] for name in records}).items():
        base = records[name].base
        if records[name] == _record(params[name], bit_sum, base):
            bases[name] = base
    if verify:
        lacking = _lacking(params, bases)
        fresh = {name: fingerprint(param) for name, param in params.items() if name in lacking}
        remember_bases({name: params[name] for name in fresh}, fresh)
        bases.update(fresh)
    return bases


def remember_bases(
    params: Mapping[str, Tensor], bases: Mapping[str, str], sums: Mapping[str, int] | None = None
) -> None:
    """Record the bases of tensors as they are now, whatever edits of this library are on them.

    Args:
        params: tensors by name.
        bases: fingerprints by name; a tensor without one is not recorded.
        sums: their `bit_sums`; None: computed.
    """
    for key in [key for key, record in _records.items() if record.storage.expired()]:
        del _records[key]
    sums = bit_sums({name: params[name] for name in bases}) if sums is None else sums
    for name in bases.keys() & sums.keys():
        _records[place(local(params[name]))] = _record(params[name], sums[name], bases[name])


def _lacking(params: Mapping[str, Tensor], bases: Mapping[str, str]) -> set[str]:
    """Return the names of the tensors whose base some rank does not know."""
    lacking = {name for name in params if name not in bases}
    for name, param in params.items():
        if is_sharded(param):
            flag = torch.tensor(name in lacking, dtype=torch.int32, device=param.device)
            if reduced(flag, "max", sharding(param)):
                lacking.add(name)
    return lacking


def _record(param: Tensor, bit_sum: int, base: str) -> _Record:
    param = local(param)
    return _Record(StorageWeakRef(param.untyped_storage()), param._version, bit_sum, base)


def bit_sums(params: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the sum of each tensor's bits, with one transfer per device.

    Tensors without a version (inference tensors) or without one storage are left out.
    """
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, param in params.items():
        param = local(param)
        plain = type(param) in (Tensor, torch.nn.Parameter) and not param.is_inference()
        if plain and not param.is_meta and param.layout == torch.strided:
            by_device.setdefault(param.device, {})[name] = _bit_sum(param)
    sums: dict[str, int] = {}
    for found in by_device.values():
        sums.update(zip(found, torch.stack(list(found.values())).tolist(), strict=True))
    return sums


def _bit_sum(tensor: Tensor) -> Tensor:
    """Return the sum of the bits as integers, of 64 bits where they fit: int64, 0-dim."""
    flat = tensor.detach().contiguous().reshape(-1)
    octets = 8 // flat.element_size()
    wide = flat.numel() % octets == 0 and flat.storage_offset() % octets == 0
    return flat.view(INTEGERS[8 if wide else flat.element_size()]).sum(dtype=torch.int64)
