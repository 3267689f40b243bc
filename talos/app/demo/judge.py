"""Correct answers on every example: one encoder, with a classifier and batches for each task."""

import random
from collections.abc import Callable, Mapping, Sequence
from copy import copy

import torch
from torch import Tensor, nn

from talos.app.demo.settings import DemoSettings
from talos.app.models import Encoder
from talos.app.tasks import ImageTask, Task, available_tasks, load_task
from talos.errors import TalosValueError
from talos.methods import LinearizedModel
from talos.names import named_parameters

__all__ = ["Judge", "calibration_batches", "load_tasks", "training_batches"]

Batch = dict[str, Tensor]


class Judge:
    """Evaluates the encoder with the weights that it has at the moment of the call.

    The classifiers are made at once, from the pretrained weights. Texts are sorted by length, which
    needs little padding; all answers are in that order.

    Args:
        encoder: the encoder that all tasks share; its weights are only read.
        tasks: the tasks.
        max_length: tokens per text.
        batch_size: examples per forward pass.

    Attributes:
        classifiers: a classifier of each task, around the shared encoder.
        control_stride: the number of other tasks.
        model: one of the classifiers, to apply edits to: the names of the encoder's weights are
            the same in all.
    """

    def __init__(
        self,
        encoder: Encoder,
        tasks: Sequence[Task | ImageTask],
        *,
        max_length: int = 48,
        batch_size: int = 128,
    ) -> None:
        self.encoder = encoder
        self.tasks = tasks
        self.device = encoder.device
        self.classifiers: dict[str, nn.Module] = {
            task.name: encoder.classifier(task.class_texts) for task in tasks
        }
        self.model = next(iter(self.classifiers.values()))
        self._base = {name: p.detach().clone() for name, p in named_parameters(self.model).items()}
        self.control_stride = max(1, len(tasks) - 1)
        self._batches = {
            (task.name, name): task.batches(
                split, encoder.tokenizer, batch_size=batch_size, max_length=max_length
            ).shortest_first(stride)
            for task in tasks
            for name, split, stride in (
                ("validation", "validation", 1),
                ("control", "validation", self.control_stride),
                ("test", "test", 1),
            )
        }

    def correct(self, task: str, split: str) -> Tensor:
        """Evaluate the encoder on one split of a task.

        Args:
            task: the task's name.
            split: "validation", "test", or "control": every `control_stride`-th validation
                example, so that all control tasks together cost as much as the target alone.

        Returns:
            bool [n] on the CPU, shortest example first.
        """
        classifier = self.classifiers[task]
        classifier.eval()
        with torch.no_grad():
            answers = []
            for each in self._batches[task, split]:
                batch = _moved(each, self.device)
                answers.append(classifier(batch).argmax(1) == batch["labels"])
        return torch.cat(answers).cpu()

    def all(self, split: str, tick: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
        """Evaluate the encoder on every task; call `tick` after each."""
        answers = {}
        for task in self.classifiers:
            answers[task] = self.correct(task, split)
            tick()
        return answers

    def linearized(self) -> "Judge":
        """Return a judge of the classifiers' first-order expansions around the same weights."""
        other = copy(self)
        other.classifiers = {
            task: LinearizedModel(each, base=self._base) for task, each in self.classifiers.items()
        }
        return other

    @torch.no_grad()
    def restore_(self) -> None:
        """Restore the weights that the encoder had when the judge was made."""
        for name, param in named_parameters(self.model).items():
            param.copy_(self._base[name])

    def examples(self, split: str) -> dict[str, int]:
        """Return the number of examples of each task in "validation" or "test"."""
        return {task.name: len(task.examples(split)) for task in self.tasks}


def load_tasks(settings: DemoSettings) -> list[Task]:
    """Load the tasks that the settings name, or the first of those available.

    Raises:
        TalosValueError: a task is unknown, or fewer are available than asked for.
    """
    names = list(settings.tasks)
    if not names:
        available = available_tasks()
        if len(available) < settings.task_count:
            raise TalosValueError(
                f"task_count must be at most {len(available)}, the tasks that this Python holds "
                f"enough text for ({', '.join(available)}), got {settings.task_count}"
            )
        names = available[: settings.task_count]
    # Always in the splits of seed 0, as in `talos eval`: no vector is judged on its training data.
    return [load_task(name, sizes=settings.sizes) for name in names]


def training_batches(
    task: Task | ImageTask,
    encoder: Encoder,
    *,
    count: int,
    batch_size: int,
    max_length: int,
    seed: int,
) -> list[Batch]:
    """Draw `count` examples of the training split, each epoch in another order.

    Returns:
        Batches on the encoder's device; the last one is cut to give `count` examples.
    """
    given = task.batches(
        "train", encoder.tokenizer, batch_size=batch_size, max_length=max_length, seed=seed
    )
    batches: list[Batch] = []
    epoch, left = 0, count
    while left > 0:
        given.set_epoch(epoch)
        for batch in given:
            part = {key: value[:left] for key, value in batch.items()}
            batches.append(_moved(part, encoder.device))
            left -= len(part["labels"])
            if left <= 0:
                break
        epoch += 1
    return batches


def calibration_batches(
    task: Task | ImageTask,
    encoder: Encoder,
    *,
    count: int,
    batch_size: int,
    max_length: int,
    seed: int,
) -> list[Batch]:
    """Draw `count` training examples, with those of similar length in one batch.

    So little padding is scored. The batches are in random order: a calibration compares one half
    of them with the other.

    Returns:
        Batches on the encoder's device.
    """
    given = task.batches(
        "train", encoder.tokenizer, batch_size=batch_size, max_length=max_length, seed=seed
    )
    batches = [_moved(batch, encoder.device) for batch in given.first(count).shortest_first()]
    random.Random(f"talos {seed}").shuffle(batches)
    return batches


def _moved(batch: Mapping[str, Tensor], device: torch.device) -> Batch:
    return {key: value.to(device) for key, value in batch.items()}
