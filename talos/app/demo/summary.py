"""The results of a run in the schema of `talos.app.report.results`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from talos.app.demo.estimates import Estimate, Estimator
from talos.app.demo.judge import Judge
from talos.app.demo.machine import machine, versions
from talos.app.demo.settings import TITLES, DemoSettings
from talos.app.report import SCHEMA, SCHEMA_VERSION
from talos.app.tasks import Task
from talos.masks import Mask
from talos.methods import METHODS
from talos.names import named_parameters
from talos.params import select_parameters

__all__ = ["Measured", "summarise"]


@dataclass(frozen=True)
class Measured:
    """The measurements of one method.

    Attributes:
        single: estimates of the single-task models.
        addition: an entry of the results' `addition`.
        negation: an entry of the results' `negation`.
        interference: a matrix over the tasks.
        merged_correct: bool [n] of each task, the merged model on test examples.
        single_correct: the same of the task's own model.
    """

    single: dict[str, Estimate]
    addition: dict[str, Any]
    negation: dict[str, Any]
    interference: list[list[float]]
    merged_correct: dict[str, Tensor]
    single_correct: dict[str, Tensor]


def summarise(
    settings: DemoSettings,
    judge: Judge,
    tasks: Sequence[Task],
    *,
    masks: Mapping[str, Mask],
    measured: Mapping[str, Measured],
    zero_shot: Mapping[str, Tensor],
    estimator: Estimator,
    training: Mapping[str, Any],
    files: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the results in the schema of `talos.app.report.results`, without `timings`.

    Args:
        settings: the settings of the run.
        judge: its model's parameters are counted.
        tasks: the tasks.
        masks: each task's mask.
        measured: each method's measurements.
        zero_shot: bool [n] of each task, the pretrained model on test examples.
        estimator: of the test examples.
        training: steps and losses, method -> task.
        files: the written files.
    """
    names = [task.name for task in tasks]
    parameters = sum(p.numel() for p in named_parameters(judge.model).values())
    maskable = sum(each.numel for each in select_parameters(judge.model).values())
    methods = settings.methods
    pairs = [(measured[name].merged_correct, measured[name].single_correct) for name in methods]
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {**machine(), "device": str(judge.device)},
        "versions": versions(),
        "settings": {
            **asdict(settings),
            "tasks": names,
            "task_count": len(names),
            "methods": list(methods),
        },
        "model": {
            "source": settings.model,
            "parameters": parameters,
            "maskable": maskable,
            "dense_bytes": 4 * parameters,
        },
        "tasks": [_task(task) for task in tasks],
        "methods": [_method(method, settings, files) for method in methods],
        "zero_shot": {name: estimator.accuracy(name, zero_shot[name]) for name in names},
        "single": {method: measured[method].single for method in methods},
        "training": dict(training),
        "addition": {method: measured[method].addition for method in methods},
        "addition_difference": (estimator.difference(*pairs[:2]) if len(pairs) > 1 else None),
        "negation": {method: measured[method].negation for method in methods},
        "interference": {method: measured[method].interference for method in methods},
        "masks": {name: _mask(mask) for name, mask in masks.items()},
        "mask_iou": [[masks[i].iou(masks[j]) for j in names] for i in names],
        "files": [dict(file) for file in files],
    }


def _task(task: Task) -> dict[str, Any]:
    return {
        "name": task.name,
        "description": task.description,
        "classes": len(task.class_names),
        "examples": {split: len(task.examples(split)) for split in ("train", "validation", "test")},
    }


def _method(
    method: str, settings: DemoSettings, files: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    entries = [file["entries"] for file in files if file["method"] == method]
    phases = METHODS[method].phases
    sparse = method in ("talos", "random", "magnitude")
    optimizer = "SparseAdam" if sparse else "AdamW, then SparseAdam" if phases > 1 else "AdamW"
    return {
        "name": method,
        "title": TITLES[method],
        "trainable": round(sum(entries) / len(entries)),
        "settings": {
            "optimizer": optimizer,
            "lr": settings.rate(method),
            "steps": settings.steps * phases,
        },
    }


def _mask(mask: Mask) -> dict[str, Any]:
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
