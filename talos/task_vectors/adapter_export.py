"""Sparse task vectors as adapters that PEFT loads.

SHiRA takes r (in + out) entries of each weight, with one r; Super-Tuning one share of the entries
of each. So r, or the share, is that of the densest weight, and the others get entries that change
by zero. See `talos.task_vectors.adapters` for the formulas.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from talos.errors import TalosOSError, TalosValueError
from talos.files import write_tensors
from talos.files.atomic import atomic_folder
from talos.masks import Mask
from talos.task_vectors.adapters import CONFIG, PREFIX, WEIGHTS
from talos.task_vectors.sums import slices_of

__all__ = ["export_sparse", "write_adapter"]

_MOST = 1 << 31  # PEFT counts entries in int32


def write_adapter(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Write an adapter's folder, atomically.

    Args:
        folder: to make.
        tensors: by the names of the base and the adapter's part: `h.0.q.lora_A.weight`.
        config: of the adapter, without what all have.
        overwrite: replace an adapter that is there.

    Raises:
        TalosOSError: the folder is there or holds other files, or cannot be written.
    """
    if not overwrite and os.path.lexists(folder):
        raise TalosOSError(
            f"folder must not exist, got {folder}; pass overwrite=True to replace it"
        )
    others = {each.name for each in Path(folder).glob("*")} - {CONFIG, WEIGHTS, "README.md"}
    if others:
        raise TalosOSError(
            f"folder must hold nothing but an adapter, got {sorted(others)[0]} in {folder}; remove "
            "it, or choose another folder"
        )
    every = {"inference_mode": True, "task_type": None, "modules_to_save": None, **config}

    def write(new: Path) -> None:
        write_tensors(
            new / WEIGHTS, {f"{PREFIX}{name}": t for name, t in tensors.items()}, {"format": "pt"}
        )
        (new / CONFIG).write_text(json.dumps(every, indent=2, sort_keys=True) + "\n")

    atomic_folder(folder, write, overwrite=overwrite)


def export_sparse(
    folder: str | os.PathLike[str],
    mask: Mask,
    values: Tensor,
    kind: str,
    *,
    base_model: str | None,
    overwrite: bool,
) -> None:
    """Write a sparse adapter; see `TaskVector.export_adapter`."""
    if kind not in _KINDS:
        raise TalosValueError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    touched = {name: mask.indices[name].nnz for name in mask.names if mask.indices[name].nnz}
    others = [
        name
        for name in touched
        if len(shape := mask.shapes[name]) != 2
        or not name.endswith(".weight")
        or math.prod(shape) > _MOST
    ]
    if others or not touched:
        raise TalosValueError(
            f"the vector must change weights of linear layers only for {kind}, got "
            f"{', '.join(others[:5]) or 'an empty one'}; export a patch or a checkpoint"
        )
    wanted, config = _KINDS[kind]({name: (mask.shapes[name], n) for name, n in touched.items()})
    tensors: dict[str, Tensor] = {}
    slices = slices_of(mask)
    for name in touched:
        where, delta = _padded(mask, name, values[slices[name]].float(), wanted[name])
        module, columns = name.removesuffix(".weight"), mask.shapes[name][1]
        if kind == "shira":
            places = torch.stack([where // columns, where % columns])
            tensors |= {f"{module}.shira_indices": places.int(), f"{module}.shira_weight": delta}
        else:
            tensors[f"{module}.supertuning_indices"] = where.int()
            tensors[f"{module}.supertuning_values"] = delta
    modules = sorted(name.removesuffix(".weight") for name in touched)
    about = {"target_modules": modules, "base_model_name_or_path": base_model}
    write_adapter(folder, tensors, {**config, **about}, overwrite=overwrite)


_Sizes = Mapping[str, tuple[tuple[int, ...], int]]  # shape and nnz by name


def _shira(sizes: _Sizes) -> tuple[dict[str, int], dict[str, Any]]:
    """Return how many entries SHiRA takes of each weight, and its config."""
    rank = max(-(-nnz // sum(shape)) for shape, nnz in sizes.values())
    small = [name for name, (shape, _) in sizes.items() if rank * sum(shape) > math.prod(shape)]
    if small:
        raise TalosValueError(
            f"the vector must fit one rank for shira, got {rank}, with which {small[0]} of shape "
            f"{sizes[small[0]][0]} has too few entries; export it as supertuning"
        )
    config = {"peft_type": "SHIRA", "r": rank, "mask_type": "random", "init_weights": True}
    return {name: rank * sum(shape) for name, (shape, _) in sizes.items()}, config


def _supertuning(sizes: _Sizes) -> tuple[dict[str, int], dict[str, Any]]:
    """Return how many entries Super-Tuning takes of each weight, and its config."""

    def taken(sparsity: float) -> dict[str, int]:  # as PEFT computes it
        return {name: int(math.prod(shape) * (1 - sparsity)) for name, (shape, _) in sizes.items()}

    sparsity = 1 - max(nnz / math.prod(shape) for shape, nnz in sizes.values())
    while any(taken(sparsity)[name] < nnz for name, (_, nnz) in sizes.items()):
        sparsity = max(0.0, sparsity - 1e-15)  # rounding took one entry away
    config = {"peft_type": "SUPERTUNING", "sparsity": sparsity, "save_precomputed_indices": True}
    return taken(sparsity), config


_KINDS: dict[str, Callable[[_Sizes], tuple[dict[str, int], dict[str, Any]]]] = {
    "shira": _shira,
    "supertuning": _supertuning,
}


def _padded(mask: Mask, name: str, delta: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return positions and values with further entries that change by zero, ascending."""
    chosen = mask.indices[name].decode()
    more = (~chosen).nonzero()[: length - len(delta), 0]
    chosen[more] = True
    where = chosen.nonzero()[:, 0]
    padded = torch.zeros(length, dtype=torch.float32, device="cpu")
    padded[torch.searchsorted(where, mask.indices[name].positions_int64())] = delta
    return where, padded
