"""What `talos eval` can measure: each metric, what it takes, and its figures as JSON."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from talos.app.cli.console import Bars
from talos.app.cli.forgetting import KEEP, Forgetting
from talos.evaluation import (
    Estimate,
    Outcomes,
    addition,
    disentanglement,
    interference,
    linearity,
    mask_similarity,
    negation,
    scaling_coefs,
    sensitivity_transfer,
)
from talos.evaluation.coefficients import choose, why_zero
from talos.evaluation.intervals import Model, Picked, over_tasks
from talos.task_vectors import TaskVector

__all__ = ["MEASUREMENTS", "Figures", "Measurement", "Subject"]

Figures = dict[str, Any]
_GRID_POINTS = 11


@dataclass
class Subject:
    """What is measured, and what several metrics share.

    Attributes:
        outcomes: right or wrong answers.
        predictions: returns the outcomes of judges that predict.
        vectors: each task's own vector.
        edit: the vector that is applied to all tasks: the only one, or a merge of several; None:
            the sum of several.
        coef: its scaling coefficient; None: chosen on validation examples.
        points: number of coefficients from 0 to 1 that a search tries.
        bars: shows progress.
        forgetting: what negation forgets; None: each task that has a vector, with all others as
            its control.
        edited: the right answers of the edit at its coefficient, once they are known.
        chosen: that coefficient.
    """

    outcomes: Outcomes
    predictions: Callable[[], Outcomes]
    vectors: dict[str, TaskVector]
    edit: TaskVector | None
    coef: float | None
    points: int | None
    bars: Bars
    forgetting: Forgetting | None = None
    edited: dict[str, Tensor] | None = field(default=None, init=False)
    chosen: float | None = field(default=None, init=False)

    @property
    def coefs(self) -> list[float]:
        """The coefficients that a search tries."""
        return scaling_coefs(self.points or 21)

    @cached_property
    def before(self) -> dict[str, Tensor]:
        """The right answers of the pretrained model."""
        return self.answers("pretrained")

    @cached_property
    def single(self) -> dict[str, Tensor]:
        """The right answers of each task's own vector."""
        found: dict[str, Tensor] = {}
        for task in self.bars.each("single tasks", list(self.vectors)):
            found |= self.outcomes.of("test", self.vectors[task], tasks=[task])
        return found

    def answers(
        self, label: str, vector: TaskVector | None = None, coef: float = 1.0
    ) -> dict[str, Tensor]:
        """Return a model's right answers on every task."""
        found: dict[str, Tensor] = {}
        for task in self.bars.each(label, self.outcomes.tasks):
            found |= self.outcomes.of("test", vector, coef, [task])
        return found

    def accuracies(self, outcomes: Mapping[str, Model]) -> dict[str, Estimate]:
        """Estimate the accuracy on each task."""
        mean = self.outcomes.bootstrap.mean
        return {task: mean({task: each}) for task, each in outcomes.items()}

    def counted(self, label: str, total: int) -> Callable[..., None]:
        """Return a function that moves a bar by one at each call."""
        done = 0

        def step(*_: object) -> None:
            nonlocal done
            done += 1
            self.bars.show(label, done, total)

        self.bars.show(label, 0, total)
        return step


@dataclass(frozen=True)
class Measurement:
    """A metric of `talos eval`.

    Attributes:
        measure: measures.
        about: what it is, for --help.
        vectors: the fewest vectors that it takes.
        most: the most vectors.
        tasks: the fewest tasks.
        sparse: whether every vector must select a part of the weights.
    """

    measure: Callable[[Subject], Figures]
    about: str
    vectors: int = 1
    most: int | None = None
    tasks: int = 1
    sparse: bool = False

    def lacks(self, vectors: Iterable[TaskVector], tasks: int) -> str | None:
        """Return what this metric lacks, as an error words it; None: nothing."""
        vectors = list(vectors)
        if len(vectors) < self.vectors or len(vectors) > (self.most or len(vectors)):
            least = "" if self.most == self.vectors else "at least "
            return f"--vector must be given {least}{self.vectors} times, got {len(vectors)}"
        if tasks < self.tasks:
            return f"--data must be given at least {self.tasks} times, got {tasks}"
        if self.sparse and any(vector.mask.density == 1 for vector in vectors):
            return "--vector must select a part of the weights, got one of all of them"
        return None


def _accuracy(subject: Subject) -> Figures:
    before = subject.before
    after: Mapping[str, Model] = {}
    figures: Figures = {}
    kind = "single" if len(subject.vectors) > 1 else "edited"
    if kind == "single":
        figures["scaling_coef"], after = 1.0, subject.single
    elif subject.edit is not None:
        if subject.coef is None:
            figures, picked = _search(subject, subject.edit)
            after, subject.edited = picked, {task: each.taken for task, each in picked.items()}
        else:
            figures = {"scaling_coef": subject.coef}
            after = subject.edited = subject.answers("edited", subject.edit, subject.coef)
        subject.chosen = figures["scaling_coef"]
    gain = subject.outcomes.bootstrap.gain
    tasks: dict[str, dict[str, Estimate]] = {}
    for task, accuracy in subject.accuracies(before).items():
        tasks[task] = {"pretrained": accuracy}
        if task in after:
            own = {task: after[task]}
            tasks[task][kind] = subject.accuracies(own)[task]
            tasks[task]["difference"] = gain(own, {task: before[task]})
    return {**figures, "tasks": tasks}


def _search(subject: Subject, edit: TaskVector) -> tuple[Figures, dict[str, Picked]]:
    """Choose a coefficient by the mean validation accuracy; return it and the right answers."""
    outcomes, coefs = subject.outcomes, subject.coefs
    with outcomes.resident(edit):
        found = [outcomes.of("validation", edit, c) for c in subject.bars.each("grid", coefs)]
        table = outcomes.table("validation", found, over_tasks)
        places = choose(coefs, table, highest=True)
        picked = outcomes.picked(edit, coefs, places, outcomes.tasks)
    means, place = table[0].tolist(), int(places[0])
    figures = {
        "grid": [
            {"scaling_coef": coef, "absolute": mean, "tasks": outcomes.figures(each)}
            for coef, mean, each in zip(coefs, means, found, strict=True)
        ],
        "scaling_coef": coefs[place],
        "why_zero": why_zero(coefs, means, place, highest=True),
    }
    return figures, picked


def _addition(subject: Subject) -> Figures:
    single = subject.accuracies(subject.single)
    coefs = subject.coefs if subject.coef is None else [subject.coef]
    on_point = subject.counted("addition", len(coefs))
    found = addition(
        subject.outcomes, subject.vectors, subject.edit, coefs=coefs, on_point=on_point
    )
    subject.edited, subject.chosen = found.outcomes, found.scaling_coef
    return {
        "grid": [asdict(point) for point in found.grid] if len(coefs) > 1 else [],
        "scaling_coef": found.scaling_coef,
        "why_zero": found.why_zero,
        "absolute": found.absolute,
        "normalised": found.normalised,
        "tasks": found.tasks,
        "single": single,
    }


def _negation(subject: Subject) -> Figures:
    figures = {}
    one = subject.forgetting
    for task in subject.vectors if one is None else [one.target]:
        vector = subject.vectors[task]
        label, total = f"negation {task}", len(subject.coefs)
        step = subject.counted(label, total)
        found = negation(
            subject.outcomes,
            vector,
            task,
            control=None if one is None else one.control,
            control_share=KEEP if one is None else one.keep,
            coefs=subject.coefs,
            on_point=step,
        )
        if len(found.grid) < total:  # it gave up
            subject.bars.show(label, total, total)
        figures[task] = asdict(found)
        del figures[task]["picked"]
        if one is not None:
            subject.chosen = 0.0 - found.scaling_coef
            subject.edited = subject.answers("forgot", vector, subject.chosen)
    return figures


def _interference(subject: Subject) -> Figures:
    for task, vector in subject.vectors.items():
        subject.answers(f"interference of {task}", vector)
    return dict(interference(subject.outcomes, subject.vectors))


def _disentanglement(subject: Subject) -> Figures:
    coefs = scaling_coefs(subject.points or _GRID_POINTS)
    step = subject.counted("disentanglement", len(coefs) ** 2)
    outcomes = subject.predictions()
    errors = disentanglement(outcomes, subject.vectors, coefs=coefs, on_point=step)
    return {"tasks": list(subject.vectors), "scaling_coefs": coefs, "error": errors.tolist()}


def _linearity(subject: Subject) -> Figures:
    coef = subject.coef if len(subject.vectors) == 1 and subject.coef is not None else 1.0
    figures = {}
    for task in subject.bars.each("linearity", list(subject.vectors)):
        found = linearity(subject.outcomes, {task: subject.vectors[task]}, coef=coef)[task]
        figures[task] = {
            "tuned": found.tuned,
            "expansion": found.expansion,
            "difference": found.gain,
            "equal": found.equal,
        }
    return figures


def _iou(subject: Subject) -> Figures:
    found = mask_similarity({task: each.mask for task, each in subject.vectors.items()})
    return {
        "tasks": list(found.tasks),
        "iou": found.iou.tolist(),
        "by_chance": found.by_chance.tolist(),
    }


def _sensitivity(subject: Subject) -> Figures:
    figures: Figures = {}
    for task in subject.bars.each("sensitivity", list(subject.vectors)):
        figures |= sensitivity_transfer(subject.outcomes, {task: subject.vectors[task].mask})
    return figures


MEASUREMENTS: dict[str, Measurement] = {
    "accuracy": Measurement(_accuracy, "with and without the vector", vectors=0),
    "addition": Measurement(
        _addition, "one model for all tasks: absolute and normalised accuracy", vectors=2
    ),
    "negation": Measurement(_negation, "forgetting a task, with the others as control", tasks=2),
    "interference": Measurement(_interference, "each vector on every task", tasks=2),
    "disentanglement": Measurement(
        _disentanglement, "error on a grid of two coefficients", vectors=2, most=2
    ),
    "linearity": Measurement(_linearity, "the tuned model beside its first-order expansion"),
    "iou": Measurement(_iou, "overlap of the vectors' masks", vectors=2, sparse=True),
    "sensitivity": Measurement(
        _sensitivity, "every task without the weights that a vector selects", sparse=True
    ),
}
"""Every metric by its name."""
