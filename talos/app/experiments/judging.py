"""One encoder with a classifier, batches and judges for each task."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from talos.app.models import Classifier, Encoder
from talos.app.models.heads import classifier_for
from talos.app.tasks import Batches, ImageTask, Task
from talos.batches import evaluation_mode
from talos.evaluation import Judge, Outcomes, right_answers
from talos.methods import LinearizedModel
from talos.names import named_parameters
from talos.params import select_parameters

__all__ = ["Batch", "TaskModels", "calibration_batches", "logits_of", "training_batches"]

Batch = dict[str, Tensor]


class TaskModels:
    """A classifier for each task around one encoder, and what judges them.

    The classifiers are made at once, from the pretrained weights.

    Args:
        encoder: the encoder that all tasks share; its weights are only read.
        tasks: the tasks.

    Attributes:
        classifiers: a classifier of each task.
        model: the first of them; the names of the encoder's weights are the same in all.
    """

    def __init__(self, encoder: Encoder, tasks: Sequence[Task | ImageTask]) -> None:
        self.encoder = encoder
        self.tasks = tasks
        self.device = encoder.device
        self.classifiers: dict[str, Classifier] = {
            task.name: classifier_for(encoder, task) for task in tasks
        }
        self.model: nn.Module = next(iter(self.classifiers.values()))
        self._base = {name: p.detach().clone() for name, p in named_parameters(self.model).items()}

    def outcomes(
        self,
        *,
        max_length: int | Mapping[str, int] = 48,
        batch_size: int = 128,
        judge: Callable[[Iterable[Batch]], Judge] = right_answers,
        resamples: int = 2000,
        seed: int = 0,
    ) -> Outcomes:
        """Return the outcomes of the classifiers, in the order of the examples.

        Texts are judged the shortest first, which needs little padding.

        Args:
            max_length: tokens per text, of all tasks or for each.
            batch_size: examples per forward pass.
            judge: makes a judge from batches.
            resamples: of the bootstrap.
            seed: of the bootstrap.
        """
        names = [task.name for task in self.tasks]
        tokens = dict.fromkeys(names, max_length) if isinstance(max_length, int) else max_length

        def batches(task: Task | ImageTask, split: str) -> Batches:
            size = {"batch_size": batch_size, "max_length": tokens[task.name]}
            return task.batches(split, self.encoder.tokenizer, **size)

        validation, test = (
            {task.name: batches(task, split) for task in self.tasks}
            for split in ("validation", "test")
        )
        return Outcomes(
            self.classifiers,
            self._judges(judge, test),
            self._judges(judge, validation),
            resamples=resamples,
            seed=seed,
        )

    def _judges(
        self,
        judge: Callable[[Iterable[Batch]], Judge],
        batches: Mapping[str, Batches],
    ) -> dict[str, Judge]:
        return {
            task: _in_order(judge, each.shortest_first(), self.device)
            for task, each in batches.items()
        }

    def sizes(self) -> dict[str, int]:
        """Return the number of weights, and of those that a mask may select."""
        return {
            "parameters": sum(base.numel() for base in self._base.values()),
            "maskable": sum(each.numel for each in select_parameters(self.model).values()),
        }

    def linearized(self) -> dict[str, LinearizedModel]:
        """Return the classifiers' first-order expansions around the pretrained weights."""
        return {
            task: LinearizedModel(each, base=self._base) for task, each in self.classifiers.items()
        }

    @torch.no_grad()
    def restore_(self) -> None:
        """Restore the weights that the encoder had when the classifiers were made."""
        for name, param in named_parameters(self.model).items():
            param.copy_(self._base[name])


@dataclass(frozen=True)
class _Moved:
    """Batches on a device, as often as they are iterated."""

    batches: Batches
    device: torch.device

    def __iter__(self) -> Iterator[Batch]:
        return (_moved(batch, self.device) for batch in self.batches)


def _in_order(
    judge: Callable[[Iterable[Batch]], Judge], batches: Batches, device: torch.device
) -> Judge:
    """Return a judge of batches in any order, with outcomes in the order of the examples."""
    ask = judge(_Moved(batches, device))
    places = torch.tensor(batches.order(), dtype=torch.int64, device="cpu").argsort()
    return lambda module: ask(module)[places]


def logits_of(
    classifier: Classifier,
    task: Task | ImageTask,
    split: str,
    *,
    batch_size: int = 128,
    max_length: int = 48,
) -> Tensor:
    """Return the logits of a split's examples, [n, C] on the CPU, in their order.

    They are computed in the batches in which `TaskModels.outcomes` judges the examples: so the same
    examples have the same bits.

    Args:
        classifier: the classifier.
        task: the examples.
        split: "train", "validation" or "test".
        batch_size: examples per forward pass.
        max_length: tokens per text.
    """
    encoder = classifier.encoder
    size = {"batch_size": batch_size, "max_length": max_length}
    batches = task.batches(split, encoder.tokenizer, **size).shortest_first()
    with evaluation_mode(classifier), torch.no_grad():
        return _in_order(_logits, batches, encoder.device)(classifier)


def _logits(batches: Iterable[Batch]) -> Judge:
    return lambda module: torch.cat([module(batch) for batch in batches]).cpu()


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

    Examples of similar length share a batch, which needs little padding.

    Returns:
        Batches on the encoder's device; the last one is cut to give `count` examples.
    """
    given = task.batches(
        "train", encoder.tokenizer, batch_size=batch_size, max_length=max_length, seed=seed
    ).similar_lengths()
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
