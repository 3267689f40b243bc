"""Task vectors in files."""

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from talos.errors import TalosOSError, TalosTypeError, TalosValueError
from talos.files import check_entries, load_file, save_file, write_tensors
from talos.masks import Mask
from talos.task_vectors.sums import slices_of

__all__ = ["export_dense", "load_parts", "save_parts"]

_Path = str | os.PathLike[str]
_ENTRIES = {"tensors", "mask", "fingerprints", "made"}


def save_parts(
    path: _Path,
    mask: Mask,
    values: Tensor,
    fingerprints: Mapping[str, str],
    metadata: Mapping[str, Any],
    *,
    overwrite: bool,
) -> None:
    """Write what `load_parts` reads; see `TaskVector.save`."""
    if not overwrite and os.path.lexists(path):
        raise TalosOSError(f"path must not exist, got {path}; pass overwrite=True to replace it")
    buffers, entries = mask.to_buffers()
    buffers |= {f"{name}.values": values[part] for name, part in slices_of(mask).items()}
    save_file(
        path,
        "task_vector",
        buffers,
        {
            "tensors": entries,
            "mask": mask.metadata,
            "fingerprints": dict(fingerprints),
            "made": dict(metadata),
        },
    )


def load_parts(path: _Path) -> tuple[Mask, Tensor, dict[str, str], dict[str, Any]]:
    """Read mask, values, fingerprints and metadata; see `TaskVector.load`."""
    tensors, entries = load_file(path, "task_vector")
    try:
        _check_entries(entries)
        buffers = {name: t for name, t in tensors.items() if not name.endswith(".values")}
        selection = Mask.from_buffers(buffers, entries["tensors"])
        mask = Mask(selection.shapes, selection.indices, entries["mask"])
        _check_names(mask, tensors, entries["fingerprints"])
        parts = [
            _values(name, tensors.pop(f"{name}.values"), index.nnz)
            for name, index in mask.indices.items()
        ]
        values = _joined(parts)
    except (
        TalosValueError,
        TalosTypeError,
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:
        raise TalosValueError(f"{path}: not a valid task vector: {error}") from None
    return mask, values, entries["fingerprints"], entries["made"]


def export_dense(path: _Path, mask: Mask, values: Tensor) -> None:
    """Write each tensor's delta, dense, as plain safetensors; one is in memory at a time."""
    slices = slices_of(mask)

    def dense(name: str) -> Tensor:
        delta = torch.zeros(mask.indices[name].numel, dtype=values.dtype, device="cpu")
        delta[mask.indices[name].positions_int64()] = values[slices[name]]
        return delta

    shapes = {name: (values.dtype, shape) for name, shape in mask.shapes.items()}
    write_tensors(path, shapes, {"format": "pt"}, dense)


def _check_entries(entries: Mapping[str, Any]) -> None:
    """Refuse metadata of the wrong structure before a size in it is used."""
    if set(entries) != _ENTRIES:
        raise TalosValueError(f"its metadata must hold {sorted(_ENTRIES)}, got {sorted(entries)}")
    check_entries(entries["tensors"])
    fingerprints = entries["fingerprints"]
    if not isinstance(entries["mask"], dict) or not isinstance(entries["made"], dict):
        raise TalosValueError("mask and made must be objects")
    if not isinstance(fingerprints, dict) or not all(
        isinstance(digits, str) and re.fullmatch("[0-9a-f]{16}", digits)
        for digits in fingerprints.values()
    ):
        raise TalosValueError("fingerprints must be 16 hex digits by name")


def _check_names(
    mask: Mask, tensors: Mapping[str, Tensor], fingerprints: Mapping[str, str]
) -> None:
    """Refuse tensors and fingerprints in the file that belong to nothing."""
    strangers = sorted(set(fingerprints) - set(mask.names))
    if strangers:
        raise TalosValueError(f"fingerprints must name its tensors, got {strangers[:5]}")
    used = {f"{name}.values" for name in mask.names} | set(mask.to_buffers()[0])
    extra = sorted(set(tensors) - used)
    if extra:
        raise TalosValueError(f"it must hold only mask and values, got {', '.join(extra[:5])}")


def _values(name: str, values: Tensor, nnz: int) -> Tensor:
    if values.shape != (nnz,):
        raise TalosValueError(
            f"{name}.values must hold {nnz} numbers, one a selected entry, "
            f"got shape {tuple(values.shape)}"
        )
    if not values.is_floating_point():
        raise TalosValueError(f"{name}.values must be floating point, got {values.dtype}")
    return values


def _joined(parts: list[Tensor]) -> Tensor:
    """One flat tensor; empties the list on the way, so that only one part is there twice."""
    dtypes = {part.dtype for part in parts if part.numel()}
    if len(dtypes) > 1:
        raise TalosValueError("values must share one dtype")
    end = sum(part.numel() for part in parts)
    values = torch.empty(end, dtype=dtypes.pop() if dtypes else torch.float32, device="cpu")
    while parts:
        part = parts.pop()
        values[end - part.numel() : end] = part
        end -= part.numel()
    return values
