"""TALL masks: which entries of a merged vector a task needs; Consensus keeps what several need.

    m_t = |tau_t| > strictness_t * |tau - tau_t|        the mask of task t
    tau = sum_t c_t tau_t                               where at least `least_tasks` m_t are true

Where vectors are scaled, c_t tau_t stands for tau_t in the first line. Source: Wang et al. 2024,
"Localizing Task Information for Improved Model Merging and Compression", arXiv 2405.07813. The
paper compares with >=; with > an entry that is 0 in a task's vector is never needed. The authors of
TaLoS compare without the absolute value on the right and use the last task's mask for all.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from talos.errors import TalosTypeError, TalosValueError
from talos.masks import Mask
from talos.merging.base import Merge, Source, read_vectors
from talos.options import as_real, integer
from talos.task_vectors import TaskVector
from talos.task_vectors.fingerprints import one_base
from talos.task_vectors.sums import Overlay, overlays, shapes_of

__all__ = ["TallMasks", "tall_masks"]


@dataclass(frozen=True, kw_only=True)
class TallMasks(Merge):
    """Consensus: the sum, at the entries that at least some number of tasks need.

    Attributes:
        strictness: how much larger a task's own value must be than the others' share; one number,
            or one a vector. Larger values make smaller masks.
        least_tasks: how many tasks must need an entry.

    Example:
        >>> TallMasks(least_tasks=3).settings()
        {'method': 'tall_masks', 'scaling_coef': 1.0, 'strictness': 0.4, 'least_tasks': 3}
    """

    name = "tall_masks"
    strictness: float | Sequence[float] = 0.4
    least_tasks: int = 2

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        super().__post_init__()
        self._store(
            strictness=_read_strictness(self.strictness),
            least_tasks=integer("least_tasks", self.least_tasks, 1),
        )

    def _choose(self, vectors: Sequence[Source]) -> Sequence[Source]:
        _spread(self.strictness, len(vectors))
        return vectors

    def _merge_entries(self, overlay: Overlay) -> tuple[Tensor, Tensor | None]:
        total, rows = overlay.total(), overlay.rows()
        tasks = torch.zeros_like(total)
        for row, strictness in zip(rows, _spread(self.strictness, len(rows)), strict=True):
            tasks += _needed(row, total, strictness)
        return total, tasks >= self.least_tasks


def tall_masks(
    vectors: Iterable[TaskVector], total: TaskVector, strictness: float | Sequence[float] = 0.4
) -> list[Mask]:
    """Return for each task the entries of a merged vector that it needs.

    `total.restrict(mask)` then stands in for the task's own vector: all tasks share one vector and
    keep only a mask each.

    Args:
        vectors: of the tasks, scaled as they are in `total`.
        total: the merged vector.
        strictness: see `TallMasks`.

    Returns:
        A mask of each vector, over its own tensors.

    Raises:
        TalosTypeError: something else than a task vector is given.
        TalosValueError: there is no vector, two belong to different bases or shapes of a tensor, or
            `strictness` is out of range.

    Example:
        >>> mask = Mask.from_dense({"w": torch.ones(3) > 0})
        >>> a, b = (TaskVector(mask, torch.tensor(v)) for v in ([1.0, 0.1, 0.0], [0.0, 5.0, 2.0]))
        >>> needed = tall_masks([a, b], a + b)
        >>> [each.to_dense("w").tolist() for each in needed]
        [[True, False, False], [False, True, True]]
        >>> (a + b).restrict(needed[0]).values
        tensor([1.])
    """
    tasks = read_vectors(vectors)
    if not isinstance(total, TaskVector):
        raise TalosTypeError(f"total must be a task vector, got {type(total).__name__}")
    one_base(each.fingerprints for each in [*tasks, total])
    shapes_of([each.mask for each in [*tasks, total]])
    read = _spread(_read_strictness(strictness), len(tasks))
    return [_mask(task, total, each) for task, each in zip(tasks, read, strict=True)]


def _mask(task: TaskVector, total: TaskVector, strictness: float) -> Mask:
    pair = [Source(task), Source(total)]
    indices = {}
    for name, overlay in overlays([task.mask, total.mask], lambda i, name: pair[i].part(name)):
        if name in task.mask:
            own, whole = overlay.rows()
            indices[name] = overlay.wanted(_needed(own, whole, strictness))
    metadata = {"method": TallMasks.name, "strictness": strictness, "of": task.origin()}
    return Mask(task.mask.shapes, indices, metadata)


def _needed(own: Tensor, total: Tensor, strictness: float) -> Tensor:
    return own.abs() > strictness * (total - own).abs_()


def _read_strictness(value: Any) -> float | tuple[float, ...]:
    several = isinstance(value, Sequence) and not isinstance(value, str)
    numbers = [as_real(each) for each in (value if several else [value])]
    if not all(number is not None and 0.0 <= number < torch.inf for number in numbers):
        raise TalosValueError(f"strictness must be finite and not negative, got {value!r}")
    read = tuple(float(number) for number in numbers if number is not None)
    return read if several else read[0]


def _spread(strictness: float | Sequence[float], count: int) -> Sequence[float]:
    """Return the strictness of each of `count` vectors."""
    if isinstance(strictness, float):
        return [strictness] * count
    if len(strictness) != count:
        raise TalosValueError(
            f"strictness must hold {count} entries, one a vector, got {len(strictness)}"
        )
    return strictness
