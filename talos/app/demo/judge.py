"""Right or wrong on every example: one encoder, a classifier and batches for each task."""

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
    """Evaluates the encoder as it is at the moment of the call.

    The classifiers are made when the judge is, from the pretrained weights. Texts are sorted by
    length once, so that little is spent on padding; every answer comes in that same order.

    Args:
        encoder: the encoder that all tasks share; it is only read.
        tasks: the tasks.
        max_length: tokens a text.
        batch_size: examples a forward pass.

    Attributes:
        classifiers: a classifier for each task around the shared encoder.
        control_stride: the number of other tasks.
        model: one of them, to apply edits to: the encoder's weights have the same names in all.
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
        """Evaluates the encoder on one split.

        Args:
            task: the task's name.
            split: "validation", "test", or "control": every `control_stride`-th validation
                example, so that the control's tasks cost together what the target costs alone.

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

    def all(self, split: str, tick: Callable[[], None]) -> dict[str, Tensor]:
        """Evaluates the encoder on every task.

        Args:
            split: as `correct` takes it.
            tick: called after each task.

        Returns:
            What `correct` returns, for each task.
        """
        answers = {}
        for task in self.classifiers:
            answers[task] = self.correct(task, split)
            tick()
        return answers

    def linearized(self) -> "Judge":
        """Makes a judge of the classifiers' first-order expansions around the same weights.

        Returns:
            A judge that shares everything else with this one.
        """
        other = copy(self)
        other.classifiers = {
            task: LinearizedModel(each, base=self._base) for task, each in self.classifiers.items()
        }
        return other

    @torch.no_grad()
    def restore_(self) -> None:
        """Gives the encoder the weights that it had when the judge was made."""
        for name, param in named_parameters(self.model).items():
            param.copy_(self._base[name])

    def examples(self, split: str) -> dict[str, int]:
        """Counts a split's examples.

        Args:
            split: "validation" or "test".

        Returns:
            Their number for each task.
        """
        return {task: len(self._batches[task, split].labels) for task in self.classifiers}


def load_tasks(settings: DemoSettings) -> list[Task]:
    """Loads the tasks that the settings name, or the first of those available.

    Args:
        settings: names, count, seed and sizes.

    Returns:
        The tasks.

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
    # In the splits of seed 0, as in `talos eval`: no vector is judged on its training data.
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
    """Draws shuffled batches of the training split, epoch after epoch in another order.

    Args:
        task: the task.
        encoder: its tokenizer and device are used.
        count: number of examples; the last batch is cut to meet it.
        batch_size: examples a batch.
        max_length: tokens a text.
        seed: the seed.

    Returns:
        Batches on the encoder's device.
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
    """Draws training examples and puts those of like length into one batch.

    So little padding is scored. The batches come in a random order, for a calibration compares one
    half of them with the other.

    Args:
        task: the task.
        encoder: its tokenizer and device are used.
        count: number of examples, at most those of the training split.
        batch_size: examples a batch.
        max_length: tokens a text.
        seed: the seed.

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
