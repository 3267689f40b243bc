"""The finished cells of an experiment, and what their sums share: examples, resamples, seeds."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from talos.app.experiments.places import Place
from talos.app.experiments.recipe import Recipe, Row
from talos.app.experiments.store import Cell
from talos.app.tasks import ImageTask, Task
from talos.evaluation import Bootstrap

__all__ = ["Gathered"]


class Gathered:
    """The cells of an experiment, by their places.

    Args:
        recipe: the recipe.
        tasks: the tasks.
    """

    def __init__(self, recipe: Recipe, tasks: Sequence[Task | ImageTask]) -> None:
        self.recipe, self.tasks = recipe, list(tasks)
        self.cells: dict[Place, Cell] = {}
        self.models: dict[str, dict[str, Any]] = {}
        self.chosen: dict[tuple[str, str], float] = {}

    @property
    def names(self) -> list[str]:
        """The names of the tasks."""
        return [task.name for task in self.tasks]

    @cached_property
    def examples(self) -> dict[str, int]:
        """The number of test examples of each task."""
        return {task.name: len(task.test) for task in self.tasks}

    @cached_property
    def bootstrap(self) -> Bootstrap:
        """Of the test examples."""
        return Bootstrap(self.examples, resamples=self.recipe.evaluation.resamples)

    def done(self) -> list[tuple[str, Row]]:
        """Return the models and rows that are measured with all seeds."""
        return [
            (model, row)
            for model in self.models
            for row in self.recipe.rows
            if (model, row.row) in self.chosen
        ]

    def failed(self, place: Place) -> bool:
        """Return whether the vectors of an addition's cell could not be trained."""
        if place.kind != "addition":
            return False
        vectors = self.of_tasks(place._replace(kind="vector"))
        return any("failed" in each for each in vectors.values())

    def seeds(self, model: str, row: Row) -> list[int]:
        """Return the seeds with which a row could be trained at its chosen rate."""
        lr = self.chosen[model, row.row]
        place = Place("addition", model, row.row, lr)
        return [seed for seed in self.recipe.seeds if not self.failed(place._replace(seed=seed))]

    def of_tasks(self, place: Place) -> dict[str, Any]:
        """Return what the cells of all tasks found at a place."""
        return {name: self.cells[place._replace(task=name)].found for name in self.names}
