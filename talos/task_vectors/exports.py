"""A base checkpoint with a task vector on it, as another checkpoint."""

import os
import warnings
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence, Set

import torch
from torch import Tensor

from talos.errors import TalosTypeError, TalosValueError
from talos.files import Beside, Checkpoint, OnTensor, write_changed
from talos.masks import Mask
from talos.names import listed, match_prefixes, resolve_names
from talos.task_vectors.editing import EDITABLE, Launch, check_base
from talos.task_vectors.fingerprints import fingerprint
from talos.task_vectors.sums import slices_of
from talos.tensors import equal_bits
from talos_kernels import Index

__all__ = ["base_of", "copies_in", "export_checkpoint", "names_in", "warn_of_copies"]


def export_checkpoint(
    mask: Mask,
    values: Tensor,
    fingerprints: Mapping[str, str],
    base: Checkpoint,
    out: str | os.PathLike[str],
    *,
    scale: float,
    largest: float,
    overwrite: bool,
    on_tensor: OnTensor | None,
    beside: Beside | None,
) -> None:
    """Write base + scale * vector; see `TaskVector.export`."""
    names = names_in(base, mask)
    sources = {own: name for name, own in names.items() if mask.indices[name].nnz}
    for own in sources:
        if base.dtypes[own] not in EDITABLE:
            raise TalosTypeError(
                "base must have weights of floating point where it is edited, got "
                f"{own} of {base.dtypes[own]}; take a checkpoint that is not quantised"
            )
    copies = copies_in(base, list(sources), set(names.values()))
    sources |= {copy: sources[own] for copy, own in copies.items()}
    slices = slices_of(mask)

    def change_(own: str, tensor: Tensor) -> None:
        if own not in sources:
            return
        name = sources[own]
        if name in fingerprints:
            check_base({name: base_of(tensor, fingerprints[name])}, fingerprints, "base")
        index = Index.pack([mask.indices[name]])
        launch = Launch([name], [tensor], index, values[slices[name]], tensor.dtype)
        launch.check(scale, largest)
        launch.put_on(scale)

    left_out = write_changed(
        base, out, change_, overwrite=overwrite, on_tensor=on_tensor, beside=beside
    )
    warn_of_copies(copies, stacklevel=4)
    if left_out:
        warnings.warn(
            f"weights in other files are not edited and were left out: {', '.join(left_out[:5])}",
            stacklevel=3,
        )


def names_in(base: Checkpoint, mask: Mask) -> dict[str, str]:
    """Return the name that a checkpoint has for each tensor of a mask, where it has one.

    Names are taken as they are, then without the parts of wrappers. Or all of them without one
    common prefix, or with one more or another, if only one prefix fits; then a warning names it.

    Args:
        base: the checkpoint.
        mask: of a vector.

    Raises:
        TalosValueError: the checkpoint lacks a tensor with a selected entry or has another shape of
            it, several prefixes fit, or two names are one.
    """
    touched = {name: shape for name, shape in mask.shapes.items() if mask.indices[name].nnz}
    found = resolve_names(mask.names, base)
    if not touched.keys() <= found.keys():
        pairs = match_prefixes(touched, base.shapes)
        if len(pairs) > 1:
            listed = "; ".join(f"{old!r} by {new!r}" for old, new in pairs[:5])
            raise TalosValueError(
                "task vector must have the names of base, got names that fit several: replace "
                f"{listed}; choose with rename"
            )
        if not pairs:
            _refuse_lacking([name for name in touched if name not in found], base)
        [(old, new)] = pairs
        how = f"{old!r} replaced by {new!r}" if new else f"{old!r} left out"
        how = how if old else f"{new!r} put before"
        warnings.warn(f"names of the task vector were matched with {how}", stacklevel=4)
        others = {name: new + name[len(old) :] for name in mask.names if name.startswith(old)}
        found = {name: own for name, own in others.items() if own in base}
    for name, shape in touched.items():
        if base.shapes[found[name]] != shape:
            raise TalosValueError(
                f"task vector must have the shapes of base, got {shape} for {name}, which is "
                f"{base.shapes[found[name]]} in base"
            )
    for own, count in Counter(found.values()).items():
        if count > 1:
            raise TalosValueError(
                f"task vector must name {own} of base once, got {count} names of it; drop one"
            )
    return found


def copies_in(base: Checkpoint, edited: Sequence[str], covered: Set[str]) -> dict[str, str]:
    """Return the edited tensor of each copy that the vector does not cover.

    A vector names a tied weight once, but some checkpoints hold it twice. transformers does not tie
    two tensors that differ.
    """
    beginnings: dict[Hashable, str] = {}
    for own in edited:
        if len(base.shapes[own]) > 1:  # biases and norms are often equal
            beginnings.setdefault(_beginning(base, own), own)
    kinds = {(base.shapes[own], base.dtypes[own]) for own in edited}
    found = {}
    for name, shape in base.shapes.items():
        if name in covered or len(shape) < 2 or (shape, base.dtypes[name]) not in kinds:
            continue
        source = beginnings.get(_beginning(base, name))
        if source is not None and equal_bits(base[source], base[name]) and base[name].any():
            found[name] = source
    return found


def warn_of_copies(copies: Mapping[str, str], stacklevel: int) -> None:
    """Warn that copies were edited, too."""
    for copy, own in copies.items():
        warnings.warn(
            f"{copy} of the base is a copy of {own}, as of tied weights, and was edited as it is",
            stacklevel=stacklevel,
        )


def _beginning(base: Checkpoint, name: str) -> Hashable:
    """Return what two copies of one tensor have in common, without reading all of it."""
    row = base.first_row(name).reshape(-1).view(torch.uint8)
    return base.shapes[name], base.dtypes[name], row.numpy().tobytes()


def _refuse_lacking(lacking: list[str], base: Checkpoint) -> None:
    raise TalosValueError(
        f"task vector must name tensors of base, got {len(lacking)} that it lacks: "
        + listed(lacking, base)
        + "; if base calls them otherwise, use rename; parts of a fused weight cannot be exported "
        "into it"
    )


def base_of(tensor: Tensor, wanted: str) -> str:
    """Return a tensor's fingerprint; in float32 where that is the wanted one: it loses nothing."""
    found = fingerprint(tensor)
    if found != wanted and tensor.element_size() == 2 and fingerprint(tensor.float()) == wanted:
        return wanted
    return found
