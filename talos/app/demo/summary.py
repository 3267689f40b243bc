"""The results of a run in the schema of `talos.app.demo.report.results`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from talos.app.demo.report import SCHEMA, SCHEMA_VERSION
from talos.app.demo.settings import TITLES, DemoSettings
from talos.app.experiments.judging import TaskModels
from talos.app.experiments.machine import machine, versions
from talos.app.tasks import ImageTask, Task
from talos.evaluation import Addition, Bootstrap, Estimate, Negation
from talos.masks import Mask
from talos.methods import METHODS
from talos.names import named_parameters
from talos.params import select_parameters

__all__ = ["Measured", "summarise"]


@dataclass(frozen=True)
class Measured:
    """The measurements of one method.

    Attributes:
        single: bool [n] of each task, its own model on test examples.
        addition: the sum of the vectors.
        negation: each task's vector, subtracted.
        interference: a matrix over the tasks.
    """

    single: dict[str, Tensor]
    addition: Addition
    negation: dict[str, Negation]
    interference: dict[str, dict[str, Estimate]]


def summarise(
    settings: DemoSettings,
    models: TaskModels,
    *,
    masks: Mapping[str, Mask],
    measured: Mapping[str, Measured],
    zero_shot: Mapping[str, Tensor],
    bootstrap: Bootstrap,
    training: Mapping[str, Any],
    files: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the results in the schema of `talos.app.demo.report.results`, without `timings`.

    Args:
        settings: the settings of the run.
        models: the tasks, and the model whose parameters are counted.
        masks: each task's mask.
        measured: each method's measurements.
        zero_shot: bool [n] of each task, the pretrained model on test examples.
        bootstrap: of the test examples.
        training: steps and losses, method -> task.
        files: the written files.
    """
    names = list(models.classifiers)
    parameters = sum(p.numel() for p in named_parameters(models.model).values())
    maskable = sum(each.numel for each in select_parameters(models.model).values())
    methods = settings.methods
    pairs = [(each.addition.picked, each.single) for each in measured.values()]
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {**machine(), "device": str(models.device)},
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
        "tasks": [_task(task) for task in models.tasks],
        "methods": [_method(method, settings, files) for method in methods],
        "zero_shot": _accuracies(bootstrap, zero_shot),
        "single": {name: _accuracies(bootstrap, each.single) for name, each in measured.items()},
        "training": dict(training),
        "addition": {name: _addition(each.addition) for name, each in measured.items()},
        "addition_difference": bootstrap.normalised_gain(*pairs[:2]) if len(pairs) > 1 else None,
        "negation": {
            name: {task: asdict(forgot) for task, forgot in each.negation.items()}
            for name, each in measured.items()
        },
        "interference": {
            name: [[ratio["value"] for ratio in row.values()] for row in each.interference.values()]
            for name, each in measured.items()
        },
        "masks": {name: _mask(mask) for name, mask in masks.items()},
        "mask_iou": [[masks[i].iou(masks[j]) for j in names] for i in names],
        "files": [dict(file) for file in files],
    }


def _accuracies(bootstrap: Bootstrap, outcomes: Mapping[str, Tensor]) -> dict[str, Estimate]:
    return {task: bootstrap.mean({task: each}) for task, each in outcomes.items()}


def _addition(added: Addition) -> dict[str, Any]:
    entry = asdict(added)
    del entry["picked"]
    return entry


def _task(task: Task | ImageTask) -> dict[str, Any]:
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
