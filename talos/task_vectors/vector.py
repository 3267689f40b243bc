"""The task vector: an immutable sparse difference of weights with the arithmetic of edits.

    tau   = theta_tuned - theta_base                 at the entries of a mask
    theta = theta_base + scaling_coef * tau          addition; a negative coefficient forgets
    tau   = sum_t scale_t * tau_t                    over the union of the masks, in float32

Source: Ilharco et al. 2023, "Editing models with task arithmetic", arXiv 2212.04089.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from talos.errors import TalosValueError
from talos.files import write_tensors
from talos.masks import Mask
from talos.task_vectors.arithmetic import VectorSpace
from talos.task_vectors.delta import SparseDelta
from talos.task_vectors.differences import Weights, difference
from talos.task_vectors.editing import ModelEdit, check_scale
from talos.task_vectors.fingerprints import fingerprint
from talos.task_vectors.storage import load_parts, save_parts
from talos.task_vectors.sums import is_sum, sources, weighted_sum
from talos.tensors import warn_of_moved

__all__ = ["TaskVector"]


@dataclass(frozen=True, eq=False, repr=False)
class TaskVector(SparseDelta, VectorSpace):
    """A sparse difference of weights: what to add to a base model, and at which entries.

    A value: every operation gives a new one. Sums and multiples are float32, whatever they are made
    of, over the union of the masks; an entry that a vector does not select counts as zero.

    Attributes:
        mask: the entries.
        values: `[nnz]` float32, bfloat16 or float16, on the CPU, in the mask's rank order.
        fingerprints: of the base's tensors, by name; those without one are not verified.
        metadata: what made it, JSON-able.

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

    @classmethod
    def from_models(
        cls,
        base: Weights,
        tuned: Weights,
        mask: Mask | None = None,
        *,
        strict: bool = True,
        metadata: Mapping[str, Any] | None = None,
    ) -> "TaskVector":
        """The difference of two models.

        Args:
            base: pretrained module, or its state dict.
            tuned: the same module after fine-tuning, or its state dict.
            mask: entries to keep; None: every floating-point weight, encoded `full`.
            strict: refuse a change outside of the mask; False drops it.
            metadata: what made the difference.

        Returns:
            float32 tuned minus base, with the base's fingerprints. Tied weights come once. Buffers
            of modules are left out: a warning and the metadata's `moved_buffers` name those that
            differ.

        Raises:
            TalosValueError: names or shapes differ, a difference is not finite, or an entry outside
                of the mask changed.

        Example:
            >>> base, tuned = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
            >>> vector = TaskVector.from_models(base, tuned)
            >>> vector.apply_(base)
            >>> torch.allclose(base.weight, tuned.weight)
            True
        """
        kept, values, found, moved = difference(base, tuned, mask, strict=strict)
        warn_of_moved(moved, stacklevel=2)
        left_out = {"moved_buffers": moved} if moved else {}
        return cls(kept, values, found, {**(metadata or {}), **left_out})

    @classmethod
    def combine(cls, terms: "Iterable[tuple[float, TaskVector]]") -> "TaskVector":
        """The weighted sum of many task vectors in one pass, over the union of their masks.

        Args:
            terms: scale and vector of each.

        Returns:
            float32; metadata `sum` lists what went in, with its scale.

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
        bases: dict[str, str] = {}
        for _, vector in terms:
            for name, base in vector.fingerprints.items():
                if bases.setdefault(name, base) != base:
                    raise TalosValueError(
                        "task vectors must belong to one base, got the fingerprints "
                        f"{bases[name]} and {base} of {name}; make them from the same weights"
                    )
        union, total = weighted_sum([(scale, v.mask, v.values) for scale, v in terms])
        return cls(
            union, total, bases, {"sum": sources([(scale, v.origin()) for scale, v in terms])}
        )

    def origin(self) -> dict[str, Any]:
        """What names this vector in a sum: its metadata, and the fingerprint of its values.

        Returns:
            The metadata of a sum as it is; else with `values`, the fingerprint.

        Example:
            >>> mask = Mask.from_dense({"w": torch.ones(2) > 0})
            >>> sorted(TaskVector(mask, torch.ones(2), metadata={"task": "a"}).origin())
            ['task', 'values']
        """
        if is_sum(self.metadata):
            return dict(self.metadata)
        return {**self.metadata, "values": fingerprint(self.values)}

    def apply_(self, model: nn.Module, scale: float = 1.0, force: bool = False) -> None:
        """Add `scale` times the vector to a model's weights, in place, each tied weight once.

        Everything is checked before the first write. A later `apply_` or `applied` counts the model
        as the same base with edits; a write by anybody else makes it another base.

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
        edit = self._edit_of(model, force=force)
        edit.put_on(scale, keep=True)

    @contextmanager
    def applied(
        self, model: nn.Module, scale: float = 1.0, force: bool = False
    ) -> Iterator[nn.Module]:
        """The edited model inside a `with` block; afterwards its weights are bit for bit as before.

        Only the old bits of the selected entries are kept. They are written back when the block
        ends, also by an exception: what else was written to those entries inside the block is lost
        then, what was written to others stays. Blocks nest in stack order.

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
        edit = self._edit_of(model, force=force)
        edit.put_on(scale, keep=False)
        try:
            yield model
        finally:
            edit.take_off()

    def _edit_of(self, model: nn.Module, *, force: bool) -> ModelEdit:
        return ModelEdit(
            model, self.mask, self.values, self.fingerprints, largest=self.largest, force=force
        )

    def save(
        self,
        path: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        *,
        overwrite: bool = True,
    ) -> None:
        """Write the vector to a safetensors file, atomically.

        Args:
            path: the file, conventionally `*.safetensors`.
            dtype: of the values in it; None: as they are. bfloat16 halves the file.
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
    def load(cls, path: str | os.PathLike[str]) -> "TaskVector":
        """Read a vector from a file, checking all of it.

        Raises:
            TalosValueError: the file is not a task vector, is damaged, or is from a newer version.
            TalosOSError: it cannot be read.
        """
        return cls(*load_parts(path))

    def export_dense(self, path: str | os.PathLike[str]) -> None:
        """Write a dense delta for other tools: plain safetensors, named and shaped as the weights.

        All dense tensors are in memory at once.

        Raises:
            TalosOSError: the file cannot be written; an older one is left as it was.
        """
        dense = {name: self.to_dense(name) for name in self.mask.names}
        write_tensors(path, dense, {"format": "pt"})
