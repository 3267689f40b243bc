"""What a run of a recipe will do: the part of it that is asked for, its cells, time and space."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean
from typing import TypeVar

import torch

from talos.app.experiments.cells import Cells
from talos.app.experiments.gathered import Gathered
from talos.app.experiments.judging import TaskModels, training_batches
from talos.app.experiments.machine import forget_peak, peak_bytes
from talos.app.experiments.places import Place, all_places, judged_places, swept_places
from talos.app.experiments.recipe import Recipe, Row
from talos.app.experiments.results import chosen_rate
from talos.app.experiments.store import Cell, Key, Store
from talos.app.experiments.training import check_rows
from talos.app.models import Encoder
from talos.app.nearest import did_you_mean
from talos.app.tasks import ImageTask, Task
from talos.errors import TalosValueError
from talos.methods import METHODS
from talos.training import fine_tune

__all__ = ["Estimate", "Probe", "estimates", "finished", "is_done", "probe", "select", "space"]

T = TypeVar("T")


def is_done(recipe: Recipe, out: Path) -> bool:
    """Return whether a folder holds the results of a recipe.

    Args:
        recipe: the recipe.
        out: the folder, which may be missing.
    """
    try:
        read = json.loads((out / "results.json").read_text(encoding="utf-8"))
        return bool(read["recipe"] == json.loads(json.dumps(recipe.plain())))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def select(recipe: Recipe, only: Sequence[str]) -> Recipe:
    """Return a part of a recipe.

    Args:
        recipe: the recipe.
        only: names of models, rows, tasks and measures, with `*` and `?` as wildcards. Where none
            of them is a model, all models stay, and likewise for rows, tasks and measures.

    Raises:
        TalosValueError: a name is unknown, or too few tasks are left.

    Example:
        >>> from talos.app.experiments import read_recipe
        >>> part = select(read_recipe("density"), ["talos*", "minilm", "addition"])
        >>> [row.row for row in part.rows], part.evaluation.measures
        (['talos-density-0.1', 'talos-density-0.01', 'talos-density-0.3'], ('addition',))
    """
    evaluation = recipe.evaluation
    models = [each.name for each in recipe.models]
    rows = [each.row for each in recipe.rows]
    tasks = [each.title for each in recipe.tasks]
    known = [*models, *rows, *tasks, *evaluation.measures]
    for pattern in only:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise TalosValueError(
                f"only must name models, rows, tasks or measures of the recipe, got {pattern}"
                f"{did_you_mean(pattern, known) or '; there are ' + ', '.join(known)}"
            )
    return replace(
        recipe,
        models=_matching(recipe.models, models, only),
        rows=_matching(recipe.rows, rows, only),
        tasks=_matching(recipe.tasks, tasks, only),
        evaluation=replace(
            evaluation, measures=_matching(evaluation.measures, evaluation.measures, only)
        ),
    )


def _matching(entries: Sequence[T], names: Sequence[str], only: Sequence[str]) -> tuple[T, ...]:
    """Return the entries whose names match; all, where none does."""
    chosen = [
        entry
        for entry, name in zip(entries, names, strict=True)
        if any(fnmatchcase(name, pattern) for pattern in only)
    ]
    return tuple(chosen or entries)


@dataclass(frozen=True)
class Probe:
    """What a model costs on this machine, measured on one batch of one task.

    Attributes:
        trained: seconds per example of a training step of all weights.
        judged: seconds per example of a forward pass.
        peak_bytes: the most memory of training all weights; None: not known.
        parameters: number of weights.
        maskable: how many of them a mask may select.
    """

    trained: float
    judged: float
    peak_bytes: int | None
    parameters: int
    maskable: int


def probe(encoder: Encoder, task: Task | ImageTask, recipe: Recipe) -> Probe:
    """Measure two training steps and a forward pass of a batch; the weights are restored.

    Args:
        encoder: the model.
        task: the task.
        recipe: whose batch size and length are taken.

    Raises:
        TalosValueError: a row selects none of the model's weights.
    """
    models = TaskModels(encoder, [task])
    model = models.model
    check_rows(recipe, model)
    training = recipe.training
    batches = training_batches(
        task,
        encoder,
        count=training.batch_size,
        batch_size=training.batch_size,
        max_length=training.max_length,
        seed=0,
    )
    forget_peak()
    times = [time.perf_counter()]
    fine_tune(model, batches, steps=2, lr=1e-9, on_step=lambda _: times.append(time.perf_counter()))
    peak = peak_bytes()
    models.restore_()
    with torch.no_grad():
        start = time.perf_counter()
        model.eval()(batches[0])
        judged = time.perf_counter() - start
    count = len(batches[0]["labels"])
    return Probe((times[2] - times[1]) / count, judged / count, peak, **models.sizes())


@dataclass(frozen=True)
class Estimate:
    """The cells of one kind.

    Attributes:
        kind: the kind.
        cells: how many the recipe has.
        left: how many are not done.
        each: seconds of one, about.
    """

    kind: str
    cells: int
    left: int
    each: float


def estimates(
    recipe: Recipe,
    tasks: Sequence[Task | ImageTask],
    probes: Mapping[str, Probe],
    done: Mapping[str, Sequence[float]],
) -> list[Estimate]:
    """Estimate the time of each kind of cell: that of those that are done, else from the probe.

    Args:
        recipe: the recipe.
        tasks: its tasks.
        probes: of each model by its name.
        done: the seconds of its cells that are done, by kind; see `finished`.
    """
    seconds: dict[str, list[float]] = {}
    for place, row in all_places(recipe, [task.name for task in tasks]):
        found = _seconds(place, row, recipe, tasks, probes[place.model])
        seconds.setdefault(place.kind, []).append(found)
    return [
        Estimate(
            kind,
            len(each),
            max(0, len(each) - len(done.get(kind, ()))),
            fmean(done.get(kind) or each),
        )
        for kind, each in seconds.items()
    ]


def finished(
    recipe: Recipe,
    name: str,
    encoder: Encoder,
    tasks: Sequence[Task | ImageTask],
    out: Path,
) -> dict[str, list[float]]:
    """Return the seconds of a recipe's cells that a folder holds, by kind.

    Args:
        recipe: the recipe.
        name: of the model.
        encoder: the model.
        tasks: the recipe's tasks.
        out: the folder, which may be missing.
    """
    if not (out / "cells").is_dir():
        return {}
    cells = _Known(recipe, name, encoder, tasks, Store(out, lambda _: None), lambda *_: None)
    gathered = Gathered(recipe, tasks)

    def look(places: Iterable[Place], row: Row | None = None) -> bool:
        """Take what is done of some places, and return whether all is."""
        whole = True
        for place in places:
            if not (whole and gathered.failed(place)):
                gathered.cells[place] = cells.make(place, row)
                whole &= gathered.cells[place].seconds >= 0
        return whole

    names = [task.name for task in tasks]
    look(Place("pretrained", name, task=task) for task in names)
    for row in recipe.rows:
        lr = row.lr[0]
        if look(swept_places(recipe, name, row, names), row):
            with suppress(TalosValueError):  # it fails at every rate
                lr = chosen_rate(gathered, name, row)
        look(judged_places(recipe, name, row, names, lr), row)
    found: dict[str, list[float]] = {}
    for cell in {cell.key.digest: cell for cell in gathered.cells.values()}.values():
        if cell.seconds >= 0:
            found.setdefault(cell.key.kind, []).append(cell.seconds)
    return found


class _Known(Cells):
    """Cells that are read and never made; one that is not done has -1 seconds."""

    def _made(self, key: Key, make: object) -> Cell:
        return self.store.read(key) or Cell(key, {}, -1.0)


def space(
    recipe: Recipe, tasks: Sequence[Task | ImageTask], probes: Mapping[str, Probe]
) -> tuple[int, int | None]:
    """Return the bytes of all vectors and masks, and the most memory of a training, about.

    Args:
        recipe: the recipe.
        tasks: its tasks.
        probes: of each model by its name.
    """
    disk = 0.0
    for place, row in all_places(recipe, [task.name for task in tasks]):
        if row is not None and place.kind in ("vector", "mask"):
            own = probes[place.model]
            density = row.calibration.density if row.calibration else row.settings.get("density")
            entries = own.parameters if density is None else density * own.maskable
            index = 0.0 if density is None else min(2.0, 0.13 / density)  # bytes per entry
            disk += entries * (index + (2 if place.kind == "vector" else 0))
    peaks = [each.peak_bytes for each in probes.values() if each.peak_bytes is not None]
    # Besides what the probe takes, a run holds the pretrained weights.
    held = 4 * max(each.parameters for each in probes.values())
    return round(disk), max(peaks) + held if peaks else None


def _seconds(
    place: Place,
    row: Row | None,
    recipe: Recipe,
    tasks: Sequence[Task | ImageTask],
    cost: Probe,
) -> float:
    """Return the seconds of a cell, about: examples trained and judged, times their cost."""
    validation, test = (
        {task.name: len(task.examples(split)) for task in tasks} for split in ("validation", "test")
    )
    grid = recipe.evaluation.coefficients
    points = recipe.evaluation.map_points  # both vectors at each pair, and each alone
    judged = {
        "pretrained": validation.get(place.task, 0) + test.get(place.task, 0),
        "vector": validation.get(place.task, 0) + test.get(place.task, 0),
        "addition": grid * sum(validation.values()) + sum(test.values()),
        "negation": grid * sum(validation.values()) + sum(test.values()),
        "interference": len(tasks) * sum(test.values()),
        "sensitivity": len(tasks) * sum(test.values()),
        "linearity": 3 * sum(test.values()),
        "disentanglement": points * (points + 2) * sum(test.values()) * 2 / len(tasks),
    }.get(place.kind, 0)
    trained, factor = 0, 1.0
    if row is not None and place.kind in ("vector", "drift"):
        own = row.training
        steps = own.steps * METHODS[row.method].phases
        trained = steps * own.accumulate * own.batch_size
    elif row is not None and row.calibration is not None and place.kind == "mask":
        trained = row.calibration.rounds * row.calibration.samples
    if row is not None and row.method == "linearized":
        factor = 2.0  # a forward-mode derivative beside each forward pass
    return factor * (trained * cost.trained + judged * cost.judged)
