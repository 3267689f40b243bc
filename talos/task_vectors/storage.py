"""Task vectors in files."""

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from talos.errors import TalosOSError, TalosTypeError, TalosValueError
from talos.files import load_file, save_file
from talos.masks import Mask
from talos.task_vectors.sums import joined, slices_of

__all__ = ["DTYPES", "load_parts", "save_parts"]

_Path = str | os.PathLike[str]
_ENTRIES = {"tensors", "mask", "fingerprints", "made"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of a task vector's values."""


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
    content = {
        "tensors": entries,
        "mask": mask.metadata,
        "fingerprints": dict(fingerprints),
        "made": dict(metadata),
    }
    save_file(path, "task_vector", buffers, content)


def load_parts(path: _Path) -> tuple[Mask, Tensor, dict[str, str], dict[str, Any]]:
    """Read mask, values, fingerprints and metadata; see `TaskVector.load`."""
    tensors, content = load_file(path, "task_vector")
    try:
        _check_content(content)
        buffers = {name: t for name, t in tensors.items() if not name.endswith(".values")}
        selection = Mask.from_buffers(buffers, content["tensors"])
        mask = Mask(selection.shapes, selection.indices, content["mask"])
        _check_names(mask, tensors, content["fingerprints"])
        parts = [
            _values(name, tensors.pop(f"{name}.values"), index.nnz)
            for name, index in mask.indices.items()
        ]
        values = joined(parts)
    except (TalosTypeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise TalosValueError(f"{path}: not a valid task vector: {error}") from None
    return mask, values, content["fingerprints"], content["made"]


def _check_content(content: Mapping[str, Any]) -> None:
    """Refuse content of the wrong structure."""
    if set(content) != _ENTRIES:
        raise TalosValueError(f"its content must hold {sorted(_ENTRIES)}, got {sorted(content)}")
    fingerprints = content["fingerprints"]
    if not isinstance(content["mask"], dict) or not isinstance(content["made"], dict):
        raise TalosValueError("mask and made must be objects")
    if not isinstance(fingerprints, dict) or not all(
        isinstance(digits, str) and re.fullmatch("[0-9a-f]{16}", digits)
        for digits in fingerprints.values()
    ):
        raise TalosValueError("fingerprints must be 16 hex digits by name")


def _check_names(
    mask: Mask, tensors: Mapping[str, Tensor], fingerprints: Mapping[str, str]
) -> None:
    """Refuse tensors and fingerprints that belong to no tensor of the mask."""
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
            f"{name}.values must hold {nnz} numbers, one per selected entry, "
            f"got shape {tuple(values.shape)}"
        )
    if values.dtype not in DTYPES:
        raise TalosValueError(
            f"{name}.values must be float32, bfloat16 or float16, got {values.dtype}"
        )
    return values
