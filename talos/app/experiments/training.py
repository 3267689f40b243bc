"""How an experiment calibrates and trains: with the settings of a row, one task at a time."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

import talos
from talos.app.experiments.judging import Batch, TaskModels, calibration_batches, training_batches
from talos.app.experiments.measures import Tick, counted
from talos.app.experiments.recipe import Recipe, Row
from talos.app.experiments.settings import Calibration
from talos.app.models import Classifier, Encoder
from talos.app.provenance import digest_of_reading
from talos.app.tasks import ImageTask, Task
from talos.errors import TalosValueError
from talos.evaluation import GradientDrift
from talos.masks import Mask
from talos.methods import METHODS, method_of
from talos.params import select_parameters
from talos.task_vectors import TaskVector
from talos.training import FineTuneStep

__all__ = ["Trainer", "check_rows", "data_of", "seed_of", "tokens_of"]

_DRIFT_POINTS, _DRIFT_EXAMPLES, _DRIFT_BATCH = 10, 16, 8


@dataclass(frozen=True)
class Trainer:
    """Makes masks and vectors of a model, and restores its weights.

    Attributes:
        models: the classifiers around the model.
        tasks: the tasks by name.
        tokens: tokens per text of each task.
    """

    models: TaskModels
    tasks: Mapping[str, Task | ImageTask]
    tokens: Mapping[str, int]

    def calibrate(self, task: str, settings: Calibration, seed: int, tick: Tick) -> Mask:
        """Return the mask of a task.

        Args:
            task: the task's name.
            settings: of the calibration.
            seed: of the batches and labels.
            tick: called after each batch.
        """
        batches = self._samples(task, settings.samples, settings.batch_size, seed)
        left_out = ("samples", "batch_size", "disjoint")
        options = {key: each for key, each in asdict(settings).items() if key not in left_out}
        step = counted(tick, settings.rounds * len(batches))
        model = self.models.classifiers[task]
        return talos.calibrate(model, batches, **options, seed=seed, on_progress=step)

    def calibrate_disjoint(self, settings: Calibration, seed: int, tick: Tick) -> dict[str, Mask]:
        """Return the masks of all tasks, none of which shares an entry with another.

        All tasks are scored in one round. Then they take turns, in their order.

        Args:
            settings: as of `calibrate`.
            seed: as of `calibrate`.
            tick: called after each task.
        """
        scores, step = {}, counted(tick, len(self.tasks))
        for task in self.tasks:
            scores[task] = talos.fisher_diag(
                self.models.classifiers[task],
                self._samples(task, settings.samples, settings.batch_size, seed),
                **{key: getattr(settings, key) for key in ("params", "target", "draws", "labels")},
                seed=seed,
            )
            step()
        masks = Mask.disjoint(scores, density=settings.density)
        made = {"method": "talos", "rounds": 1, "seed": seed}
        return {t: replace(mask, metadata=mask.metadata | made) for t, mask in masks.items()}

    def _samples(self, task: str, samples: int, batch_size: int, seed: int) -> list[Batch]:
        return calibration_batches(
            self.tasks[task],
            self.models.encoder,
            count=min(samples, len(self.tasks[task].train)),
            batch_size=batch_size,
            max_length=self.tokens[task],
            seed=seed,
        )

    def fine_tune(
        self,
        row: Row,
        lr: float,
        seed: int,
        task: str,
        mask: Mask | None,
        on_step: Callable[[FineTuneStep], object],
    ) -> TaskVector:
        """Return the vector of a task.

        Args:
            row: the method and its settings.
            lr: the learning rate.
            seed: of the batches, dropout and the method.
            task: the task's name.
            mask: of a row that calibrates.
            on_step: called after each step.
        """
        training = row.training
        batches = training_batches(
            self.tasks[task],
            self.models.encoder,
            count=training.steps * training.accumulate * training.batch_size,
            batch_size=training.batch_size,
            max_length=self.tokens[task],
            seed=seed,
        )
        # Each task draws its own random mask, unless the row has a seed; the adapters of L-LoRA
        # begin alike in all tasks.
        own = seed_of(seed, task) if row.method == "random" else seed
        torch.manual_seed(seed)  # dropout
        try:
            return talos.fine_tune(
                self.models.classifiers[task],
                batches,
                method=method_of(row.method, mask, {"seed": own} | dict(row.settings)),
                steps=training.steps,
                lr=lr,
                warmup=training.warmup,
                weight_decay=training.weight_decay,
                accumulate=training.accumulate,
                autocast=None if training.autocast is None else torch.bfloat16,
                on_step=on_step,
            )
        finally:
            self.models.restore_()

    def drift(
        self, row: Row, lr: float, seed: int, task: str, mask: Mask | None, tick: Tick
    ) -> list[dict[str, Any]]:
        """Train a vector, and return how far the gradient at all weights drifts meanwhile.

        Args:
            row: as of `fine_tune`.
            lr: as of `fine_tune`.
            seed: as of `fine_tune`.
            task: as of `fine_tune`.
            mask: as of `fine_tune`.
            tick: called after each step.
        """
        batches = self._samples(task, _DRIFT_EXAMPLES, _DRIFT_BATCH, seed)
        model, steps = self.models.classifiers[task], row.training.steps
        every = max(1, steps * METHODS[row.method].phases // _DRIFT_POINTS)
        drift = GradientDrift(model, batches, every=every)

        def on_step(step: FineTuneStep) -> None:
            drift(step)
            tick(step.step, step.steps, step.loss)

        self.fine_tune(row, lr, seed, task, mask, on_step)
        initial = drift.initial or 1.0
        return [asdict(p) | {"ratio": p.squared / initial} for p in drift.points]


def check_rows(recipe: Recipe, model: nn.Module) -> None:
    """Refuse rows that select none of a model's weights, before long work begins.

    Args:
        recipe: whose rows are checked.
        model: the model.

    Raises:
        TalosValueError: `params` matches no weight, or a density gives too few or too many.
    """
    for row in recipe.rows:
        settings = dict(row.settings) if row.calibration is None else asdict(row.calibration)
        if "params" not in settings:
            continue
        try:
            entries = sum(e.numel for e in select_parameters(model, settings["params"]).values())
        except TalosValueError as error:
            raise TalosValueError(f"{error}; it is of the row {row.row}") from None
        wanted = round(settings.get("density", 1.0) * entries)
        tasks = len(recipe.tasks) if settings.get("disjoint") else 1
        if not 0 < wanted * tasks <= entries:
            shared = f" for each of {tasks} tasks" if tasks > 1 else ""
            raise TalosValueError(
                f"density must select 1 to {entries // tasks} weights{shared}, got "
                f"{settings['density']} of the row {row.row}, which selects {wanted}"
            )


def seed_of(seed: int, task: str) -> int:
    """Return a seed of a task's own.

    Args:
        seed: the seed of all tasks.
        task: the task's name.

    Example:
        >>> seed_of(0, "news") == seed_of(0, "news"), seed_of(0, "news") == seed_of(0, "films")
        (True, False)
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {task}".encode()).digest()[:7], "big")


def tokens_of(task: Task | ImageTask, encoder: Encoder, asked: int) -> int:
    """Return the tokens of a text: those asked for, or as many as the model takes.

    Args:
        task: the task.
        encoder: the model.
        asked: tokens per text.
    """
    most = encoder.most_tokens(task.class_texts) if task.reads == "texts" else None
    return asked if most is None else min(asked, most)


def data_of(
    task: Task | ImageTask, classifier: Classifier, tokens: int, weights: str
) -> dict[str, Any]:
    """Return what a task gives to a key: model, examples, labels, how the model reads them.

    Args:
        task: the task.
        classifier: its classifier.
        tokens: of a text.
        weights: the fingerprint of the model's weights.
    """
    return {
        "weights": weights,
        "reading": digest_of_reading(task, classifier, tokens),
        "task": task.name,
        "splits": [task.fingerprint(split) for split in ("train", "validation", "test")],
        "class_names": list(task.class_names),
        "class_texts": list(task.class_texts),
        "max_length": tokens if task.reads == "texts" else None,
    }
