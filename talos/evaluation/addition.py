"""Addition: merge the vectors of all tasks, and choose the scaling coefficient on validation data.

    absolute(theta)   = mean_t figure_t(theta)
    normalised(theta) = mean_t figure_t(theta) / figure_t(theta_0 + tau_t)
    theta             = theta_0 + coef * tau             tau: the sum of the vectors, or any merge

The coefficient is chosen by the normalised figure on validation examples, as the mean of the best
ones of resamples (`coefficients.choose`). If it is 0, `why_zero` says so. The merged model is
evaluated on test examples: at this coefficient, and for the intervals at those that resamples of
the validation examples choose.

Source: Ilharco et al. 2023, "Editing models with task arithmetic", arXiv 2212.04089.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from talos.evaluation.coefficients import checked_coefs, choose, scaling_coefs, why_zero
from talos.evaluation.intervals import Estimate, Picked, over_tasks
from talos.evaluation.judging import Metric
from talos.evaluation.outcomes import Outcomes, checked_vectors
from talos.task_vectors import TaskVector

__all__ = ["Addition", "AdditionPoint", "addition"]

_FAILS = "beats the pretrained model's normalised figure on validation examples"


@dataclass(frozen=True)
class AdditionPoint:
    """The merged model at one coefficient, on validation examples.

    Attributes:
        scaling_coef: the coefficient.
        absolute: mean figure of the tasks.
        normalised: mean ratio to the single-task models.
        tasks: the figure of each task.
    """

    scaling_coef: float
    absolute: float
    normalised: float
    tasks: dict[str, float]


@dataclass(frozen=True)
class Addition:
    """What addition found.

    Attributes:
        grid: a point for each coefficient, on validation examples.
        scaling_coef: the coefficient that was chosen.
        why_zero: that no other coefficient helps, and how near one came; None: it is not 0.
        absolute: mean figure of the tasks on test examples.
        normalised: mean ratio to the single-task models on test examples.
        tasks: the figure of each task on test examples.
        picked: the merged model's outcomes of each task on test examples.
    """

    grid: list[AdditionPoint] = field(repr=False)
    scaling_coef: float
    why_zero: str | None
    absolute: Estimate
    normalised: Estimate
    tasks: dict[str, Estimate]
    picked: dict[str, Picked] = field(repr=False)

    @property
    def outcomes(self) -> dict[str, Tensor]:
        """The merged model's outcomes of each task on test examples, `[n]`."""
        return {task: each.taken for task, each in self.picked.items()}


def addition(
    outcomes: Outcomes,
    vectors: Mapping[str, TaskVector],
    merged: TaskVector | None = None,
    *,
    coefs: Iterable[float] | None = None,
    on_point: Callable[[AdditionPoint], object] | None = None,
) -> Addition:
    """Evaluate one model for all tasks.

    Args:
        outcomes: of the model, with judges of validation and test examples of each task.
        vectors: the vector of each task, which the merged model is compared with.
        merged: one vector for all tasks, which the coefficient scales; None: the sum of `vectors`.
        coefs: the coefficients to try; None: 0, 0.05, ..., 1.
        on_point: called after each coefficient.

    Returns:
        The grid, the coefficient, and the estimates on test examples.

    Raises:
        TalosValueError: there is no vector or no coefficient, a judge is missing, or a vector does
            not fit the model.

    Example:
        >>> from talos import Mask
        >>> from talos.evaluation import right_answers
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.eye(2))
        >>> judges = {"left": right_answers([(torch.eye(2), torch.tensor([0, 0]))])}
        >>> mask = Mask.from_dense({"weight": torch.tensor([[False, True], [False, False]])})
        >>> vectors = {"left": TaskVector(mask, torch.tensor([4.0]))}
        >>> added = addition(Outcomes(model, judges, judges), vectors)
        >>> added.scaling_coef, added.absolute["value"], added.normalised["value"]
        (0.55, 1.0, 1.0)
    """
    tasks = list(checked_vectors(vectors))
    numbers = scaling_coefs() if coefs is None else checked_coefs(coefs)
    if merged is None:
        merged = TaskVector.combine((1.0, vector) for vector in vectors.values())
    alone = outcomes.of_each(vectors, "validation")
    figures_alone = outcomes.figures(alone)
    grid, found = [], []
    with outcomes.resident(merged):
        for coef in numbers:
            found.append(outcomes.of("validation", merged, coef, tasks))
            figures = outcomes.figures(found[-1])
            point = _point(outcomes.metric, coef, figures, figures_alone)
            grid.append(point)
            if on_point is not None:
                on_point(point)
        highest = outcomes.metric.better == "higher"
        ratio = outcomes.metric.ratio
        table = outcomes.table(
            "validation",
            [*found, alone],
            lambda figures: over_tasks(
                {task: ratio(each[:, :-1], each[:, -1:]) for task, each in figures.items()}
            ),
        )
        places = choose(numbers, table, highest=highest)
        picked = outcomes.picked(merged, numbers, places, tasks)
    normalised, place = [point.normalised for point in grid], int(places[0])
    single = outcomes.of_each(vectors, "test")
    bootstrap = outcomes.bootstrap
    return Addition(
        grid=grid,
        scaling_coef=numbers[place],
        why_zero=why_zero(numbers, normalised, place, highest=highest, fails=_FAILS),
        absolute=bootstrap.mean(picked),
        normalised=bootstrap.normalised(picked, single),
        tasks={task: bootstrap.mean({task: picked[task]}) for task in tasks},
        picked=picked,
    )


def _point(
    metric: Metric, coef: float, figures: Mapping[str, float], alone: Mapping[str, float]
) -> AdditionPoint:
    above, below = (
        torch.tensor([each[task] for task in figures], dtype=torch.float64, device="cpu")
        for each in (figures, alone)
    )
    ratios = metric.ratio(above, below).tolist()
    count = len(figures)
    return AdditionPoint(coef, sum(figures.values()) / count, sum(ratios) / count, dict(figures))
