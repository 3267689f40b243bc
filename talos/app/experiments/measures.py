"""What the cells of an experiment hold of an edit: plain figures, and answers as bits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from talos.app.experiments import answers
from talos.app.experiments.settings import Evaluation
from talos.evaluation import (
    Outcomes,
    addition,
    mask_similarity,
    negation,
    scaling_coefs,
    sensitivity_transfer,
)
from talos.evaluation import (
    disentanglement as disentanglement_error,
)
from talos.evaluation import interference as interference_of
from talos.evaluation import linearity as linearity_of
from talos.masks import Mask
from talos.task_vectors import TaskVector

__all__ = [
    "Tick",
    "add",
    "counted",
    "disentangle",
    "interference",
    "linearity",
    "negate",
    "overlap",
    "sensitivity",
]

Figures = dict[str, Any]
Tick = Callable[[int, int, float | None], None]
"""Takes the number of steps that are done, of all, and the loss of the last one."""

Load = Callable[[str], TaskVector]
_NEGATED = (
    "scaling_coef",
    "why_zero",
    "target",
    "control",
    "target_zero_shot",
    "control_zero_shot",
)


def add(
    outcomes: Outcomes,
    vectors: Mapping[str, TaskVector],
    merged: TaskVector,
    coefs: Sequence[float],
    tick: Tick,
) -> Figures:
    """Evaluate one model for all tasks.

    Args:
        outcomes: of the model.
        vectors: of each task.
        merged: the vectors, merged.
        coefs: the coefficients to try.
        tick: called after each coefficient.
    """
    found = addition(outcomes, vectors, merged, coefs=coefs, on_point=counted(tick, len(coefs)))
    return {
        "grid": [
            {key: getattr(point, key) for key in ("scaling_coef", "absolute", "normalised")}
            for point in found.grid
        ],
        "scaling_coef": found.scaling_coef,
        "why_zero": found.why_zero,
        "absolute": found.absolute,
        "normalised": found.normalised,
        "tasks": found.tasks,
        "single": answers.pack(outcomes.of_each(vectors, "test")),
        "picked": answers.pack_picked(found.picked),
    }


def negate(
    outcomes: Outcomes, vector: TaskVector, task: str, evaluation: Evaluation, tick: Tick
) -> Figures:
    """Evaluate how far a task's vector makes the model forget it.

    Args:
        outcomes: of the model.
        vector: of the task.
        task: the task to forget.
        evaluation: of the recipe.
        tick: called after each coefficient.
    """
    coefs = scaling_coefs(evaluation.coefficients)
    found = negation(
        outcomes,
        vector,
        task,
        control_share=evaluation.control_share,
        coefs=coefs,
        on_point=counted(tick, len(coefs)),
    )
    return {
        "grid": [asdict(point) for point in found.grid],
        **{key: getattr(found, key) for key in _NEGATED},
        "picked": answers.pack_picked(found.picked),
    }


def interference(outcomes: Outcomes, tasks: Sequence[str], load: Load, tick: Tick) -> Figures:
    """Evaluate each task's vector on every task.

    Args:
        outcomes: of the model.
        tasks: the tasks.
        load: returns a task's vector.
        tick: called after each task.
    """
    return _matrix(lambda task: interference_of(outcomes, {task: load(task)}), tasks, tick)


def sensitivity(outcomes: Outcomes, tasks: Sequence[str], load: Load, tick: Tick) -> Figures:
    """Prune the entries that each task's vector selects, and evaluate every task.

    Args:
        outcomes: of the model.
        tasks: the tasks.
        load: returns a task's vector.
        tick: called after each task.
    """
    return _matrix(
        lambda task: sensitivity_transfer(outcomes, {task: load(task).mask}), tasks, tick
    )


def linearity(outcomes: Outcomes, tasks: Sequence[str], load: Load, tick: Tick) -> Figures:
    """Evaluate each tuned model beside its first-order expansion.

    Args:
        outcomes: of the model.
        tasks: the tasks.
        load: returns a task's vector.
        tick: called after each task.
    """
    found = {}
    step = counted(tick, len(tasks))
    for task in tasks:
        one = linearity_of(outcomes, {task: load(task)})[task]
        found[task] = {key: getattr(one, key) for key in ("tuned", "expansion", "equal")}
        step()
    return {"tasks": found}


def disentangle(
    outcomes: Outcomes, vectors: Mapping[str, TaskVector], points: int, tick: Tick
) -> Figures:
    """Evaluate the disentanglement error of two vectors on a grid.

    Args:
        outcomes: predictions of the model.
        vectors: of two tasks.
        points: coefficients each way.
        tick: called after each point.
    """
    coefs = scaling_coefs(points)
    step = counted(tick, len(coefs) ** 2)
    error = disentanglement_error(outcomes, vectors, coefs=coefs, on_point=step)
    return {"tasks": list(vectors), "coefs": coefs, "error": error.tolist()}


def overlap(masks: Mapping[str, Mask]) -> Figures:
    """Describe masks, and how far they are the same.

    Args:
        masks: of each task.
    """
    return {
        "masks": {task: _described(mask) for task, mask in masks.items()},
        "iou": mask_similarity(masks).iou.tolist(),
    }


def _described(mask: Mask) -> Figures:
    table = mask.describe()
    return {
        "nnz": mask.nnz,
        "numel": mask.numel,
        "tensors": len(table.rows),
        "tensors_touched": sum(row.nnz > 0 for row in table.rows),
        "structure": [
            {
                "layer": "–" if row.layer is None else str(row.layer),
                "kind": row.kind,
                "nnz": row.nnz,
                "numel": row.numel,
            }
            for row in table.by_layer_and_kind()
        ],
    }


def _matrix(
    measure: Callable[[str], Mapping[str, Mapping[str, Any]]], tasks: Sequence[str], tick: Tick
) -> Figures:
    step = counted(tick, len(tasks))
    rows = []
    for task in tasks:
        row = measure(task)[task]
        rows.append([row[other]["value"] for other in tasks])
        step()
    return {"matrix": rows}


def counted(tick: Tick, total: int) -> Callable[..., None]:
    """Return a function that counts its calls, and tells them to `tick`.

    Args:
        tick: called at once and after each call.
        total: how many calls there will be.
    """
    done = 0

    def step(*_: object) -> None:
        nonlocal done
        done += 1
        tick(done, total, None)

    tick(0, total, None)
    return step
