"""A mask: which entries of named tensors are trained, compressed on the CPU.

`Mask.from_scores` takes the round(density * N) entries with the lowest scores of all N. Equal
scores are taken in (tensor, position) order, so that a mask depends on no device and no sort. Set
algebra works on the compressed form (`talos_kernels.tensor_index`), one tensor at a time.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from talos.architecture.layers import kind_of, layer_of
from talos.distributed import local, whole
from talos.errors import TalosTypeError, TalosValueError
from talos.files import check_entries, load_file, save_file
from talos.masks.disjoint import check_shapes, deal, draft
from talos.masks.lowest import lowest_entries, marked_scores, warn_if_equal
from talos.masks.table import MaskTable, MaskTableRow
from talos.names import renamed
from talos.options import fraction, integer
from talos_kernels import Index, TensorIndex

__all__ = ["Mask"]

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Mask:
    """A selection of entries of named tensors.

    Attributes:
        shapes: shape of every tensor that the mask covers, in order; some may have no selected
            entry.
        indices: the selected entries of each tensor, compressed.
        metadata: how the mask was made (method, seed, target, samples, ...), JSON-able.

    Example:
        >>> mask = Mask.from_dense({"q.weight": torch.eye(2) > 0, "q.bias": torch.zeros(2) > 0})
        >>> mask.nnz, round(mask.density, 2), mask.to_dense("q.weight").tolist()
        (2, 0.33, [[True, False], [False, True]])
    """

    shapes: dict[str, Shape]
    indices: dict[str, TensorIndex]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse shapes and indices that do not belong together."""
        if list(self.shapes) != list(self.indices):
            raise TalosValueError("shapes and indices must name the same tensors in the same order")
        for name, shape in self.shapes.items():
            if prod(shape) != self.indices[name].numel:
                raise TalosValueError(
                    f"shapes[{name!r}] must have {self.indices[name].numel} entries, got {shape}"
                )

    @classmethod
    def from_scores(
        cls,
        scores: Mapping[str, Tensor],
        density: float,
        select: Literal["lowest", "highest"] = "lowest",
        *,
        rows: Mapping[str, tuple[int, int]] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Self:
        """Select exactly `round(density * N)` entries by score, over all tensors at once.

        Args:
            scores: non-negative and finite, of any shape; N is their number of entries. Of sharded
                ones (DTensor) all ranks get the mask of the whole, and must call this.
            density: fraction to select, in (0, 1].
            select: `lowest` (TaLoS) or `highest`.
            rows: the rows `[first, last)` of dimension 0 that may be selected, of tensors of which
                only a part may (a fused QKV); N counts only those. None: the `rows` of the scores
                if `fisher_diag` returned them, else every row.
            metadata: how the scores were made; kept in the mask.

        Raises:
            TalosTypeError: the scores are no mapping, or no floating-point tensors.
            TalosValueError: `density` is out of range or selects nothing; a score is NaN, infinite
                or negative; `rows` does not fit.

        Example:
            >>> scores = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 0.0])}
            >>> Mask.from_scores(scores, density=0.5).to_dense("b")
            tensor([False,  True])
        """
        density = fraction("density", density)
        if select not in ("lowest", "highest"):
            raise TalosValueError(f"select must be 'lowest' or 'highest', got {select!r}")
        last = torch.inf if select == "lowest" else -torch.inf
        marked, entries = marked_scores(scores, rows, last)
        nnz = round(density * entries)
        if nnz == 0:
            raise TalosValueError(
                f"density must select at least one of {entries} entries, got {density}: "
                "no weight selected"
            )
        warn_if_equal(marked, nnz, entries)
        chosen = lowest_entries(marked, nnz, largest=select == "highest")
        made = {"density": density, "select": select, **(metadata or {})}
        return cls.from_dense(chosen, metadata=made)

    @classmethod
    def from_dense(
        cls, dense: Mapping[str, Tensor], *, metadata: Mapping[str, Any] | None = None
    ) -> Self:
        """Compress dense selections.

        Args:
            dense: tensors of the weights' shapes, bool or exactly 0 and 1. Of sharded ones
                (DTensor) all ranks get the whole mask, and must call this.
            metadata: how the mask was made; kept in it.

        Raises:
            TalosValueError: a tensor is neither bool nor exactly 0 and 1.
        """
        indices = {
            name: TensorIndex.encode(_as_bool(name, whole(local(each), each)))
            for name, each in dense.items()
        }
        shapes = {name: tuple(tensor.shape) for name, tensor in dense.items()}
        return cls(shapes, indices, dict(metadata or {}))

    @classmethod
    def from_indices(
        cls,
        positions: Mapping[str, Tensor],
        shapes: Mapping[str, Sequence[int]],
        *,
        metadata: Mapping[str, Any] | None = None,
    ) -> Self:
        """Compress flat positions.

        Args:
            positions: integer `[nnz]` of each tensor, strictly ascending, row-major.
            shapes: shape of each tensor.
            metadata: how the mask was made; kept in it.

        Raises:
            TalosValueError: the names differ, or positions are out of range, repeated or unsorted.

        Example:
            >>> Mask.from_indices({"w": torch.tensor([0, 3])}, {"w": (2, 2)}).nnz
            2
        """
        if set(positions) != set(shapes):
            raise TalosValueError(
                f"positions and shapes must name the same tensors, differ in "
                f"{sorted(set(positions) ^ set(shapes))}"
            )
        indices = {}
        for name, shape in shapes.items():
            try:
                indices[name] = TensorIndex.from_positions(positions[name], prod(shape))
            except TalosValueError as error:
                raise TalosValueError(f"{name}: {error}") from None
        return cls(
            {name: tuple(shape) for name, shape in shapes.items()}, indices, dict(metadata or {})
        )

    @classmethod
    def disjoint(
        cls,
        tasks: Mapping[str, "Mask"] | Mapping[str, Mapping[str, Tensor]],
        density: float | None = None,
        *,
        turn: int | None = None,
    ) -> dict[str, Self]:
        """Select entries for several tasks so that no entry belongs to two of them.

        Vectors that are trained on such masks never write to the same entry when they are added.
        From scores the tasks take turns: each takes its lowest-scored entries that are still free.
        From masks what several select is dealt to them by turns, in (tensor, position) order; an
        entry that one task selects stays with it.

        Args:
            tasks: by task the scores, as `from_scores` takes them with their `rows`, or the mask.
            density: with scores: the share of its entries that each task gets, in (0, 1].
            turn: with scores: how many entries a task takes at its turn. 1 is the plain round
                robin, for small models; None: a 1024th of the smallest budget, at least 1.

        Returns:
            A mask of each task.

        Raises:
            TalosTypeError: there is no task, some have scores and some masks, or scores are no
                mapping of floating-point tensors.
            TalosValueError: the tasks together want more entries than one of them scores, `density`
                is missing with scores or given with masks, or shapes of a tensor differ.

        Example:
            >>> scores = {"a": {"w": torch.arange(4.0)}, "b": {"w": torch.arange(4.0)}}
            >>> masks = Mask.disjoint(scores, density=0.5)
            >>> masks["a"].to_dense("w"), masks["b"].to_dense("w")
            (tensor([ True, False,  True, False]), tensor([False,  True, False,  True]))
        """
        if not isinstance(tasks, Mapping):
            raise TalosTypeError(
                f"tasks must map names to scores or masks, got {type(tasks).__name__}"
            )
        masks = {task: each for task, each in tasks.items() if isinstance(each, Mask)}
        if not tasks or 0 < len(masks) < len(tasks):
            raise TalosTypeError(
                "tasks must hold scores of each task, or a mask of each, got "
                f"{len(masks)} masks of {len(tasks)} tasks"
            )
        shapes: dict[str, dict[str, Shape]]
        if masks:
            if density is not None or turn is not None:
                raise TalosValueError("density and turn must be left out with masks, got one")
            shapes = {task: each.shapes for task, each in masks.items()}
            check_shapes(shapes)
            found = deal({task: each.indices for task, each in masks.items()})
        else:
            share = fraction("density", density)
            turn = turn if turn is None else integer("turn", turn, 1)
            marked = {
                task: marked_scores(each, None, torch.inf)
                for task, each in tasks.items()
                if not isinstance(each, Mask)
            }
            shapes = {
                task: {name: tuple(score.shape) for name, score in own.items()}
                for task, (own, _) in marked.items()
            }
            check_shapes(shapes)
            found = draft(marked, share, turn)
        made = {"disjoint": list(tasks)} | ({} if masks else {"density": share, "select": "lowest"})
        return {
            task: cls(dict(shapes[task]), indices, {**made, "task": task})
            for task, indices in found.items()
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Tensors that the mask covers, in order."""
        return tuple(self.shapes)

    @property
    def nnz(self) -> int:
        """Number of selected entries."""
        return sum(index.nnz for index in self.indices.values())

    @property
    def numel(self) -> int:
        """Number of entries of all tensors that the mask covers."""
        return sum(index.numel for index in self.indices.values())

    @property
    def density(self) -> float:
        """Fraction selected of the entries that the mask covers."""
        return self.nnz / self.numel if self.numel else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the compressed selection."""
        return sum(index.nbytes for index in self.indices.values())

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits, the same only for equal masks."""
        digest = hashlib.sha256()
        for name, index in sorted(self.indices.items()):  # the order of tensors does not count
            digest.update(f"{name}|{self.shapes[name]}|{index.encoding}|".encode())
            for buffer in (index.words, index.positions):
                digest.update(buffer.view(torch.uint8).numpy().tobytes())
            digest.update(index.starts.numpy().tobytes())
        return digest.hexdigest()[:16]

    def to_dense(self, name: str) -> Tensor:
        """Return the selection of one tensor: bool, in its shape.

        Raises:
            TalosValueError: the mask does not cover `name`.
        """
        if name not in self.indices:
            raise TalosValueError(f"name must be a tensor of the mask, got {name!r}")
        return self.indices[name].decode().view(self.shapes[name])

    def pack(self, names: Sequence[str], device: torch.device | str = "cpu") -> Index:
        """Return the compressed index of these tensors for one kernel launch."""
        return Index.pack([self.indices[name] for name in names], device)

    def describe(self, *, layers: bool = False) -> MaskTable:
        """Return a table of the mask, with one row a kind of weights; `print` it.

        Args:
            layers: print a row for each layer and kind.

        Example:
            >>> print(Mask.from_dense({"h.0.q.weight": torch.eye(2) > 0}).describe())
            type   tensors  entries  selected  density  encoding  bytes
            query        1        4         2    0.500  bitmap      272
            total        1        4         2    0.500  bitmap      272
        """
        rows = [
            MaskTableRow(
                name,
                layer_of(name),
                kind_of(name),
                index.numel,
                index.nnz,
                index.encoding,
                index.nbytes,
            )
            for name, index in self.indices.items()
        ]
        return MaskTable(tuple(rows), layers)

    def rename(self, names: Mapping[str, str]) -> Self:
        r"""Return the same mask under other names, for a model that calls its weights otherwise.

        Args:
            names: new names by old ones, as of `TaskVector.rename`.

        Raises:
            TalosTypeError: `names` is no mapping of texts.
            TalosValueError: a key fits no name, is no regular expression, or two tensors would have
                one name.

        Example:
            >>> mask = Mask.from_dense({"h.0.q": torch.ones(1) > 0})
            >>> mask.rename({r"^(.*q)$": r"base_model.model.\1.base_layer"}).names
            ('base_model.model.h.0.q.base_layer',)
        """
        found = renamed(self.names, names)
        return type(self)(
            {found[name]: shape for name, shape in self.shapes.items()},
            {found[name]: index for name, index in self.indices.items()},
            self.metadata,
        )

    def iou(self, other: Self) -> float:
        """Return the intersection over union of two selections; 1 for equal masks."""
        self._check_shapes(other)
        both = sum(
            index.intersection_nnz(other.indices[name])
            for name, index in self.indices.items()
            if name in other.indices
        )
        either = self.nnz + other.nnz - both
        return both / either if either else 1.0

    def __and__(self, other: Self) -> Self:
        """Return the entries that both select, over the tensors that both cover."""
        self._check_shapes(other)
        names = [name for name in self.shapes if name in other.shapes]
        return type(self)(
            {name: self.shapes[name] for name in names},
            {name: self.indices[name] & other.indices[name] for name in names},
        )

    def __or__(self, other: Self) -> Self:
        """Return the entries that either selects, over the tensors that either covers."""
        self._check_shapes(other)
        indices = dict(self.indices)
        for name, index in other.indices.items():
            indices[name] = indices[name] | index if name in indices else index
        return type(self)({**self.shapes, **other.shapes}, indices)

    def __eq__(self, other: object) -> bool:
        """Return whether both cover the same tensors and select the same entries."""
        if not isinstance(other, Mask):
            return NotImplemented
        return self.shapes == other.shapes and all(
            index == other.indices[name] for name, index in self.indices.items()
        )

    def __hash__(self) -> int:
        """Return a hash of the selection."""
        return hash(self.fingerprint)

    def __contains__(self, name: object) -> bool:
        """Return whether the mask covers a tensor of this name."""
        return name in self.shapes

    def __repr__(self) -> str:
        return f"Mask({self.nnz:,} of {self.numel:,} entries in {len(self.shapes)} tensors)"

    def to_buffers(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Return what a file holds of the selection.

        Returns:
            Buffers, `<name>.words` or `<name>.positions` and `<name>.counts`; and one JSON-able
            entry a tensor: name, shape, encoding, nnz.
        """
        buffers: dict[str, Tensor] = {}
        entries = []
        for name, index in self.indices.items():
            if index.encoding == "bitmap":
                buffers[f"{name}.words"] = index.words
            elif index.encoding == "u16" and index.nnz:
                buffers[f"{name}.positions"] = index.positions
                buffers[f"{name}.counts"] = index.counts
            entries.append(
                {
                    "name": name,
                    "shape": list(self.shapes[name]),
                    "encoding": index.encoding,
                    "nnz": index.nnz,
                }
            )
        return buffers, entries

    @classmethod
    def from_buffers(
        cls, buffers: Mapping[str, Tensor], entries: Sequence[Mapping[str, Any]]
    ) -> Self:
        """Rebuild a mask from what `to_buffers` returned, and check all of it.

        Raises:
            TalosValueError: a buffer is missing or does not fit, a name comes twice, or the number
                of selected entries differs from the recorded one.
        """
        check_entries(entries)
        shapes: dict[str, Shape] = {}
        indices: dict[str, TensorIndex] = {}
        for entry in entries:
            name, shape, nnz = entry["name"], tuple(entry["shape"]), entry["nnz"]
            numel = prod(shape)
            try:
                if entry["encoding"] == "u16" and nnz == 0:
                    none = torch.zeros(0, dtype=torch.int64, device="cpu")
                    indices[name] = TensorIndex.from_positions(none, numel)
                else:
                    indices[name] = TensorIndex.from_buffers(
                        entry["encoding"],
                        numel,
                        words=buffers.get(f"{name}.words"),
                        positions=buffers.get(f"{name}.positions"),
                        counts=buffers.get(f"{name}.counts"),
                    )
            except TalosValueError as error:
                raise TalosValueError(f"{name}: {error}") from None
            if indices[name].nnz != nnz:
                raise TalosValueError(f"{name}: must select {nnz} entries, got {indices[name].nnz}")
            shapes[name] = shape
        return cls(shapes, indices)

    def save(self, path: str | Path) -> None:
        """Write the mask to a safetensors file, atomically.

        Raises:
            TalosOSError: the file cannot be written; an older one stays as it was.
        """
        buffers, entries = self.to_buffers()
        save_file(path, "mask", buffers, {"tensors": entries, "made": self.metadata})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a mask from a file, and check all of it.

        Raises:
            TalosValueError: the file is not a mask, is damaged, or is from a newer version.
            TalosOSError: it cannot be read.
        """
        buffers, content = load_file(path, "mask")
        try:
            if set(content) != {"tensors", "made"} or not isinstance(content["made"], dict):
                raise TalosValueError("its content must hold tensors and made, an object")
            mask = cls.from_buffers(buffers, content["tensors"])
            if extra := sorted(set(buffers) - set(mask.to_buffers()[0])):
                raise TalosValueError(f"it must hold only a mask, got {', '.join(extra[:5])}")
        except (TalosValueError, KeyError, TypeError) as error:
            raise TalosValueError(f"{path}: not a valid mask: {error}") from None
        return cls(mask.shapes, mask.indices, content["made"])

    def _check_shapes(self, other: Self) -> None:
        for name, shape in self.shapes.items():
            if other.shapes.get(name, shape) != shape:
                raise TalosValueError(
                    f"masks must agree on the shape of {name}, got {shape} and {other.shapes[name]}"
                )


def _as_bool(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.bool:
        return tensor
    chosen = tensor == 1
    if not bool((chosen | (tensor == 0)).all()):
        raise TalosValueError(
            f"dense[{name!r}] must be bool or exactly 0 and 1, got {tensor.dtype} with other "
            "values; compare first, e.g. `scores < threshold`"
        )
    return chosen
