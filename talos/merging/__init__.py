"""Merging: one task vector made of several. One file a method, one interface.

| method | the merged vector |
|---|---|
| `task_arithmetic` | the sum (arXiv 2212.04089) |
| `mean` | the mean (arXiv 2203.05482) |
| `trim` | the sum of each vector's largest entries |
| `ties` | the mean of the largest entries that agree in sign (arXiv 2306.01708) |
| `dare` | random entries, rescaled, in another merge (arXiv 2311.03099) |
| `breadcrumbs` | the sum without outliers and noise (arXiv 2312.06795) |
| `tall_masks` | the sum where several tasks need it: Consensus (arXiv 2405.07813) |
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

from talos.errors import TalosTypeError, TalosValueError
from talos.merging.base import Coefficient, Merge, Source
from talos.merging.breadcrumbs import Breadcrumbs
from talos.merging.dare import Dare
from talos.merging.tall_masks import TallMasks, tall_masks
from talos.merging.task_arithmetic import Mean, TaskArithmetic
from talos.merging.ties import Ties, Trim
from talos.task_vectors import TaskVector

__all__ = [
    "METHODS",
    "Breadcrumbs",
    "Coefficient",
    "Dare",
    "Mean",
    "Merge",
    "Source",
    "TallMasks",
    "TaskArithmetic",
    "Ties",
    "Trim",
    "merge",
    "merge_of",
    "tall_masks",
]

METHODS: dict[str, type[Merge]] = {
    each.name: each for each in (TaskArithmetic, Mean, Trim, Ties, Dare, Breadcrumbs, TallMasks)
}
"""Every method by its name."""


def merge(
    vectors: Iterable[TaskVector],
    method: Merge | str = "task_arithmetic",
    *,
    on_tensor: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> TaskVector:
    """Merge task vectors into one.

    The vectors may differ in masks, dtypes and densities. An entry that a vector does not select
    counts as zero, and nothing is made dense. Beside vectors and result, memory holds one tensor
    times the number of vectors. Results do not depend on the number of threads.

    Args:
        vectors: at least one, of one base.
        method: the name of a method in `talos.merging.METHODS`, or a `Merge` with its settings.
        on_tensor: called after each tensor with the number of tensors done, and of all.
        settings: of the method, by name: `scaling_coef` and `scaling_coefs` of all, `density`,
            `seed`, ... They replace those that the `Merge` has.

    Returns:
        The merged vector, float32. Its metadata hold the method, the settings, and the vectors with
        the number of entries that each kept.

    Raises:
        TalosTypeError: something else than a task vector or a method is given.
        TalosValueError: there is no vector, two belong to different bases or shapes of a tensor,
            the method or a setting is unknown or out of range, or a sum overflows.

    Example:
        >>> import torch
        >>> import talos
        >>> mask = talos.Mask.from_dense({"w": torch.ones(3) > 0})
        >>> a = talos.TaskVector(mask, torch.tensor([1.0, -1.0, 2.0]))
        >>> b = talos.TaskVector(mask, torch.tensor([3.0, 4.0, 0.0]))
        >>> talos.merge([a, b], scaling_coef=0.5).values
        tensor([2.0000, 1.5000, 1.0000])
        >>> talos.merge([a, b], method="ties", density=1.0).values
        tensor([2., 4., 2.])
    """
    return merge_of(method, settings).merge(vectors, on_tensor=on_tensor)


def merge_of(method: Merge | str, settings: Mapping[str, Any] = MappingProxyType({})) -> Merge:
    """Return the merge that a caller named.

    Args:
        method: one with its settings, or the name of one with its defaults.
        settings: by name; they replace those that the method has.

    Raises:
        TalosValueError: the name or a setting is unknown, or a setting is out of range.
        TalosTypeError: `method` is something else.

    Example:
        >>> merge_of("ties", {"density": 0.1})
        Ties(scaling_coef=1.0, scaling_coefs=None, density=0.1)
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise TalosValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        method = METHODS[method]()
    if not isinstance(method, Merge):
        raise TalosTypeError(f"method must be a name or a Merge, got {type(method).__name__}")
    own = [field.name for field in fields(method)]
    for name in settings:
        if name not in own:
            takers = [key for key, each in METHODS.items() if name in _settings(each)]
            hint = f"{name} is for {', '.join(takers)}" if takers else "check its spelling"
            raise TalosValueError(
                f"settings of {method.name} must be among {', '.join(own)}, got {name}; {hint}"
            )
    return replace(method, **settings)


def _settings(method: type[Merge]) -> set[str]:
    return {field.name for field in fields(method)}
