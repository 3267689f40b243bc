"""Sums and merges of sparse deltas with different masks, one tensor at a time.

    values[rank(j)] = sum over terms of scale * values_term[rank_term(j)]     (float32)

over the union of the masks. Beside the vectors and the result, memory holds what concerns one
tensor: the values of all vectors there, and one dense tensor of its size, in which the entries of
different masks meet. The ops that apply deltas walk the compressed selections.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from operator import or_
from typing import Any

import torch
from torch import Tensor

from talos.errors import TalosValueError
from talos.masks import Mask
from talos.tensors import trim_heap, true_places
from talos_kernels import Index, TensorIndex, add_delta_, gather_grad_, scatter_

__all__ = [
    "Overlay",
    "Part",
    "gathered",
    "is_merge",
    "is_sum",
    "joined",
    "origins",
    "overlays",
    "shapes_of",
    "slices_of",
    "sources",
    "spread",
    "weighted_sum",
]

Term = tuple[float, Mask, Tensor]
Shape = tuple[int, ...]


def slices_of(mask: Mask) -> dict[str, slice]:
    """Return each tensor's range in an array in the mask's rank order."""
    slices, end = {}, 0
    for name, index in mask.indices.items():
        slices[name] = slice(end, end + index.nnz)
        end += index.nnz
    return slices


@dataclass(frozen=True)
class Part:
    """What one vector holds of one tensor, or some of it.

    Attributes:
        index: the entries that the vector selects.
        values: `[kept]` of any floating dtype, in rank order.
        kept: int64 `[kept]`, ascending: the ranks in `index` of the entries that take part; None:
            all of them.
    """

    index: TensorIndex
    values: Tensor
    kept: Tensor | None = None

    def where(self, chosen: Tensor) -> "Part":
        """Return the part without the entries where `chosen` (bool `[kept]`) is False."""
        places = true_places(chosen)
        if len(places) == len(self.values):
            return self
        kept = places if self.kept is None else self.kept[places]
        return Part(self.index, self.values[places], kept)

    def spread(self, of: Callable[[Tensor], Tensor] = Tensor.float) -> Tensor:
        """Return a function of the values, 0 where an entry does not take part: float32 `[nnz]`."""
        values = of(self.values).float()
        if self.kept is None:
            return values
        spread = torch.zeros(self.index.nnz, dtype=torch.float32, device="cpu")
        spread[self.kept] = values
        return spread

    def positions(self) -> Tensor:
        """Return the flat positions of the entries: int64 `[kept]`, ascending."""
        bitmap = self.index.encoding == "bitmap"
        own = true_places(self.index.decode()) if bitmap else self.index.positions_int64()
        return own if self.kept is None else own[self.kept]


class Overlay:
    """The parts of one tensor, laid over the union of their entries.

    Args:
        parts: one of each vector, at least one, of tensors of one size.

    Attributes:
        index: the union.
        parts: as given.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        filled = [part for part in parts if len(part.values)]
        first = (filled or parts)[0]
        self._aligned = all(
            part.kept is None and _equal(part.index, first.index) for part in filled
        )
        if self._aligned:
            self.index = first.index if filled or not first.index.nnz else _none(first.index.numel)
        elif all(part.kept is None for part in filled):
            self.index = reduce(or_, [part.index for part in filled])
        else:
            counts = torch.zeros(first.index.numel, dtype=torch.float32, device="cpu")
            for part in filled:
                add_delta_([counts], Index.pack([part.index]), part.spread(torch.ones_like))
            self.index = TensorIndex.encode(counts > 0)

    def total(self) -> Tensor:
        """Return the sum: float32 `[union]`, added in the order of the parts."""
        size = self.index.nnz if self._aligned else self.index.numel
        total = torch.zeros(size, dtype=torch.float32, device="cpu")
        for part in self.parts:
            if len(part.values) and self._aligned:
                total += part.values
            elif len(part.values):
                add_delta_([total], Index.pack([part.index]), part.spread())
        if self._aligned:
            return total
        values = torch.zeros(self.index.nnz, dtype=torch.float32, device="cpu")
        gather_grad_(values, [total], Index.pack([self.index]))
        return values

    def rows(self) -> Tensor:
        """Return the values, zero where a part has none: float32 `[parts, union]`."""
        rows = torch.zeros(len(self.parts), self.index.nnz, dtype=torch.float32, device="cpu")
        size = 0 if self._aligned else self.index.numel
        dense = torch.zeros(size, dtype=torch.float32, device="cpu")
        union = Index.pack([self.index])
        for row, part in zip(rows, self.parts, strict=True):
            if len(part.values) and self._aligned:
                row.copy_(part.values)
            elif len(part.values):
                scatter_([dense.zero_()], Index.pack([part.index]), part.spread())
                gather_grad_(row, [dense], union)
        return rows

    def wanted(self, chosen: Tensor) -> TensorIndex:
        """Return the union without the entries where `chosen` (bool `[union]`) is False."""
        whole = Part(self.index, chosen)
        positions = whole.where(chosen).positions()
        return TensorIndex.from_positions(positions, self.index.numel)


def overlays(
    masks: Sequence[Mask], part_of: Callable[[int, str], Part]
) -> Iterator[tuple[str, Overlay]]:
    """Yield each tensor that any mask covers, with the parts that the masks' vectors have of it.

    Args:
        masks: at least one.
        part_of: returns the part of the vector of a number and of a tensor that its mask covers.

    Raises:
        TalosValueError: the masks differ in the shape of a tensor.
    """
    for name, shape in shapes_of(masks).items():
        empty = Part(_none(prod(shape)), torch.zeros(0, dtype=torch.float32, device="cpu"))
        parts = [part_of(i, name) if name in mask else empty for i, mask in enumerate(masks)]
        yield name, Overlay(parts)


def shapes_of(masks: Sequence[Mask]) -> dict[str, Shape]:
    """Return the shapes of the tensors that any mask covers, in order of first appearance.

    Raises:
        TalosValueError: the masks differ in the shape of a tensor.
    """
    shapes: dict[str, Shape] = {}
    for mask in masks:
        for name, shape in mask.shapes.items():
            if shapes.setdefault(name, shape) != shape:
                raise TalosValueError(
                    f"masks must agree on the shape of {name}, got {shapes[name]} and {shape}"
                )
    return shapes


def gathered(
    masks: Sequence[Mask], found: Iterable[tuple[str, TensorIndex, Tensor]]
) -> tuple[Mask, Tensor]:
    """Return one mask and its values from those of each tensor.

    Args:
        masks: those of the vectors; the first is returned itself if it selects the same.
        found: name, entries and float32 values of each tensor that any of them covers.

    Returns:
        The mask, and float32 `[nnz]` in its rank order.
    """
    indices: dict[str, TensorIndex] = {}
    parts = []
    for name, index, values in found:
        indices[name] = index
        parts.append(values)
    shapes, first = shapes_of(masks), masks[0]
    same = first.names == tuple(shapes) and all(
        index is first.indices[name] for name, index in indices.items()
    )
    return first if same else Mask(shapes, indices), joined(parts)


def joined(parts: list[Tensor]) -> Tensor:
    """Return one flat tensor; `parts` is emptied meanwhile, so that memory holds one part twice."""
    dtypes = {part.dtype for part in parts if part.numel()}
    if len(dtypes) > 1:
        raise TalosValueError("values must share one dtype")
    end = sum(part.numel() for part in parts)
    values = torch.empty(end, dtype=dtypes.pop() if dtypes else torch.float32, device="cpu")
    while parts:
        part = parts.pop()
        values[end - part.numel() : end] = part
        end -= part.numel()
        del part
        trim_heap()
    return values


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
    ranges = [slices_of(mask) for mask in masks]

    def part_of(i: int, name: str) -> Part:
        scale, mask, values = terms[i]
        return Part(mask.indices[name], values[ranges[i][name]].float() * scale)

    laid = overlays(masks, part_of)
    return gathered(masks, ((name, each.index, each.total()) for name, each in laid))


def spread(mask: Mask, values: Tensor, union: Mask) -> Tensor:
    """Return values in the rank order of a mask that contains theirs: float32, zero elsewhere."""
    ranges = slices_of(mask)

    def part_of(i: int, name: str) -> Part:
        if i == 0:
            index = union.indices[name]
            return Part(index, torch.zeros(index.nnz, dtype=torch.float32, device="cpu"))
        return Part(mask.indices[name], values[ranges[name]])

    laid = overlays([union, mask], part_of)
    return gathered([union], ((name, each.index, each.rows()[1]) for name, each in laid))[1]


def _equal(index: TensorIndex, other: TensorIndex) -> bool:
    return index is other or index == other


def _none(numel: int) -> TensorIndex:
    """Return the index of a tensor without a selected entry."""
    return TensorIndex.from_positions(torch.zeros(0, dtype=torch.int64, device="cpu"), numel)


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


def is_merge(metadata: Mapping[str, Any]) -> bool:
    """Return whether metadata is that of a merge that is no plain sum: with `sources`."""
    parts = metadata.get("sources")
    return isinstance(parts, list) and all(
        isinstance(part, dict)
        and set(part) == {"scale", "kept", "of"}
        and isinstance(part["kept"], int)
        for part in parts
    )


def origins(metadata: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the metadata of the trained vectors behind a vector: through sums, merges and trims.

    Example:
        >>> merged = {"sources": [{"scale": 1.0, "kept": 2, "of": {"sum": []}}]}
        >>> origins(merged), origins({"method": "talos"})
        ([], [{'method': 'talos'}])
    """
    if is_sum(metadata) or is_merge(metadata):
        parts = metadata["sum" if is_sum(metadata) else "sources"]
        named = [part["of"] for part in parts if isinstance(part["of"], dict)]
        return [origin for each in named for origin in origins(each)]
    inner = metadata.get("of")
    return origins(inner) if isinstance(inner, dict) else [metadata]
