"""The disentanglement error: do the vectors of several tasks act on their own tasks only?

    xi(a_1, ..., a_T) = sum_t mean over x in D_t of
                        [p(x; theta_0 + a_t tau_t) != p(x; theta_0 + sum_s a_s tau_s)]

p is the prediction. 0: the merged model predicts on each task what the task's own vector predicts
alone. Labels play no part. Two tasks and n coefficients need n^2 merged models, each on both tasks,
and n single ones a task. A point where only one coefficient is not 0 is a single model and is not
evaluated again.

Source: Ortiz-Jimenez et al. 2023, "Task arithmetic in the tangent space", arXiv 2305.12827.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import product

import torch
from torch import Tensor

from talos.errors import TalosTypeError, TalosValueError
from talos.evaluation.coefficients import checked_coefs, scaling_coefs
from talos.evaluation.outcomes import Outcomes, checked_vectors
from talos.task_vectors import TaskVector
from talos.task_vectors.sums import spread

__all__ = ["disentanglement"]


def disentanglement(
    outcomes: Outcomes,
    vectors: Mapping[str, TaskVector],
    *,
    coefs: Iterable[float] | None = None,
    on_point: Callable[[tuple[float, ...], float], object] | None = None,
) -> Tensor:
    """Evaluate the disentanglement error on a grid of coefficients.

    Args:
        outcomes: of the model, with test judges that return predictions.
        vectors: the vector of each of two tasks or more; T tasks and n coefficients give n^T
            points.
        coefs: the coefficients of every vector; None: 0, 0.1, ..., 1.
        on_point: called with the coefficients and the error of each point.

    Returns:
        float64 `[n] * T` on the CPU, from 0 to T; an axis for each vector, in their order.

    Raises:
        TalosTypeError: a judge returns no integers.
        TalosValueError: there are fewer than two vectors, a vector's task has no judge, or a vector
            does not fit the model.

    Example:
        >>> from talos import Mask
        >>> from talos.evaluation import predictions
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.eye(2))
        >>> judges = {task: predictions([torch.eye(2)]) for task in ("left", "right")}
        >>> masks = [Mask.from_dense({"weight": torch.eye(2) == i}) for i in (1, 0)]
        >>> vectors = {
        ...     task: TaskVector(mask, torch.tensor([0.0, 4.0]))
        ...     for task, mask in zip(judges, masks, strict=True)
        ... }
        >>> disentanglement(Outcomes(model, judges), vectors, coefs=[0.0, 1.0])
        tensor([[0.0000, 0.5000],
                [0.0000, 0.5000]], dtype=torch.float64)
    """
    vectors = checked_vectors(vectors)
    if len(vectors) < 2:
        raise TalosValueError(
            f"vectors must be those of at least two tasks, got {', '.join(vectors)}"
        )
    numbers = scaling_coefs(11) if coefs is None else checked_coefs(coefs)
    tasks = list(vectors)
    union = TaskVector.combine((1.0, vector) for vector in vectors.values()).mask
    parts = [  # on one mask, which is packed once
        TaskVector(union, spread(vector.mask, vector.values, union), vector.fingerprints)
        for vector in vectors.values()
    ]
    errors = torch.zeros([len(numbers)] * len(tasks), dtype=torch.float64, device="cpu")
    for place in product(range(len(numbers)), repeat=len(tasks)):
        point = [numbers[i] for i in place]
        active = [i for i, coef in enumerate(point) if coef]
        if len(active) > 1:
            merged, coef = TaskVector.combine(zip(point, parts, strict=True)), 1.0
        else:
            merged, coef = vectors[tasks[active[0] if active else 0]], sum(point)
        found = outcomes.of("test", merged, coef, tasks)
        for task, own in zip(tasks, point, strict=True):
            alone = outcomes.of("test", vectors[task], own, [task])[task]
            errors[place] += _disagreement(task, alone, found[task])
        if on_point is not None:
            on_point(tuple(point), float(errors[place]))
    return errors


def _disagreement(task: str, one: Tensor, other: Tensor) -> float:
    """Return the share of examples with different predictions."""
    for each in (one, other):
        if each.is_floating_point() or each.dtype == torch.bool:
            raise TalosTypeError(
                f"test judge of {task} must return predictions, integers, got {each.dtype}; take "
                "talos.evaluation.predictions"
            )
    return float((one != other).double().mean())
