"""One run of `talos eval`: the model with its tasks and vectors, and what is written of it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from talos.app.cli.console import Bars
from talos.app.cli.forgetting import Forgetting
from talos.app.cli.measurements import MEASUREMENTS, Figures, Subject
from talos.app.cli.suggestions import of_model, subtracts
from talos.app.experiments.judging import TaskModels
from talos.app.models import Encoder
from talos.app.report.runs import to_hex
from talos.app.tasks import ImageTask, Task
from talos.errors import TalosValueError
from talos.evaluation import Judge, Outcomes, predictions, right_answers
from talos.task_vectors import TaskVector
from talos.task_vectors.editing import check_base, touched_weights
from talos.task_vectors.fingerprints import base_fingerprints
from talos.task_vectors.sums import origins

__all__ = ["Evaluation", "pair"]


def pair(
    tasks: Sequence[str], vectors: Sequence[TaskVector], forget: str | None = None
) -> dict[str, TaskVector]:
    """Return the vector of each task: of a task that it was made from, or of its place.

    Args:
        tasks: the names.
        vectors: the vectors.
        forget: the task that the only vector must belong to; None: there is none such.

    Raises:
        TalosValueError: there are more vectors than tasks, or two of one task. Or the vector
            was made from another task than the one to forget.

    Example:
        >>> import torch
        >>> from talos import Mask
        >>> mask = Mask.from_dense({"w": torch.ones(1) > 0})
        >>> first, second = (
        ...     TaskVector(mask, torch.ones(1), metadata={"task": task}) for task in ("b", "a")
        ... )
        >>> list(pair(["a", "b"], [first, second]))
        ['b', 'a']
    """
    if len(vectors) > len(tasks):
        raise TalosValueError(
            f"--data must be given for each --vector, got {len(tasks)} for {len(vectors)}"
        )
    found: dict[str, TaskVector] = {}
    for place, vector in enumerate(vectors):
        made = [of.get("task") for of in origins(vector.metadata)]
        own = [task for task in tasks if task in made]
        task = forget or tasks[place]
        if forget is not None and own not in ([], [forget]):
            raise TalosValueError(
                f"--forget must be the task of the vector, {' and '.join(own)}, got {forget}; pass "
                f"the vector of {forget}"
            )
        if own and task not in own:
            task = own[0]
        if task in found:
            raise TalosValueError(
                f"--vector must be given once for each task, got two of {task}; give the vectors "
                "in the order of --data"
            )
        found[task] = vector
    return found


class Evaluation:
    """Measures, and returns what is written.

    Args:
        encoder: the model.
        tasks: the tasks.
        vectors: each task's own vector.
        edit: as of `Subject`.
        coef: as of `Subject`.
        points: as of `Subject`.
        linearized: judge the model's first-order expansion.
        batch_size: examples per forward pass.
        max_length: tokens per text, for each task.
        seed: of the bootstrap.
        bars: shows progress.
        forgetting: as of `Subject`.

    Attributes:
        left_out: what each metric lacks that `all` leaves out.
    """

    def __init__(
        self,
        encoder: Encoder,
        tasks: Sequence[Task | ImageTask],
        vectors: dict[str, TaskVector],
        edit: TaskVector | None,
        coef: float | None,
        *,
        points: int | None,
        linearized: bool,
        batch_size: int,
        max_length: Mapping[str, int],
        seed: int,
        bars: Bars,
        forgetting: Forgetting | None = None,
    ) -> None:
        self._encoder, self._tasks = encoder, tasks
        self._batch_size, self._max_length = batch_size, max_length
        self._linearized, self._seed = linearized, seed
        self._models = TaskModels(encoder, tasks)
        self.left_out: dict[str, str] = {}
        self._subject = Subject(
            self._outcomes(right_answers),
            lambda: self._outcomes(predictions),
            vectors,
            edit,
            coef,
            points,
            bars,
            forgetting,
        )

    @property
    def chosen(self) -> float | None:
        """The coefficient at which the edit was measured; None: it was not."""
        return self._subject.chosen

    def _outcomes(self, judge: Callable[[Iterable[Any]], Judge]) -> Outcomes:
        outcomes = self._models.outcomes(
            max_length=self._max_length, batch_size=self._batch_size, judge=judge, seed=self._seed
        )
        return outcomes.through(self._models.linearized()) if self._linearized else outcomes

    def check(self, file: Path, vector: TaskVector) -> None:
        """Refuse a vector of another model.

        Raises:
            TalosError: names, shapes or fingerprints differ; the message leads with the file.
        """
        with of_model(file, vector.metadata, self._encoder.name):
            touched = touched_weights(self._models.model, vector.mask)
            found = base_fingerprints(touched, verify=bool(vector.fingerprints))
            check_base(found, vector.fingerprints)

    def choose(self, metrics: Sequence[str]) -> list[str]:
        """Return the metrics to measure, in the order of the table of metrics.

        Raises:
            TalosValueError: the vectors and tasks do not fit one that was named.
        """
        vectors = self._subject.vectors
        lacks: dict[str, str | None] = {
            name: each.lacks(vectors.values(), len(self._tasks))
            for name, each in MEASUREMENTS.items()
        }
        if self._linearized:
            lacks["linearity"] = "--linearized must be left out, got it"
        if any(subtracts(vector.metadata) for vector in vectors.values()):
            lacks["negation"] = "--vector must be that of a task, got one that subtracts a vector"
        for name in metrics:
            if name != "all" and (lack := lacks[name]) is not None:
                raise TalosValueError(f"{lack}; or leave out --metric {name}")
        if not metrics:
            metrics = ["accuracy", "addition"] if len(vectors) > 1 else ["accuracy"]
        if "all" in metrics:
            self.left_out = {name: lack for name, lack in lacks.items() if lack is not None}
        return [
            name
            for name in MEASUREMENTS
            if name in metrics or ("all" in metrics and not lacks[name])
        ]

    def run(self, metrics: Sequence[str]) -> dict[str, Figures]:
        """Measure; return the figures of each metric."""
        return {name: MEASUREMENTS[name].measure(self._subject) for name in metrics}

    def doubts(self, found: Mapping[str, Figures]) -> Iterator[str]:
        """Yield a warning for each negation whose control was only guessed before the edit."""
        one = self._subject.forgetting
        for task, each in found.get("negation", {}).items():
            kept = [t for t in self._tasks if (t.name in one.control if one else t.name != task)]
            guess = fmean(1 / len(control.class_names) for control in kept)
            before = each["grid"][0]["control"]
            if before <= guess:
                yield (
                    f"warning: the control of {task} ({', '.join(each.name for each in kept)}) has "
                    f"{100 * before:.1f} % before the edit on validation examples, no more than by "
                    "guessing: to keep a share of that means little; pass another --control"
                )

    def record(
        self,
        found: Mapping[str, Figures],
        model: str,
        data: Sequence[str],
        files: Mapping[str, Path],
        merged: Path | None,
    ) -> dict[str, Any]:
        """Return what --json writes, in the schema of `talos.app.report.runs`.

        Args:
            found: the figures of each metric.
            model: the option --model.
            data: the options --data.
            files: of each task's vector.
            merged: the file of --merged.
        """
        subject = self._subject
        answers: dict[str, Mapping[str, Tensor]] = {"pretrained": subject.before}
        if subject.edited is not None:
            answers["edited"] = subject.edited
        if len(subject.vectors) > 1:
            answers["single"] = subject.single
        return {
            "model": model,
            "linearized": self._linearized,
            "seed": self._seed,
            "tasks": {
                task.name: {
                    "data": source,
                    "examples": len(task.test),
                    "fingerprint": task.fingerprint(),
                    "max_length": self._max_length[task.name] if task.reads == "texts" else None,
                }
                for task, source in zip(self._tasks, data, strict=True)
            },
            "vectors": [
                {
                    "file": str(files[task]),
                    "task": task,
                    "entries": vector.mask.nnz,
                    "metadata": vector.metadata,
                }
                for task, vector in subject.vectors.items()
            ],
            "merged": None if merged is None else str(merged),
            "scaling_coef": subject.chosen,
            "outcomes": {
                kind: {task: to_hex(each) for task, each in own.items()}
                for kind, own in answers.items()
            },
            "metrics": dict(found),
        }
