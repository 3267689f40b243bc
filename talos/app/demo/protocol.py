"""Addition and negation: choose the scaling coefficient on validation data, then test once.

    addition: theta_0 + coefficient * sum of all task vectors; the coefficient with the highest
              normalised accuracy (Ilharco 2023, arXiv 2212.04089)
    negation: theta_0 - coefficient * tau; the coefficient with the lowest target accuracy among
              those that keep a share of the control's pretrained accuracy; the control is the mean
              of the other tasks

An edit is a function that applies a resident task vector to the base with a coefficient. Between
two points of a search nothing is copied or loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from talos.app.demo.estimates import Estimator
from talos.app.demo.judge import Judge

__all__ = ["add", "negate", "scaling_coefs"]

# After so many points in a row that break the control, no larger coefficient is tried.
_GIVE_UP = 4

Correct = Mapping[str, Tensor]
Tick = Callable[[], None]
Edit = Callable[[float], None]


def scaling_coefs(count: int) -> list[float]:
    """Return linspace(0, 1, count).

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
    """Merge all tasks into one model.

    Args:
        judge: evaluates the model.
        edit: applies the sum of the task vectors to the judge's model; it stays applied.
        coefs: the scaling coefficients to try; the first is 0.
        single_validation: correct answers of each task's own model on its validation examples.
        zero_shot_validation: those of the pretrained model.
        single_test: correct answers of each task's own model on its test examples.
        estimator: of the test examples.
        tick: called after each coefficient and after the test.

    Returns:
        An entry of the results' `addition`; the merged model's correct answers on test examples.
    """
    tasks = list(judge.classifiers)
    grid: list[dict[str, Any]] = []
    for coef in coefs:
        correct = zero_shot_validation if coef == 0 else _edited(judge, edit, coef, "validation")
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
    merged = _edited(judge, edit, best["scaling_coef"], "test")
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
    """Make the model forget one task.

    Args:
        judge: evaluates the model.
        edit: applies the task's vector to the judge's model; it stays applied.
        target: the task to forget.
        coefs: the scaling coefficients to try; the first is 0, which always keeps the control.
        control_share: share of the control's pretrained accuracy that must be kept.
        zero_shot_validation: correct answers of the pretrained model on validation examples.
        zero_shot_test: its correct answers on test examples.
        estimator: of the test examples.
        tick: called after each coefficient and after the test.

    Returns:
        An entry of the results' `negation`. Where the control is not kept, the target is not
        evaluated and is None. After four such points in a row no larger coefficient is tried.
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
    correct = _edited(judge, edit, -best["scaling_coef"], "test")
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
    """Return the accuracy: the share of bool [n] that is True."""
    return int(correct.sum()) / len(correct)


def _mean(correct: Correct, tasks: Sequence[str]) -> float:
    return sum(share(correct[task]) for task in tasks) / len(tasks)


def _edited(judge: Judge, edit: Edit, coef: float, split: str) -> dict[str, Tensor]:
    edit(coef)
    return judge.all(split)
