"""Addition and negation: the scaling coefficient is chosen on validation data, then tested once.

    addition: theta_0 + coefficient * sum of all task vectors; the coefficient with the highest
              normalised accuracy (Ilharco 2023, arXiv 2212.04089)
    negation: theta_0 - coefficient * tau; the coefficient with the lowest target accuracy among
              those that keep a share of the control's pretrained accuracy; the control is the mean
              of the other tasks

An edit is a function that puts a resident task vector on the base with a coefficient: between two
points of a search nothing is copied or loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from talos.app.demo.estimates import Estimator
from talos.app.demo.judge import Judge

__all__ = ["add", "negate", "scaling_coefs"]

# Points in a row without the control's share: a larger coefficient does not bring it back.
_GIVE_UP = 4

Correct = Mapping[str, Tensor]
Tick = Callable[[], None]
Edit = Callable[[float], None]


def scaling_coefs(count: int) -> list[float]:
    """Lists linspace(0, 1, count).

    Args:
        count: how many, at least 2.

    Returns:
        The coefficients, the first 0 and the last 1.

    Example:
        >>> scaling_coefs(5)
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    return [round(i / (count - 1), 10) for i in range(count)]


def add(
    judge: Judge,
    edit: Edit,
    *,
    coefs: Sequence[float],
    single_validation: Correct,
    zero_shot_validation: Correct,
    single_test: Correct,
    estimator: Estimator,
    tick: Tick,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Merges all tasks into one model.

    Args:
        judge: evaluates.
        edit: puts the sum of the task vectors on the judge's model; it is left on.
        coefs: the scaling coefficients to try; the first is 0.
        single_validation: each task's own model on its validation examples.
        zero_shot_validation: the pretrained model on them.
        single_test: each task's own model on its test examples.
        estimator: of the test examples.
        tick: called after each coefficient and after the test.

    Returns:
        An entry of the results' `addition`, and the merged model's right answers on test examples.
    """
    tasks = list(judge.classifiers)
    grid: list[dict[str, Any]] = []
    for coef in coefs:
        correct = (
            zero_shot_validation if coef == 0 else _edited(judge, edit, coef, "validation", tasks)
        )
        accuracies = {task: share(correct[task]) for task in tasks}
        relative = [accuracies[t] / max(share(single_validation[t]), 1e-3) for t in tasks]
        grid.append(
            {
                "scaling_coef": coef,
                "absolute": sum(accuracies.values()) / len(tasks),
                "normalised": sum(relative) / len(tasks),
                "tasks": accuracies,
            }
        )
        tick()
    best = max(grid, key=lambda point: point["normalised"])
    merged = _edited(judge, edit, best["scaling_coef"], "test", tasks)
    tick()
    entry = {
        "grid": grid,
        "scaling_coef": best["scaling_coef"],
        "absolute": estimator.mean(merged),
        "normalised": estimator.normalised(merged, single_test),
        "tasks": {task: estimator.accuracy(task, merged[task]) for task in tasks},
    }
    return entry, merged


def negate(
    judge: Judge,
    edit: Edit,
    target: str,
    *,
    coefs: Sequence[float],
    control_share: float,
    zero_shot_validation: Correct,
    zero_shot_test: Correct,
    estimator: Estimator,
    tick: Tick,
) -> dict[str, Any]:
    """Makes the model forget one task.

    Args:
        judge: evaluates.
        edit: puts the task's vector on the judge's model; it is left on.
        target: the task.
        coefs: the scaling coefficients to try; the first is 0, which always keeps the control.
        control_share: share of the control's pretrained accuracy that must be kept.
        zero_shot_validation: the pretrained model on each task's validation examples.
        zero_shot_test: the pretrained model on each task's test examples.
        estimator: of the test examples.
        tick: called after each coefficient and after the test.

    Returns:
        An entry of the results' `negation`. A grid point's target is None where the control was
        not kept: the target is not evaluated there. After four such points in a row the larger
        coefficients are left out, too.
    """
    others = [task for task in judge.classifiers if task != target]
    broken = 0
    pretrained = _mean(
        {task: zero_shot_validation[task][:: judge.control_stride] for task in others}, others
    )
    grid: list[dict[str, Any]] = []
    for coef in coefs:
        if broken == _GIVE_UP:
            tick()
            continue
        reached: float | None = None
        if coef == 0:
            control = pretrained
            reached = share(zero_shot_validation[target])
        else:
            edit(-coef)
            control = _mean({t: judge.correct(t, "control") for t in others}, others)
            if control >= control_share * pretrained:
                reached = share(judge.correct(target, "validation"))
        broken = broken + 1 if reached is None else 0
        grid.append({"scaling_coef": coef, "target": reached, "control": control})
        tick()
    kept = [point for point in grid if point["target"] is not None]
    best = min(kept, key=lambda point: point["target"])
    correct = _edited(judge, edit, -best["scaling_coef"], "test", list(judge.classifiers))
    tick()
    return {
        "grid": grid,
        "scaling_coef": best["scaling_coef"],
        "target": estimator.accuracy(target, correct[target]),
        "control": estimator.mean({task: correct[task] for task in others}),
        "target_zero_shot": estimator.accuracy(target, zero_shot_test[target]),
        "control_zero_shot": estimator.mean({task: zero_shot_test[task] for task in others}),
    }


def share(correct: Tensor) -> float:
    """Computes an accuracy.

    Args:
        correct: bool [n].

    Returns:
        The share that is True.
    """
    return int(correct.sum()) / len(correct)


def _mean(correct: Correct, tasks: Sequence[str]) -> float:
    return sum(share(correct[task]) for task in tasks) / len(tasks)


def _edited(
    judge: Judge, edit: Edit, coef: float, split: str, tasks: Sequence[str]
) -> dict[str, Tensor]:
    edit(coef)
    return {task: judge.correct(task, split) for task in tasks}
