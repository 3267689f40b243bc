"""Weighted sums of sparse deltas with different masks, one tensor at a time.

    values[rank(j)] = sum over terms of scale * values_term[rank_term(j)]     (float32)

over the union of the masks. Nothing is made dense: a term's ranks in the union are looked up in
the compressed index, so that the peak memory is the result and one tensor's positions.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from talos.errors import TalosValueError
from talos.masks import Mask
from talos_kernels import TensorIndex

__all__ = ["is_sum", "joined", "same_order", "slices_of", "sources", "spread", "weighted_sum"]

Term = tuple[float, Mask, Tensor]


def slices_of(mask: Mask) -> dict[str, slice]:
    """Return each tensor's range in an array in the mask's rank order."""
    slices, end = {}, 0
    for name, index in mask.indices.items():
        slices[name] = slice(end, end + index.nnz)
        end += index.nnz
    return slices


def joined(parts: list[Tensor]) -> Tensor:
    """Return one flat tensor; `parts` is emptied meanwhile, so that memory holds one part twice.

    Raises:
        TalosValueError: the dtypes differ.
    """
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


def same_order(mask: Mask, other: Mask) -> bool:
    """Return whether an array in rank order means the same for both masks."""
    return mask is other or (mask.names == other.names and mask == other)


def weighted_sum(terms: Sequence[Term]) -> tuple[Mask, Tensor]:
    """Return the union of masks and the sum of the scaled values over it.

    Args:
        terms: scale, mask and values (`[nnz]`, any floating dtype) of each, at least one.

    Returns:
        The union, which is the first mask itself where all are equal; float32 `[nnz]`. An entry
        that a term does not select counts as zero.

    Raises:
        TalosValueError: the masks differ in the shape of a tensor.
    """
    masks = [mask for _, mask, _ in terms]
    equal = all(same_order(masks[0], mask) for mask in masks[1:])
    union = masks[0] if equal else reduce(or_, masks)
    total = torch.zeros(union.nnz, dtype=torch.float32, device="cpu")
    for scale, mask, values in terms:
        _add_(total, union, scale, mask, values)
    return union, total


def spread(mask: Mask, values: Tensor, union: Mask) -> Tensor:
    """Return values in the rank order of a mask that contains theirs: float32, zero elsewhere."""
    total = torch.zeros(union.nnz, dtype=torch.float32, device="cpu")
    _add_(total, union, 1.0, mask, values)
    return total


def _add_(total: Tensor, union: Mask, scale: float, mask: Mask, values: Tensor) -> None:
    ranges, own_ranges = slices_of(union), slices_of(mask)
    for name, own in mask.indices.items():
        index = union.indices[name]
        target, part = total[ranges[name]], values[own_ranges[name]].float() * scale
        if own is index or own == index:
            target += part
        else:
            target[_ranks(index, own)] += part


def _ranks(union: TensorIndex, own: TensorIndex) -> Tensor:
    """Return the ranks in `union` of the entries of `own`, which it contains: int64 `[own.nnz]`."""
    if union.encoding == "bitmap":  # faster than looking up each position
        return own.decode()[union.decode()].nonzero()[:, 0]
    return union.rank(own.positions_int64())


def sources(terms: Sequence[tuple[float, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return the sources of a sum, each once with its scale; sums of sums are opened.

    Args:
        terms: scale and metadata of each vector.

    Returns:
        One dictionary per source: `scale`, and its metadata as `of`.

    Example:
        >>> sources([(2.0, {"sum": [{"scale": 0.5, "of": {"task": "a"}}]}), (1.0, {"task": "a"})])
        [{'scale': 2.0, 'of': {'task': 'a'}}]
    """
    found: list[dict[str, Any]] = []
    for scale, metadata in terms:
        parts: list[dict[str, Any]]
        parts = metadata["sum"] if is_sum(metadata) else [{"scale": 1.0, "of": metadata}]
        for part in parts:
            known = next((source for source in found if source["of"] == part["of"]), None)
            if known is None:
                found.append({"scale": scale * part["scale"], "of": part["of"]})
            else:
                known["scale"] += scale * part["scale"]
    return found


def is_sum(metadata: Mapping[str, Any]) -> bool:
    """Return whether metadata is that of a sum of vectors."""
    parts = metadata.get("sum")
    return isinstance(parts, list) and all(
        isinstance(part, dict) and set(part) == {"scale", "of"} and isinstance(part["scale"], float)
        for part in parts
    )
