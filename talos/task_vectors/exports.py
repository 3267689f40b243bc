"""A base checkpoint with a task vector on it, as another checkpoint."""

import os
import warnings
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from talos.errors import TalosTypeError, TalosValueError
from talos.files import Checkpoint, OnTensor, write_changed
from talos.masks import Mask
from talos.names import match_prefixes, resolve_names, with_nearest
from talos.task_vectors.editing import EDITABLE, Launch, check_base
from talos.task_vectors.fingerprints import fingerprint
from talos.task_vectors.sums import slices_of
from talos_kernels import Index

__all__ = ["export_checkpoint", "names_in"]


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
) -> None:
    """Write base + scale * vector; see `TaskVector.export`."""
    touched = {name: shape for name, shape in mask.shapes.items() if mask.indices[name].nnz}
    names = names_in(base, touched)
    for own in names.values():
        if base.dtypes[own] not in EDITABLE:
            raise TalosTypeError(
                "base must have weights of floating point where it is edited, got "
                f"{own} of {base.dtypes[own]}; take a checkpoint that is not quantised"
            )
    slices, sources = slices_of(mask), {own: name for name, own in names.items()}

    def change_(own: str, tensor: Tensor) -> None:
        if own not in sources:
            return
        name = sources[own]
        if name in fingerprints:
            check_base({name: _base_of(tensor, fingerprints[name])}, fingerprints, "base")
        index = Index.pack([mask.indices[name]])
        launch = Launch([name], [tensor], index, values[slices[name]], tensor.dtype)
        launch.check(scale, largest)
        launch.put_on(scale)

    left_out = write_changed(base, out, change_, overwrite=overwrite, on_tensor=on_tensor)
    if left_out:
        warnings.warn(
            f"weights in other files are not edited and were left out: {', '.join(left_out[:5])}",
            stacklevel=3,
        )


def names_in(base: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return the name that a checkpoint has for each tensor of a vector.

    Names are taken as they are, then without the parts of wrappers. Or all of them without one
    common prefix, or with one more or another, if only one prefix fits; then a warning names it.

    Args:
        base: the checkpoint.
        shapes: of the tensors that the vector changes.

    Raises:
        TalosValueError: the checkpoint lacks a tensor, has another shape of it, or several prefixes
            fit.
    """
    found = resolve_names(shapes, base)
    if len(found) < len(shapes):
        pairs = match_prefixes(shapes, base.shapes)
        if len(pairs) > 1:
            listed = "; ".join(f"{old!r} by {new!r}" for old, new in pairs[:5])
            raise TalosValueError(
                "task vector must have the names of base, got names that fit several: replace "
                f"{listed}; choose with rename"
            )
        if not pairs:
            _refuse_lacking([name for name in shapes if name not in found], base)
        [(old, new)] = pairs
        how = f"{old!r} replaced by {new!r}" if new else f"{old!r} left out"
        how = how if old else f"{new!r} put before"
        warnings.warn(f"names of the task vector were matched with {how}", stacklevel=4)
        found = {name: new + name[len(old) :] for name in shapes}
    for name, shape in shapes.items():
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


def _refuse_lacking(lacking: list[str], base: Checkpoint) -> None:
    raise TalosValueError(
        f"task vector must name tensors of base, got {len(lacking)} that it lacks: "
        + "; ".join(with_nearest(name, base) for name in lacking[:5])
        + "; if base calls them otherwise, use rename; parts of a fused weight cannot be exported "
        "into it"
    )


def _base_of(tensor: Tensor, wanted: str) -> str:
    """Return a tensor's fingerprint; in float32 where that is the wanted one: it loses nothing."""
    found = fingerprint(tensor)
    if found != wanted and tensor.element_size() == 2 and fingerprint(tensor.float()) == wanted:
        return wanted
    return found
