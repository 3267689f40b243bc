"""Run an experiment: every cell of a recipe that is not done yet, then `results.json`."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from talos.app.experiments.cells import Cells
from talos.app.experiments.gathered import Gathered
from talos.app.experiments.machine import default_device
from talos.app.experiments.places import Place, all_places, judged_places, swept_places
from talos.app.experiments.recipe import Recipe, Row
from talos.app.experiments.results import chosen_rate, results_of
from talos.app.experiments.store import Cell, check, opened
from talos.app.experiments.training import check_rows
from talos.app.models import Encoder, load_encoder, takes_images
from talos.app.report.results import write_json
from talos.app.tasks import ImageTask, Task
from talos.app.tasks.load import load_any
from talos.errors import TalosValueError

__all__ = ["Progress", "check_reads", "load_tasks", "run_experiment"]


@dataclass(frozen=True)
class Progress:
    """The progress of an experiment.

    Attributes:
        label: what is done: the kind of cell and its names.
        done: steps of this cell that are done.
        total: all its steps.
        loss: the training loss of the last step.
        cells: the number of this cell among all, from 1; 0: it is no cell.
        all_cells: all cells.
        left: seconds that are left, about; None: not known yet.
        ended: whether it is written.
    """

    label: str
    done: int
    total: int
    loss: float | None = None
    cells: int = 0
    all_cells: int = 0
    left: float | None = None
    ended: bool = False


def run_experiment(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    on_progress: Callable[[Progress], object] = lambda progress: None,
    on_note: Callable[[str], object] = lambda note: None,
    encoders: Mapping[str, Encoder] | None = None,
    tasks: Sequence[Task | ImageTask] | None = None,
) -> dict[str, Any]:
    """Run an experiment, or go on with one that was stopped, and write `results.json`.

    Every cell is written whole or not at all, `results.json` last. A run that was killed and
    started again on the same machine ends with the same numbers.

    Args:
        recipe: the recipe.
        out: the folder; it is made where it is missing.
        overwrite: begin anew in the folder of an earlier run; other files stay.
        on_progress: called at every step.
        on_note: called with a sentence for each damaged cell, which is made anew, each training
            that fails, each seed that is left out, and cells that other versions made.
        encoders: models by name, instead of those that the recipe names; their weights are
            restored.
        tasks: the tasks, instead of those that the recipe names.

    Returns:
        The results, see `talos.app.report.results`.

    Raises:
        TalosValueError: a model cannot read the tasks, or a row trains with none of its rates.
        TalosOSError: the folder holds other files, is in use or cannot be written, or a model or
            data cannot be found.
        TalosRuntimeError: an optional package is missing.
    """
    check(Path(out), overwrite=overwrite)
    loaded = load_tasks(recipe) if tasks is None else tasks
    for entry in recipe.models:
        if entry.name not in (encoders or {}):
            check_reads(entry.source, loaded)
    with opened(Path(out), overwrite=overwrite, on_note=on_note) as store:
        names = [task.name for task in loaded]
        gathered = Gathered(recipe, loaded)
        watch = _Watch(all_places(recipe, names), on_progress)
        for entry in recipe.models:
            encoder = (encoders or {}).get(entry.name)
            if encoder is None:
                with watch.say(f"load {entry.name}"):
                    encoder = load_encoder(entry.source).to(default_device())
            cells = Cells(recipe, entry.name, encoder, loaded, store, watch.tick)
            check_rows(recipe, cells.models.model)
            gathered.models[entry.name] = {"source": entry.source, **cells.facts}

            def finish(
                places: Iterable[Place], row: Row | None = None, cells: Cells = cells
            ) -> None:
                for place in places:
                    if gathered.failed(place):
                        continue
                    watch.begin(place)
                    cell = gathered.cells[place] = cells.make(place, row)
                    watch.end(place, cell)
                    if "failed" in cell.found:
                        on_note(f"{cell.key.name}: {cell.found['failed']}")

            finish(Place("pretrained", entry.name, task=name) for name in names)
            for row in recipe.rows:
                finish(swept_places(recipe, entry.name, row, names), row)
                lr = chosen_rate(gathered, entry.name, row)
                finish(judged_places(recipe, entry.name, row, names, lr), row)
                gathered.chosen[entry.name, row.row] = lr
                left = [
                    seed for seed in recipe.seeds if seed not in gathered.seeds(entry.name, row)
                ]
                if left:
                    on_note(
                        f"{row.row} on {entry.name} is summed up without the seeds "
                        f"{', '.join(map(str, left))}, with which its training fails at its rate"
                    )
            del cells, encoder, finish
        with watch.say("sum up"):
            results = results_of(gathered)
        write_json(results, store.folder / "results.json")
    return results


def load_tasks(recipe: Recipe) -> list[Task | ImageTask]:
    """Load the tasks of a recipe, in their splits.

    Args:
        recipe: the recipe.

    Raises:
        TalosValueError: data is unknown or damaged.
        TalosOSError: it cannot be read.
    """
    sizes = recipe.training.sizes
    return [
        load_any(entry.data, sizes, name=entry.name or "", **entry.settings)
        for entry in recipe.tasks
    ]


def check_reads(source: str, tasks: Sequence[Task | ImageTask]) -> None:
    """Refuse tasks whose examples a model does not read.

    Args:
        source: the model, as a recipe names it.
        tasks: the tasks.

    Raises:
        TalosValueError: the model reads texts and a task holds images, or the other way round.
    """
    reads = "images" if takes_images(source) else "texts"
    for task in tasks:
        if task.reads != reads:
            raise TalosValueError(
                f"models must read the {task.reads} of {task.name}, got {source}, which reads "
                f"{reads}; put it in a recipe of its own"
            )


class _Watch:
    """Counts cells, and estimates the time that is left.

    Args:
        places: all cells that the run has, with their rows.
        on_progress: as of `run_experiment`.
    """

    def __init__(
        self,
        places: Sequence[tuple[Place, Row | None]],
        on_progress: Callable[[Progress], object],
    ) -> None:
        self._left = Counter(place.kind for place, _ in places)
        self._all, self._done = len(places), 0
        self._seconds: dict[str, list[float]] = {}
        self._seen: set[str] = set()
        self._on_progress = on_progress
        self._label = ""

    @contextmanager
    def say(self, label: str) -> Iterator[None]:
        """Report a step that makes no cell."""
        self._on_progress(Progress(label, 0, 1))
        yield
        self._on_progress(Progress(label, 1, 1, ended=True))

    def begin(self, place: Place) -> None:
        """Begin a cell."""
        rate = f"lr {place.lr:g}" if place.lr else ""
        seed = f"seed {place.seed}" if place.row else ""
        words = (place.kind, place.model, place.row, rate, seed, place.task)
        self._label = " · ".join(word for word in words if word)

    def tick(self, done: int, total: int, loss: float | None = None) -> None:
        """Report a step of it."""
        number, left = min(self._done + 1, self._all), self._time_left()
        self._on_progress(Progress(self._label, done, total, loss, number, self._all, left))

    def end(self, place: Place, cell: Cell) -> None:
        """End a cell, which may have been done before."""
        if cell.key.digest not in self._seen:
            self._seen.add(cell.key.digest)
            self._seconds.setdefault(place.kind, []).append(cell.seconds)
            self._left[place.kind] -= 1
            self._done = min(self._done + 1, self._all)
        numbers = (self._done, self._all, self._time_left())
        self._on_progress(Progress(self._label, 1, 1, None, *numbers, ended=True))

    def _time_left(self) -> float | None:
        """Return the cells that are left times the mean of their kind.

        None before the first mask and vector: the others say nothing of these.
        """
        every = [seconds for found in self._seconds.values() for seconds in found]
        dear = (kind for kind in ("mask", "vector") if self._left[kind] > 0)
        if not every or any(kind not in self._seconds for kind in dear):
            return None
        return sum(
            max(count, 0) * fmean(self._seconds.get(kind, every))
            for kind, count in self._left.items()
        )
