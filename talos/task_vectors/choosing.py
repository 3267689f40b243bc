"""Some entries of a task vector: those of largest magnitude, or those that a mask selects."""

from collections.abc import Callable, Collection, Mapping

from torch import Tensor

from talos.errors import TalosValueError
from talos.masks import Mask
from talos.options import fraction
from talos.task_vectors.sums import Part, joined, shapes_of, slices_of
from talos_kernels import TensorIndex, select_threshold

__all__ = ["Choice", "chosen", "largest", "selected"]

Choice = Callable[[str, Part], Part]
"""Maps a tensor's name and what a vector holds of it to what stays of that."""


def largest(numel: int, density: float, values: Mapping[str, Tensor]) -> Choice | None:
    """Choose the `round(density * numel)` entries of largest magnitude of one vector, exactly.

    Args:
        numel: entries of all tensors that the vector covers, selected or not.
        density: the share to keep, in (0, 1].
        values: the vector's values of each tensor, in order; equal magnitudes stay in this order.

    Returns:
        The choice; None: the vector has no more entries than that.

    Raises:
        TalosValueError: `density` is out of range, or keeps nothing.
    """
    count = round(fraction("density", density) * numel)
    have = sum(len(each) for each in values.values())
    if count >= have:
        return None
    if count == 0:
        raise TalosValueError(
            f"density must keep at least one of {numel} entries, got {density}; take a larger one"
        )
    filled = {name: each for name, each in values.items() if len(each)}
    threshold = select_threshold(
        list(filled.values()), count, largest=True, names=list(filled), magnitudes=True
    )
    numbers = {name: i for i, name in enumerate(filled)}

    def choose(name: str, part: Part) -> Part:
        return part.where(threshold.select(numbers[name], part.values.abs()))

    return choose


def selected(mask: Mask, by: Mask) -> Choice:
    """Choose the entries that another mask selects, too.

    Raises:
        TalosValueError: the masks differ in the shape of a tensor.
    """
    shapes_of([mask, by])

    def choose(name: str, part: Part) -> Part:
        return part.where(by.indices[name].decode()[part.positions()])

    return choose


def chosen(
    mask: Mask, values: Tensor, choice: Choice, names: Collection[str]
) -> tuple[Mask, Tensor]:
    """Return the mask and the values of what a choice leaves of the tensors of these names."""
    indices: dict[str, TensorIndex] = {}
    parts = [values[:0]]
    for name, where in slices_of(mask).items():
        if name in names:
            index = mask.indices[name]
            part = (
                choice(name, Part(index, values[where])) if index.nnz else Part(index, values[:0])
            )
            if part.kept is not None:
                index = TensorIndex.from_positions(part.positions(), index.numel)
            indices[name] = index
            parts.append(part.values)
    shapes = {name: mask.shapes[name] for name in indices}
    return Mask(shapes, indices), joined(parts).to(values.dtype)
