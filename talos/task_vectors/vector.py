"""The task vector: a sparse difference of weights, with the arithmetic of model edits.

    tau   = theta_tuned - theta_base                 at the entries of a mask
    theta = theta_base + scaling_coef * tau          addition; a negative coefficient forgets
    tau   = sum_t scale_t * tau_t                    over the union of the masks, in float32

Source: Ilharco et al. 2023, "Editing models with task arithmetic", arXiv 2212.04089.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite, sqrt
from numbers import Real
from typing import Any, Self

import torch
from torch import Tensor, nn

from talos.errors import TalosTypeError, TalosValueError
from talos.files import Beside, Checkpoint, OnTensor, stream_tensors
from talos.masks import Mask
from talos.masks.table import text_table
from talos.names import renamed
from talos.options import as_real, fraction
from talos.task_vectors.adapter_export import export_sparse
from talos.task_vectors.adapters import read_adapter
from talos.task_vectors.choosing import Choice, chosen, largest, selected
from talos.task_vectors.differences import Entries, difference
from talos.task_vectors.editing import ModelEdit, check_scale
from talos.task_vectors.exports import export_checkpoint
from talos.task_vectors.fingerprints import fingerprint, one_base
from talos.task_vectors.namings import Weights
from talos.task_vectors.storage import DTYPES, load_parts, save_parts
from talos.task_vectors.sums import (
    Part,
    is_sum,
    overlays,
    slices_of,
    sources,
    weighted_sum,
)
from talos.tensors import readable_size, warn_of_moved

__all__ = ["TaskVector"]


@dataclass(frozen=True, eq=False, repr=False)
class TaskVector:
    """A sparse difference of weights: what to add to a base model, and at which entries.

    A task vector is immutable; every operation returns a new one. Sums and multiples are float32,
    whatever the dtype of their terms, over the union of the masks. An entry that a vector does not
    select counts as zero.

    Attributes:
        mask: the entries.
        values: `[nnz]` float32, bfloat16 or float16, on the CPU, in the mask's rank order.
        fingerprints: of the base's tensors, by name; those without one are not verified.
        metadata: how the vector was made, JSON-able.

    Raises:
        TalosTypeError: `values` has another dtype.
        TalosValueError: `values` has another shape, lies on another device or is not finite;
            `fingerprints` names a tensor that the mask lacks.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> mask = Mask.from_dense({"weight": torch.tensor([[True, False]])})
        >>> task_a, task_b = TaskVector(mask, torch.ones(1)), TaskVector(mask, torch.ones(1))
        >>> edit = 0.5 * task_a - 2 * task_b
        >>> edit.values
        tensor([-1.5000])
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(1.0)
        >>> with edit.applied(model, scale=2.0):
        ...     print(model.weight.tolist())
        [[-2.0, 1.0]]
        >>> model.weight.tolist()
        [[1.0, 1.0]]
    """

    mask: Mask
    values: Tensor
    fingerprints: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    largest: float = field(init=False)
    """The largest magnitude of the values, 0 where there are none."""

    # NumPy's numbers, as linspace gives them, leave their product with a vector to __rmul__.
    __array_ufunc__ = None

    def __post_init__(self) -> None:
        """Refuse values that do not belong to the mask."""
        if self.values.dtype not in DTYPES:
            raise TalosTypeError(
                f"values must be float32, bfloat16 or float16, got {self.values.dtype}"
            )
        if self.values.shape != (self.mask.nnz,) or self.values.device.type != "cpu":
            raise TalosValueError(
                f"values must be of shape ({self.mask.nnz},) on the CPU, one per selected entry, "
                f"got {tuple(self.values.shape)} on {self.values.device}"
            )
        strangers = sorted(set(self.fingerprints) - set(self.mask.names))
        if strangers:
            raise TalosValueError(
                f"fingerprints must name tensors of the mask, got {', '.join(strangers[:5])}"
            )
        object.__setattr__(self, "values", self.values.detach().contiguous())
        object.__setattr__(self, "fingerprints", dict(self.fingerprints))
        object.__setattr__(self, "metadata", dict(self.metadata))
        object.__setattr__(self, "largest", _largest(self.mask, self.values))

    @classmethod
    def from_models(
        cls,
        base: Weights,
        tuned: Weights,
        mask: Entries = None,
        *,
        strict: bool = True,
        metadata: Mapping[str, Any] | None = None,
        on_tensor: OnTensor | None = None,
    ) -> Self:
        """Return the difference of two models.

        Checkpoints are read tensor by tensor: the memory in use is the result and a few tensors.
        The dtypes may differ; the difference is that of the values. Buffers of modules are left
        out. A warning and the metadata's `moved_buffers` name those that differ.

        `mask="changed"` selects the entries whose bits differ. So NaN equals the same NaN, and 0
        does not equal -0. Adding the values to the base gives the bits of the tuned weights, with
        two exceptions: float32 cannot hold some differences of weights of very unequal size, and
        no sum turns 0 into -0. The metadata's `inexact` counts these entries if there are any.

        Args:
            base: pretrained module, its state dict, or the path of a checkpoint (see
                `talos.files.Checkpoint`).
            tuned: the same after fine-tuning.
            mask: entries to keep; None: every floating-point weight, encoded `full`; "changed":
                those that differ.
            strict: refuse a change outside of the mask; False drops it.
            metadata: how the difference was made.
            on_tensor: called after each tensor with the number done and the number of all.

        Returns:
            float32 tuned minus base, with the base's fingerprints. Tied weights come once.

        Raises:
            TalosValueError: names or shapes differ, a difference is not finite, or an entry outside
                of the mask changed.
            TalosOSError: a checkpoint cannot be read.

        Example:
            >>> base, tuned = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
            >>> vector = TaskVector.from_models(base, tuned)
            >>> vector.apply_(base)
            >>> torch.allclose(base.weight, tuned.weight)
            True
        """
        found = difference(base, tuned, mask, strict=strict, on_tensor=on_tensor)
        warn_of_moved(found.moved, stacklevel=2)
        about = {
            **({"moved_buffers": found.moved} if found.moved else {}),
            **({"inexact": found.inexact} if found.inexact else {}),
        }
        return cls(found.mask, found.values, found.fingerprints, {**(metadata or {}), **about})

    @classmethod
    def from_adapter(cls, folder: str | os.PathLike[str], base: Weights) -> Self:
        """Return what a PEFT adapter adds to its base: LoRA, SHiRA or Super-Tuning.

        Trained biases and `modules_to_save` come in, too. PEFT need not be installed. Tensors are
        read one at a time.

        Args:
            folder: with `adapter_config.json` and `adapter_model.safetensors`.
            base: the model that the adapter was trained on, its state dict, or a checkpoint or its
                path, for shapes and fingerprints.

        Returns:
            float32 values. A LoRA's product takes every entry of its weights; of a sparse adapter
            the entries that are not zero come in.

        Raises:
            TalosValueError: the adapter is of another kind, has an option that changes what its
                tensors mean (DoRA, PiSSA, MoE parameters, ...), or does not fit the base.
            TalosOSError: a file cannot be read.
        """
        return cls(*read_adapter(folder, base))

    @classmethod
    def combine(cls, terms: Iterable[tuple[float, Self]]) -> Self:
        """Return the weighted sum of many task vectors over the union of their masks, in one pass.

        Args:
            terms: scale and vector of each.

        Returns:
            float32; the metadata's `sum` lists the vectors with their scales.

        Raises:
            TalosValueError: there is no term, a scale is not finite, a sum overflows, or two
                vectors belong to different bases or shapes of a tensor.

        Example:
            >>> mask = Mask.from_dense({"w": torch.ones(2) > 0})
            >>> vector = TaskVector(mask, torch.tensor([1.0, 2.0]))
            >>> TaskVector.combine([(0.5, vector), (1.0, vector)]).values
            tensor([1.5000, 3.0000])
        """
        terms = [(check_scale(scale), vector) for scale, vector in terms]
        if not terms:
            raise TalosValueError("terms must hold at least one task vector, got none")
        bases = one_base(vector.fingerprints for _, vector in terms)
        union, total = weighted_sum([(scale, v.mask, v.values) for scale, v in terms])
        return cls(
            union, total, bases, {"sum": sources([(scale, v.origin()) for scale, v in terms])}
        )

    def __add__(self, other: object) -> Self:
        """Return the sum; 0 counts as the zero vector, because `sum()` begins with it."""
        if isinstance(other, type(self)):
            return self.combine([(1.0, self), (1.0, other)])
        if isinstance(other, Real) and other == 0:
            return self
        return NotImplemented

    __radd__ = __add__

    def __sub__(self, other: object) -> Self:
        """Return the difference."""
        if isinstance(other, type(self)):
            return self.combine([(1.0, self), (-1.0, other)])
        return NotImplemented

    def __mul__(self, scale: object) -> Self:
        """Return the multiple by a real number."""
        number = as_real(scale)
        return NotImplemented if number is None else self.combine([(number, self)])

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> Self:
        """Return the multiple by the inverse of a real number, which must not be 0."""
        number = as_real(divisor)
        return NotImplemented if number is None else self.combine([(1.0 / number, self)])

    def __neg__(self) -> Self:
        """Return the multiple by -1: a vector that makes a model forget."""
        return self.combine([(-1.0, self)])

    @cached_property
    def _values_fingerprint(self) -> str:
        """The values' fingerprint; searches merge the same vectors again and again."""
        return fingerprint(self.values)

    def origin(self) -> dict[str, Any]:
        """Return what names this vector in a sum: its metadata and its values' fingerprint.

        Returns:
            The metadata with `values`, the fingerprint; the metadata alone if the vector is a sum.

        Example:
            >>> mask = Mask.from_dense({"w": torch.ones(2) > 0})
            >>> sorted(TaskVector(mask, torch.ones(2), metadata={"task": "a"}).origin())
            ['task', 'values']
        """
        if is_sum(self.metadata):
            return dict(self.metadata)
        return {**self.metadata, "values": self._values_fingerprint}

    def trim(self, density: float) -> Self:
        """Keep the entries of largest magnitude, as TIES-merging does (arXiv 2306.01708).

        Args:
            density: the share to keep, in (0, 1], of all entries of the tensors that the mask
                covers (`mask.numel`). So a sparse vector loses what its dense form would lose. One
                that has fewer entries keeps them all.

        Returns:
            The vector with at most `round(density * mask.numel)` entries; of equal magnitudes the
            first in (tensor, position) order stay. The metadata's `trimmed` is the density.

        Raises:
            TalosValueError: `density` is out of range or keeps nothing.

        Example:
            >>> mask = Mask.from_dense({"w": torch.ones(4) > 0})
            >>> vector = TaskVector(mask, torch.tensor([1.0, -3.0, 2.0, 0.0]))
            >>> vector.trim(0.5).values
            tensor([-3.,  2.])
        """
        density = fraction("density", density)
        ranges = slices_of(self.mask)
        values = {name: self.values[part] for name, part in ranges.items()}
        choice = largest(self.mask.numel, density, values)
        return self if choice is None else self._chosen(self.mask, choice, {"trimmed": density})

    def restrict(self, mask: Mask) -> Self:
        """Keep the entries that a mask selects, too.

        Args:
            mask: of any tensors; what it does not cover is dropped.

        Returns:
            The vector over the tensors that both cover.

        Raises:
            TalosValueError: the shape of a tensor differs.

        Example:
            >>> vector = TaskVector(Mask.from_dense({"w": torch.ones(2) > 0}), torch.ones(2))
            >>> len(vector.restrict(Mask.from_dense({"w": torch.eye(2)[0] > 0})))
            1
        """
        return self._chosen(mask, selected(self.mask, mask), {"restricted_to": mask.fingerprint})

    def _chosen(self, covers: Mask, choice: Choice, how: dict[str, Any]) -> Self:
        """Return the entries that a choice leaves, of the tensors that `covers` covers."""
        mask, values = chosen(self.mask, self.values, choice, covers.names)
        bases = {name: base for name, base in self.fingerprints.items() if name in mask}
        made = {"of": self.metadata} if is_sum(self.metadata) else self.metadata
        return type(self)(mask, values, bases, {**made, **how})

    def apply_(self, model: nn.Module, scale: float = 1.0, force: bool = False) -> None:
        """Add `scale` times the vector to a model's weights, in place, each tied weight once.

        Everything is checked before the first write. Edits stack: afterwards the model still counts
        as the same base. A write by any other code makes it another base.

        Args:
            model: the base, on any device, in float32, bfloat16, float16 or float64.
            scale: the scaling coefficient.
            force: edit a model whose weights have other fingerprints, too.

        Raises:
            TalosValueError: the model lacks a tensor, has other shapes or another fingerprint, or
                a finite weight would overflow.
            TalosTypeError: `model` is no module, or its weights have another dtype.

        Example:
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> mask = Mask.from_dense({"weight": torch.ones(1, 1) > 0})
            >>> before = model.weight.item()
            >>> TaskVector(mask, torch.ones(1)).apply_(model, scale=0.5)
            >>> round(model.weight.item() - before, 3)
            0.5
        """
        scale = check_scale(scale)
        edit = ModelEdit(model, self.mask, self.values, self.fingerprints, force=force)
        edit.put_on(scale, self.largest, keep=True)

    @contextmanager
    def applied(
        self, model: nn.Module, scale: float = 1.0, force: bool = False
    ) -> Iterator[nn.Module]:
        """Edit a model inside a `with` block; afterwards its weights are bit for bit as before.

        Only the old bits of the selected entries are kept. They are written back when the block
        ends, also after an exception. A write of other code to those entries inside the block is
        lost then; one to other entries stays. Blocks nest in stack order.

        Args:
            model: as for `apply_`.
            scale: the scaling coefficient.
            force: as for `apply_`.

        Yields:
            The model itself.

        Raises:
            TalosValueError: as `apply_`.
            TalosTypeError: as `apply_`.
            TalosRuntimeError: the block cast or resized the weights, so that they cannot be
                restored.

        Example:
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> mask = Mask.from_dense({"weight": torch.ones(1, 1) > 0})
            >>> before = model.weight.item()
            >>> with TaskVector(mask, torch.ones(1)).applied(model) as edited:
            ...     edited.weight.item() == before
            False
            >>> model.weight.item() == before
            True
        """
        scale = check_scale(scale)
        edit = ModelEdit(model, self.mask, self.values, self.fingerprints, force=force)
        edit.put_on(scale, self.largest, keep=False)
        try:
            yield model
        finally:
            edit.take_off()

    def save(
        self,
        path: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        *,
        overwrite: bool = True,
    ) -> None:
        """Write the vector to a safetensors file, atomically.

        Args:
            path: the file, by convention `*.safetensors`.
            dtype: of the values in the file; None: as they are. bfloat16 halves the file.
            overwrite: replace an existing file; False refuses.

        Raises:
            TalosTypeError: `dtype` is not supported, or the metadata is not JSON-able.
            TalosOSError: the file cannot be written; an older one is left as it was.

        Example:
            >>> import tempfile
            >>> vector = TaskVector(Mask.from_dense({"w": torch.ones(2) > 0}), torch.ones(2))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     vector.save(f"{folder}/a.safetensors", dtype=torch.bfloat16)
            ...     TaskVector.load(f"{folder}/a.safetensors") == vector.astype(torch.bfloat16)
            True
        """
        values = self.values if dtype is None else self.astype(dtype).values
        save_parts(path, self.mask, values, self.fingerprints, self.metadata, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a vector from a file and check all of it.

        Raises:
            TalosValueError: the file is not a task vector, is damaged, or has another version.
            TalosOSError: it cannot be read.
        """
        return cls(*load_parts(path))

    def export(
        self,
        base: str | os.PathLike[str] | Checkpoint,
        out: str | os.PathLike[str],
        scale: float = 1.0,
        force: bool = False,
        *,
        overwrite: bool = False,
        on_tensor: OnTensor | None = None,
        beside: Beside | None = None,
    ) -> None:
        """Write a checkpoint with `scale` times the vector added, for any library that reads one.

        The weights are bit for bit those of `apply_` on a model of the checkpoint's dtype. Files,
        names, order and index are the base's; the other files of a folder are copied. Weights in
        other formats are left out, with a warning. One tensor is in memory at a time. `out` appears
        whole or not at all.

        Args:
            base: the base's `.safetensors` file or folder, as `Checkpoint` takes it. Names that
                differ by one prefix are matched if only one fits, with a warning.
            out: the file or folder to write.
            scale: the scaling coefficient.
            force: edit a base whose weights have other fingerprints, too. The float32 fingerprint
                of a 16-bit weight counts as its own.
            overwrite: replace an existing file, or folder if no other file in it is lost.
            on_tensor: called after each tensor with the number done and the number of all.
            beside: writes other files into the folder, by name. Then `out` is a folder also if the
                base is a file, which is its `model.safetensors`.

        Raises:
            TalosValueError: the base lacks a tensor, has other shapes or another fingerprint; a
                finite weight would overflow; or `out` lies inside the base.
            TalosTypeError: a weight to edit is quantised.
            TalosOSError: a file cannot be read or written, or `out` exists.

        Example:
            >>> import safetensors.torch, tempfile
            >>> vector = TaskVector(Mask.from_dense({"w": torch.eye(2) > 0}), torch.ones(2))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     base, out = f"{folder}/base.safetensors", f"{folder}/out.safetensors"
            ...     safetensors.torch.save_file({"w": torch.zeros(2, 2)}, base)
            ...     vector.export(base, out, scale=0.5)
            ...     Checkpoint(out)["w"].tolist()
            [[0.5, 0.0], [0.0, 0.5]]
        """
        export_checkpoint(
            self.mask,
            self.values,
            {} if force else self.fingerprints,
            base if isinstance(base, Checkpoint) else Checkpoint(base),
            out,
            scale=check_scale(scale),
            largest=self.largest,
            overwrite=overwrite,
            on_tensor=on_tensor,
            beside=beside,
        )

    def export_dense(self, path: str | os.PathLike[str]) -> None:
        """Write the dense delta for other tools: plain safetensors, named and shaped as weights.

        One dense tensor is in memory at a time.

        Raises:
            TalosOSError: the file cannot be written; an older one is left as it was.
        """
        stream_tensors(path, self.mask.shapes, self.values.dtype, self.to_dense)

    def export_adapter(
        self,
        folder: str | os.PathLike[str],
        kind: str,
        *,
        base_model: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write a sparse vector as an adapter that PEFT 0.21 loads and merges.

        Each adapter takes the same share of every weight that it changes. So the densest weight
        decides its size, and the others get entries that change by zero.

        Args:
            folder: to make, with `adapter_config.json` and `adapter_model.safetensors`.
            kind: `shira` (r (in + out) entries a weight) or `supertuning` (one share of each).
            base_model: name or path of the base, for PEFT's `base_model_name_or_path`.
            overwrite: replace an adapter that is there.

        Raises:
            TalosValueError: `kind` is unknown; the vector changes more than weights of linear
                layers; or, for `shira`, a small weight has fewer entries than r (in + out).
            TalosOSError: the folder is there or holds other files, or cannot be written.

        Example:
            >>> import tempfile
            >>> layer = torch.nn.Sequential(torch.nn.Linear(9, 9))
            >>> mask = Mask.from_dense({"0.weight": torch.eye(9) > 0})
            >>> vector = TaskVector(mask, torch.ones(9))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     vector.export_adapter(f"{folder}/adapter", "shira")
            ...     TaskVector.from_adapter(f"{folder}/adapter", layer).allclose(vector)
            True
        """
        parts = (folder, self.mask, self.values, kind)
        export_sparse(*parts, base_model=base_model, overwrite=overwrite)

    def to_dense(self, name: str) -> Tensor:
        """Return the delta of one tensor, in its shape and the vector's dtype; zero elsewhere.

        Raises:
            TalosValueError: the mask does not cover `name`.
        """
        dense = torch.zeros(self.mask.to_dense(name).shape, dtype=self.values.dtype, device="cpu")
        index = self.mask.indices[name]
        dense.view(-1)[index.positions_int64()] = self.values[slices_of(self.mask)[name]]
        return dense

    def rename(self, names: Mapping[str, str]) -> Self:
        r"""Return the same vector under other names, for a model that calls its weights otherwise.

        Args:
            names: new names by old ones. A key that is a name of the vector renames that tensor.
                Any other key is a regular expression; it is replaced wherever a name holds it, and
                the new text may use its groups (`\1`). As in transformers' `key_mapping`, the
                first key that fits a name renames it.

        Returns:
            The vector with mask, fingerprints and the names in `moved_buffers` renamed.

        Raises:
            TalosTypeError: `names` is no mapping of texts.
            TalosValueError: a key fits no name, is no regular expression, or two tensors would have
                one name.

        Example:
            >>> vector = TaskVector(Mask.from_dense({"h.0.q": torch.ones(1) > 0}), torch.ones(1))
            >>> vector.rename({r"^h\.": "model.layers."}).mask.names
            ('model.layers.0.q',)
        """
        found = renamed(self.mask.names, names)
        metadata = dict(self.metadata)
        if isinstance(moved := metadata.get("moved_buffers"), list):
            others = renamed(moved, names, strict=False)
            metadata["moved_buffers"] = [others[name] for name in moved]
        bases = {found[name]: base for name, base in self.fingerprints.items()}
        return type(self)(self.mask.rename(names), self.values, bases, metadata)

    def astype(self, dtype: torch.dtype) -> Self:
        """Return the same vector with values of another dtype.

        Raises:
            TalosTypeError: `dtype` is not float32, bfloat16 or float16.
            TalosValueError: a value overflows in it.
        """
        if dtype not in DTYPES:
            raise TalosTypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        return type(self)(self.mask, self.values.to(dtype), self.fingerprints, self.metadata)

    def norm(self) -> float:
        """Return the Euclidean norm of the values, summed in float64."""
        return sqrt(sum(norm * norm for norm in self.norms().values()))

    def norms(self) -> dict[str, float]:
        """Return the Euclidean norm of each tensor's values, by name."""
        return {
            name: float(torch.linalg.vector_norm(self.values[part], dtype=torch.float64))
            for name, part in slices_of(self.mask).items()
        }

    def describe(self) -> str:
        """Return a table of where the vector lies: its norm and entries by type of tensor.

        Example:
            >>> mask = Mask.from_dense({"h.0.q.weight": torch.eye(2) > 0})
            >>> print(TaskVector(mask, torch.tensor([3.0, 4.0])).describe())
            type   tensors  selected  density  norm
            query        1         2    0.500     5
            total        1         2    0.500     5
        """
        table, norms = self.mask.describe(), self.norms()
        squares: dict[str, float] = {}
        for row in table.rows:
            for kind in (row.kind, "total"):
                squares[kind] = squares.get(kind, 0.0) + norms[row.name] ** 2
        header = ("type", "tensors", "selected", "density", "norm")
        lines = [
            (
                row.kind,
                f"{row.tensors:,}",
                f"{row.nnz:,}",
                f"{row.density:.3f}",
                f"{sqrt(squares.get(row.kind, 0.0)):.4g}",
            )
            for row in [*table.by_kind(), table.total()]
        ]
        return text_table([header, *lines])

    def allclose(self, other: Self, rtol: float = 1e-5, atol: float = 1e-8) -> bool:
        """Return whether |self - other| <= atol + rtol |other| at every entry of either mask."""
        pair = [self, other]
        ranges = [slices_of(each.mask) for each in pair]

        def part_of(i: int, name: str) -> Part:
            return Part(pair[i].mask.indices[name], pair[i].values[ranges[i][name]])

        laid = overlays([self.mask, other.mask], part_of)
        rows = (each.rows() for _, each in laid)
        return all(torch.allclose(one, two, rtol=rtol, atol=atol) for one, two in rows)

    @property
    def nbytes(self) -> int:
        """Bytes of values and mask in memory."""
        return self.values.nbytes + self.mask.nbytes

    def __len__(self) -> int:
        """Return the number of selected entries."""
        return self.mask.nnz

    def __eq__(self, other: object) -> bool:
        """Return whether two vectors edit every model alike: mask, values, dtype, fingerprints."""
        if not isinstance(other, TaskVector):
            return NotImplemented
        if self.values.dtype != other.values.dtype or self.mask != other.mask:
            return False
        own, others = slices_of(self.mask), slices_of(other.mask)
        return self.fingerprints == other.fingerprints and all(
            torch.equal(self.values[part], other.values[others[name]]) for name, part in own.items()
        )

    def __repr__(self) -> str:
        dtype = str(self.values.dtype).removeprefix("torch.")
        where = f"{len(self.mask.names)} tensors, {readable_size(self.nbytes)}"
        return f"TaskVector({len(self):,} {dtype} values in {where})"


def _largest(mask: Mask, values: Tensor) -> float:
    """Return the largest magnitude; refuse a value that is not finite."""
    if not len(values):
        return 0.0
    low, high = (float(end) for end in torch.aminmax(values))
    if isfinite(low) and isfinite(high):
        return max(-low, high)
    rank = int((~torch.isfinite(values)).nonzero()[0, 0])
    name, part = next(each for each in slices_of(mask).items() if rank < each[1].stop)
    where = int(mask.indices[name].positions_int64()[rank - part.start])
    raise TalosValueError(
        f"values must be finite, got {float(values[rank])} at entry {where} of {name}; "
        "the training diverged, or a scale or float16 is out of range"
    )
