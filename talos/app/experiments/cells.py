"""How the cells of one model are made: zero-shot answers, masks, vectors, and what they are worth.

A cell depends on its key alone. Every draw inside it has a seed of the key, and what it takes from
other cells it reads from their files. So it has the same bits whichever cells were made before it,
in this process or in another.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from statistics import median
from typing import Any, TypeVar

import torch

from talos.app.experiments import measures
from talos.app.experiments.answers import pack, unpack
from talos.app.experiments.judging import TaskModels
from talos.app.experiments.machine import forget_peak, peak_bytes
from talos.app.experiments.measures import Tick
from talos.app.experiments.places import Place
from talos.app.experiments.recipe import Recipe, Row
from talos.app.experiments.settings import Calibration
from talos.app.experiments.store import Cell, Key, Store
from talos.app.experiments.training import Trainer, data_of, tokens_of
from talos.app.models import Encoder
from talos.app.provenance import base_of, digest_of_weights, made_with
from talos.app.tasks import ImageTask, Task
from talos.errors import TalosValueError
from talos.evaluation import Outcomes, predictions, scaling_coefs
from talos.masks import Mask
from talos.merging import merge_of
from talos.names import named_parameters
from talos.task_vectors import TaskVector
from talos.tensors import trim_heap
from talos.training import FineTuneStep

__all__ = ["Cells", "Made"]

F = TypeVar("F", Mask, TaskVector)

_LAST = 10  # steps whose mean loss is the last one
_OF_DATA = ("max_length", "sizes")  # in every key by themselves: tokens, and fingerprints of splits


@dataclass(frozen=True)
class Made:
    """What a cell holds.

    Attributes:
        found: as of `Cell`.
        step_seconds: as of `Cell`.
    """

    found: dict[str, Any]
    step_seconds: float | None = None


class Cells:
    """The cells of a model, each made at most once.

    Args:
        recipe: the recipe.
        name: the model's name.
        encoder: the model; its weights are restored after each cell.
        tasks: the tasks.
        store: where cells are kept.
        on_tick: called while a cell is made.
    """

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        encoder: Encoder,
        tasks: Sequence[Task | ImageTask],
        store: Store,
        on_tick: Tick,
    ) -> None:
        self.recipe, self.name, self.store = recipe, name, store
        self.tasks = {task.name: task for task in tasks}
        self.models = TaskModels(encoder, tasks)
        self._on_tick = on_tick
        self._tokens = {
            task.name: tokens_of(task, encoder, recipe.training.max_length) for task in tasks
        }
        self._trainer = Trainer(self.models, self.tasks, self._tokens)
        self._shared: tuple[Calibration | None, int, dict[str, Mask]] = (None, 0, {})
        weights = digest_of_weights(named_parameters(self.models.model))
        self._data = {
            name: data_of(self.tasks[name], classifier, self._tokens[name], weights)
            for name, classifier in self.models.classifiers.items()
        }
        sizes = self.models.sizes()
        self.facts = {**sizes, "dense_bytes": 4 * sizes["parameters"]}

    @cached_property
    def outcomes(self) -> Outcomes:
        """The right answers of the model and its edits; it knows those of the pretrained model."""
        outcomes = self._outcomes()
        for task in self.tasks:
            found = self.pretrained(task).found
            for split in ("validation", "test"):
                outcomes.remember(split, unpack({task: found[split]}, self.examples(split)))
        return outcomes

    def _outcomes(self, **options: Any) -> Outcomes:
        evaluation = self.recipe.evaluation
        return self.models.outcomes(
            max_length=self._tokens,
            batch_size=evaluation.batch_size,
            resamples=evaluation.resamples,
            **options,
        )

    @cached_property
    def _expansions(self) -> Outcomes:
        return self.outcomes.through(self.models.linearized())

    def judged(self, row: Row) -> Outcomes:
        """Return the outcomes of a row's edits: those of linearized training on the expansion."""
        return self._expansions if row.method == "linearized" else self.outcomes

    def examples(self, split: str) -> dict[str, int]:
        """Return the number of examples of each task."""
        return {name: len(task.examples(split)) for name, task in self.tasks.items()}

    def make(self, place: Place, row: Row | None = None) -> Cell:
        """Return the cell of a place; it is made if it is not done yet.

        Args:
            place: the place.
            row: the place's row; None: of all.
        """
        if row is None:
            return self.pretrained(place.task)
        kind, lr, seed, task = place.kind, place.lr, place.seed, place.task
        if kind == "mask":
            return self.mask(row, seed, task)
        if kind == "addition":
            return self.addition(row, lr, seed)
        of_tasks = {"vector": self.vector, "negation": self.negation, "drift": self.drift}
        if kind in of_tasks:
            return of_tasks[kind](row, lr, seed, task)
        return self.measured(kind, row, lr, seed)

    def pretrained(self, task: str) -> Cell:
        """Return the cell of the pretrained model's right answers on one task."""

        def make(tick: Tick) -> Made:
            outcomes, found = self._outcomes(), {}
            for split in ("validation", "test"):
                found[split] = pack(outcomes.of(split, tasks=[task]))[task]
            return Made(found)

        content = {"batch_size": self.recipe.evaluation.batch_size, **self._data[task]}
        return self._cell("pretrained", (task,), content, make)

    def mask(self, row: Row, seed: int, task: str) -> Cell:
        """Return the cell of a task's mask: of a row that calibrates."""
        calibration = row.calibration
        assert calibration is not None

        def make(tick: Tick) -> Made:
            if calibration.disjoint:
                mask = self._disjoint(calibration, seed, tick)[task]
            else:
                mask = self._trainer.calibrate(task, calibration, seed, tick)
            made = self._made_with(task)
            made["base"] = base_of(mask, self.models.classifiers[task])
            saved = self.store.save(key, replace(mask, metadata=mask.metadata | made))
            return Made({**saved, "nnz": mask.nnz, "stability": mask.metadata.get("stability")})

        key = self._mask_key(calibration, seed, task)
        return self._made(key, make)

    def _mask_key(self, calibration: Calibration, seed: int, task: str) -> Key:
        settings = asdict(calibration)
        disjoint = settings.pop("disjoint")
        content = {**self._data[task], "calibration": settings, "seed": seed}
        if disjoint:
            content["disjoint"] = list(self._data.values())  # in the order of their turns
        words = ("talos", f"density-{calibration.density:g}", f"seed-{seed}", task)
        return self._key("mask", words, content)

    def _disjoint(self, calibration: Calibration, seed: int, tick: Tick) -> dict[str, Mask]:
        """Return the disjoint masks of all tasks, which the cells of the tasks share."""
        if self._shared[:2] != (calibration, seed):
            masks = self._trainer.calibrate_disjoint(calibration, seed, tick)
            self._shared = calibration, seed, masks
        return self._shared[2]

    def vector(self, row: Row, lr: float, seed: int, task: str) -> Cell:
        """Return the cell of a task's vector, with the right answers of its own model."""

        def make(tick: Tick) -> Made:
            return self._trained(row, lr, seed, task, key, tick)

        key = self._vector_key(row, lr, seed, task)
        return self._made(key, make)

    def _vector_key(self, row: Row, lr: float, seed: int, task: str) -> Key:
        training = {k: v for k, v in asdict(row.training).items() if k not in _OF_DATA}
        content: dict[str, Any] = {**self._data[task], "method": row.method, "training": training}
        content |= {"settings": dict(row.settings), "lr": lr, "seed": seed}
        content["batch_size"] = self.recipe.evaluation.batch_size
        if row.calibration is not None:
            content["mask"] = self._mask_key(row.calibration, seed, task).digest[:16]
        settings = [f"{key}-{value}" for key, value in row.settings.items()]
        if row.calibration is not None:
            settings = [f"density-{row.calibration.density:g}"]
        words = (row.method, *settings, f"lr-{lr:g}", f"seed-{seed}", task)
        return self._key("vector", words, content)

    def _trained(self, row: Row, lr: float, seed: int, task: str, key: Key, tick: Tick) -> Made:
        mask = None if row.calibration is None else self._load_mask(row, seed, task)
        times: list[float] = [time.perf_counter()]
        losses: list[float] = []

        def on_step(step: FineTuneStep) -> None:
            times.append(time.perf_counter())
            losses.append(step.loss)
            tick(step.step, step.steps, step.loss)

        try:
            vector = self._trainer.fine_tune(row, lr, seed, task, mask, on_step)
        except TalosValueError as error:
            if not losses:  # it could not begin
                raise
            return Made({"failed": str(error)})
        made = self._made_with(task, steps=row.training.steps, lr=lr, seed=seed)
        # What is evaluated are the values of the file: bfloat16, 2 bytes per entry.
        vector = replace(vector, metadata=vector.metadata | made).astype(torch.bfloat16)
        saved = self.store.save(key, vector)
        outcomes = self.judged(row)
        with outcomes.resident(vector):
            answers = {
                split: pack(outcomes.of(split, vector, tasks=[task]))[task]
                for split in ("validation", "test")
            }
        last = losses[-_LAST:]
        steps = sorted(after - before for before, after in pairwise(times))
        return Made(
            {
                **saved,
                "entries": vector.mask.nnz,
                "steps": len(losses),
                "first_loss": losses[0],
                "last_loss": sum(last) / len(last),
                **answers,
            },
            step_seconds=median(steps),
        )

    def addition(self, row: Row, lr: float, seed: int) -> Cell:
        """Return the cell of one model for all tasks: the row's vectors, merged."""

        def make(tick: Tick) -> Made:
            vectors = {task: self.load_vector(row, lr, seed, task) for task in self.tasks}
            coefs = [most * each for each in scaling_coefs(evaluation.coefficients)]
            merged = merge.merge(vectors.values())
            return Made(measures.add(self.judged(row), vectors, merged, coefs, tick))

        evaluation = self.recipe.evaluation
        settings = {key: value for key, value in row.merge.items() if key != "method"}
        merge = merge_of(row.merge["method"], settings)
        most = len(self.tasks) if merge.averages else 1
        content = {
            "vectors": self._vectors(row, lr, seed, self.tasks),
            "merge": dict(row.merge),
            "coefficients": evaluation.coefficients,
            "resamples": evaluation.resamples,
        } | ({"largest": most} if most > 1 else {})
        return self._cell("addition", (row.row, f"lr-{lr:g}", f"seed-{seed}"), content, make)

    def negation(self, row: Row, lr: float, seed: int, task: str) -> Cell:
        """Return the cell of forgetting a task."""

        def make(tick: Tick) -> Made:
            vector = self.load_vector(row, lr, seed, task)
            return Made(measures.negate(self.judged(row), vector, task, evaluation, tick))

        evaluation = self.recipe.evaluation
        content = {
            "target": task,
            "vector": self._vector_key(row, lr, seed, task).digest[:16],
            "tasks": list(self._data.values()),
            "coefficients": evaluation.coefficients,
            "control_share": evaluation.control_share,
            "resamples": evaluation.resamples,
        }
        words = (row.method, f"lr-{lr:g}", f"seed-{seed}", task)
        return self._cell("negation", words, content, make)

    def measured(self, kind: str, row: Row, lr: float, seed: int) -> Cell:
        """Return the cell of a measure of all vectors of a row.

        Args:
            kind: overlap, interference, disentanglement, linearity or sensitivity.
            row: the row.
            lr: the learning rate.
            seed: the seed.
        """

        def load(task: str) -> TaskVector:
            return self.load_vector(row, lr, seed, task)

        def make(tick: Tick) -> Made:
            if kind == "disentanglement":
                outcomes = self._outcomes(judge=predictions)
                if row.method == "linearized":
                    outcomes = outcomes.through(self.models.linearized())
                vectors = {task: load(task) for task in names}
                return Made(measures.disentangle(outcomes, vectors, evaluation.map_points, tick))
            if kind == "overlap":
                return Made(measures.overlap({task: load(task).mask for task in names}))
            measure = getattr(measures, kind)
            return Made(measure(self.judged(row), names, load, tick))

        evaluation = self.recipe.evaluation
        pair = evaluation.pair or tuple(self.tasks)[:2]
        names = pair if kind == "disentanglement" else tuple(self.tasks)
        content: dict[str, Any] = {"vectors": self._vectors(row, lr, seed, names)}
        if kind == "disentanglement":
            content["coefficients"] = evaluation.map_points
        if kind != "overlap":
            content["resamples"] = evaluation.resamples
        return self._cell(kind, (row.method, f"lr-{lr:g}", f"seed-{seed}"), content, make)

    def drift(self, row: Row, lr: float, seed: int, task: str) -> Cell:
        """Return the cell of the gradient's drift, for which a vector is trained once more."""

        def make(tick: Tick) -> Made:
            mask = None if row.calibration is None else self._load_mask(row, seed, task)
            return Made({"points": self._trainer.drift(row, lr, seed, task, mask, tick)})

        vector = self._vector_key(row, lr, seed, task).digest[:16]
        content = {"vector": vector, "measured": "all weights"}
        words = (row.method, f"lr-{lr:g}", f"seed-{seed}", task)
        return self._cell("drift", words, content, make)

    def load_vector(self, row: Row, lr: float, seed: int, task: str) -> TaskVector:
        """Read a vector, and tell the outcomes what its own model answered."""
        cell, vector = self._loaded(TaskVector, lambda: self.vector(row, lr, seed, task))
        for split in ("validation", "test"):
            known = unpack({task: cell.found[split]}, self.examples(split))
            self.judged(row).remember(split, known, vector)
        return vector

    def _load_mask(self, row: Row, seed: int, task: str) -> Mask:
        return self._loaded(Mask, lambda: self.mask(row, seed, task))[1]

    def _loaded(self, kind: type[F], make: Callable[[], Cell]) -> tuple[Cell, F]:
        """Return a cell with its mask or vector; one that is damaged is made anew."""
        cell = make()
        try:
            return cell, kind.load(self.store.folder / cell.found["file"])
        except TalosValueError as error:
            self.store.forget(cell, error)
        cell = make()
        return cell, kind.load(self.store.folder / cell.found["file"])

    def _vectors(self, row: Row, lr: float, seed: int, names: Iterable[str]) -> list[list[str]]:
        """Return the tasks and vectors of a key, in an order that decides matrices and sums."""
        return [[task, self._vector_key(row, lr, seed, task).digest[:16]] for task in names]

    def _made_with(self, task: str, **settings: object) -> dict[str, Any]:
        return made_with(self.tasks[task], self.models.encoder, self._tokens[task], **settings)

    def _key(self, kind: str, words: Sequence[str], content: Mapping[str, Any]) -> Key:
        return Key(kind, (self.name, *words), content)

    def _cell(
        self,
        kind: str,
        words: Sequence[str],
        content: Mapping[str, Any],
        make: Callable[[Tick], Made],
    ) -> Cell:
        return self._made(self._key(kind, words, content), make)

    def _made(self, key: Key, make: Callable[[Tick], Made]) -> Cell:
        """Return a finished cell, or make it."""
        cell = self.store.read(key)
        if cell is not None:
            return cell
        forget_peak()
        start = time.perf_counter()
        self._on_tick(0, 1, None)
        made = make(self._on_tick)
        seconds = time.perf_counter() - start
        trim_heap()
        return self.store.write(key, made.found, seconds, peak_bytes(), made.step_seconds)
