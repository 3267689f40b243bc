"""From cells to `results.json`: rates are chosen, runs summed up over seeds.

Nothing is evaluated here: the same cells give the same bits.

An interval of a summary is over seeds and test examples, once for all rows; see
`Bootstrap.over_seeds`. So it holds what other examples and other seeds would change, and
differences between rows are paired.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from talos.app.experiments.answers import unpack, unpack_picked
from talos.app.experiments.gathered import Gathered
from talos.app.experiments.machine import machine, made_by, versions
from talos.app.experiments.places import Place
from talos.app.experiments.recipe import Row
from talos.app.report.results import SCHEMA, SCHEMA_VERSION
from talos.app.tasks import ImageTask, Task
from talos.errors import TalosValueError
from talos.evaluation import Estimate
from talos.evaluation.intervals import Model, over_tasks

__all__ = ["chosen_rate", "results_of"]

_EQUAL = 1e-9
_MATRICES = ("interference", "sensitivity")
_FIGURES = ("alone", "added", "normalised", "target", "control")


def chosen_rate(gathered: Gathered, model: str, row: Row) -> float:
    """Return the learning rate of the best merged model on validation data, with the first seed.

    Of equally good ones the smallest is taken.

    Raises:
        TalosValueError: a training fails at every rate.
    """
    rates = _rates(gathered, model, row)
    if not rates:
        place = Place("vector", model, row.row, row.lr[0], gathered.recipe.seeds[0])
        found = gathered.of_tasks(place)
        why = next(each["failed"] for each in found.values() if "failed" in each)
        raise TalosValueError(f"lr must be one that {row.row} trains with on {model}; {why}")
    best = max(each["added"] for each in rates)  # equal ones differ by their rounding
    return float(next(each["lr"] for each in rates if each["added"] >= best - _EQUAL))


def results_of(gathered: Gathered) -> dict[str, Any]:
    """Return the results in the schema of `talos.app.report.results`.

    Args:
        gathered: the cells of every model and row that is `chosen`.
    """
    recipe, done = gathered.recipe, gathered.done()
    sums = {(model, row.row): _Summary(gathered, model, row) for model, row in done}
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "title": recipe.title,
        **_made_by(gathered),
        "recipe": recipe.plain(),
        "models": [{"name": name, **facts} for name, facts in gathered.models.items()],
        "tasks": [_task(task) for task in gathered.tasks],
        "rows": [_row(row) for row in recipe.rows if any(row is each for _, each in done)],
        "zero_shot": {model: _zero_shot(gathered, model) for model in gathered.models},
        "rates": _nested(done, lambda model, row: _rates(gathered, model, row)),
        "runs": [_run(gathered, *each, seed) for each in done for seed in gathered.seeds(*each)],
        "summary": _summary(gathered, sums),
        **_measures(gathered, done),
        "files": _files(gathered),
        "timings": _timings(gathered, done),
    }


def _made_by(gathered: Gathered) -> dict[str, Any]:
    """Return the machine and the versions; of cells that others made, theirs too."""
    every = [made_by(), *(cell.made_by for cell in gathered.cells.values())]
    found = {
        name: ", ".join(dict.fromkeys(each[name] for each in every if name in each))
        for name in every[0]
    }
    device = {"device": found.pop("device")}
    return {"machine": machine() | device, "versions": versions() | found}


def _summary(gathered: Gathered, sums: Mapping[tuple[str, str], "_Summary"]) -> list[Any]:
    first = gathered.recipe.rows[0].row
    best: dict[str, _Summary] = {}
    for (model, _), each in sums.items():
        if model not in best or each.added > best[model].added:
            best[model] = each
    return [each.entry(sums.get((model, first)), best[model]) for (model, _), each in sums.items()]


def _nested(
    done: Sequence[tuple[str, Row]], make: Callable[[str, Row], Any]
) -> dict[str, dict[str, Any]]:
    """Return model -> row -> what is made of them; None is left out."""
    found: dict[str, dict[str, Any]] = {}
    for model, row in done:
        made = make(model, row)
        if made is not None:
            found.setdefault(model, {})[row.row] = made
    return found


def _task(task: Task | ImageTask) -> dict[str, Any]:
    return {
        "name": task.name,
        "description": task.description,
        "reads": task.reads,
        "classes": len(task.class_names),
        "chance": 1 / len(task.class_names),
        "examples": {split: len(task.examples(split)) for split in ("train", "validation", "test")},
    }


def _row(row: Row) -> dict[str, Any]:
    settings = dict(row.settings) if row.calibration is None else asdict(row.calibration)
    training = asdict(row.training)
    settings |= {key: training[key] for key in ("steps", "batch_size", "weight_decay")}
    return {
        "row": row.row,
        "title": row.title,
        "method": row.method,
        "settings": settings | {"merge": dict(row.merge)},
        "lr": list(row.lr),
    }


def _zero_shot(gathered: Gathered, model: str) -> dict[str, Estimate]:
    found = gathered.of_tasks(Place("pretrained", model))
    return _estimates(gathered, {task: each["test"] for task, each in found.items()})


def _estimates(gathered: Gathered, answers: Mapping[str, str]) -> dict[str, Estimate]:
    outcomes = unpack(answers, gathered.examples)
    return {task: gathered.bootstrap.mean({task: each}) for task, each in outcomes.items()}


def _rates(gathered: Gathered, model: str, row: Row) -> list[dict[str, Any]]:
    """Return what each rate reached on validation data, with the first seed; no failed ones."""
    validation = {task.name: len(task.validation) for task in gathered.tasks}
    found = []
    for lr in row.lr:
        place = Place("vector", model, row.row, lr, gathered.recipe.seeds[0])
        if gathered.failed(place._replace(kind="addition")):
            continue
        digits = {task: each["validation"] for task, each in gathered.of_tasks(place).items()}
        answers = unpack(digits, validation)
        added = gathered.cells[place._replace(kind="addition")].found
        coef = added["scaling_coef"]
        point = next(each for each in added["grid"] if each["scaling_coef"] == coef)
        found.append(
            {
                "lr": lr,
                "alone": fmean(float(each.double().mean()) for each in answers.values()),
                "added": point["absolute"],
                "normalised": point["normalised"],
                "scaling_coef": coef,
                "chosen": gathered.chosen.get((model, row.row)) == lr,
            }
        )
    return found


def _run(gathered: Gathered, model: str, row: Row, seed: int) -> dict[str, Any]:
    lr = gathered.chosen[model, row.row]
    place = Place("vector", model, row.row, lr, seed)
    vectors = gathered.of_tasks(place)
    added = gathered.cells[place._replace(kind="addition")].found
    forgot = {
        task: gathered.cells.get(place._replace(kind="negation", task=task))
        for task in gathered.names
    }
    return {
        "model": model,
        "row": row.row,
        "seed": seed,
        "lr": lr,
        "trainable": round(fmean(each["entries"] for each in vectors.values())),
        "bytes": round(fmean(each["bytes"] for each in vectors.values())),
        "single": _estimates(gathered, {task: each["test"] for task, each in vectors.items()}),
        "training": {
            task: {key: each[key] for key in ("steps", "first_loss", "last_loss")}
            for task, each in vectors.items()
        },
        "addition": {k: v for k, v in added.items() if k not in ("single", "picked")},
        "negation": {
            task: cell and {k: v for k, v in cell.found.items() if k != "picked"}
            for task, cell in forgot.items()
        },
    }


class _Summary:
    """The figures of a row over all seeds, on all examples and in each resample.

    Args:
        gathered: the cells.
        model: the model.
        row: the row.
    """

    def __init__(self, gathered: Gathered, model: str, row: Row) -> None:
        self._gathered, self._model, self._row = gathered, model, row
        self._lr = gathered.chosen[model, row.row]
        self.seeds = gathered.seeds(model, row)
        added = [self._place("addition", seed) for seed in self.seeds]
        found = [gathered.cells[place].found for place in added]
        picked = [unpack_picked(each["picked"], gathered.examples) for each in found]
        single = [unpack(each["single"], gathered.examples) for each in found]
        ratio = gathered.bootstrap.metric.ratio
        self.figures: dict[str, Tensor] = {
            "alone": self._figures(single, lambda each: each),
            "added": self._figures(picked, lambda each: each),
            "normalised": self._figures(
                [*picked, *single],
                lambda each: ratio(each[..., : len(picked)], each[..., len(picked) :]),
            ),
            **self._negated(),
        }

    def _place(self, kind: str, seed: int, task: str = "") -> Place:
        return Place(kind, self._model, self._row.row, self._lr, seed, task)

    def _figures(
        self, models: Sequence[Mapping[str, Model]], of: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the mean over the tasks, `[1 + resamples, seeds]`."""
        return self._gathered.bootstrap.resampled(
            {task: [each[task] for each in models] for task in self._gathered.names},
            lambda figures: over_tasks({task: of(each) for task, each in figures.items()}),
        )

    def _negated(self) -> dict[str, Tensor]:
        """Return the mean target and control over the tasks to forget, if they were measured.

        They are of the first seed, `[1 + resamples, 1]`.
        """
        gathered = self._gathered
        names, first = gathered.names, gathered.recipe.seeds[0]
        cells = [gathered.cells.get(self._place("negation", first, task)) for task in names]
        found = [unpack_picked(c.found["picked"], gathered.examples) for c in cells if c]
        if len(found) < len(cells):
            return {}

        def both(figures: Mapping[str, Tensor]) -> Tensor:
            targets, controls = [], []
            for place, target in enumerate(names):
                targets.append(figures[target][..., place])
                others = [figures[other][..., place] for other in names if other != target]
                controls.append(torch.stack(others).mean(0))
            return torch.stack([torch.stack(targets).mean(0), torch.stack(controls).mean(0)], -1)

        models: dict[str, list[Model]] = {name: [each[name] for each in found] for name in names}
        table = gathered.bootstrap.resampled(models, both)
        return {"target": table[:, :1], "control": table[:, 1:]}

    @property
    def added(self) -> float:
        """The accuracy of the sum, the mean over tasks and seeds."""
        return float(self._gathered.bootstrap.over_seeds(self.figures["added"])["value"])

    def entry(self, first: "_Summary | None", best: "_Summary") -> dict[str, Any]:
        """Return the entry of the summary, with the differences from the first and the best row."""
        return {
            "model": self._model,
            "row": self._row.row,
            "lr": self._lr,
            "seeds": len(self.seeds),
            "figures": {key: self._figure(key) for key in _FIGURES},
            "against_first": self._minus(first, "added", "normalised"),
            "against_best": best._minus(self, "added"),
        }

    def _minus(self, other: "_Summary | None", *keys: str) -> dict[str, Any] | None:
        """Return the paired differences from another row, with the seeds of both; None from itself.

        The first seed is always one of them.
        """
        if other is None or other is self:
            return None
        both = [seed for seed in self.seeds if seed in other.seeds]
        own, others = ([each.seeds.index(seed) for seed in both] for each in (self, other))
        return {
            key: self._gathered.bootstrap.over_seeds(
                self.figures[key][:, own] - other.figures[key][:, others]
            )
            for key in keys
        }

    def _figure(self, key: str) -> dict[str, Any] | None:
        table = self.figures.get(key)
        if table is None:
            return None
        return {**self._gathered.bootstrap.over_seeds(table), "by_seed": table[0].tolist()}


def _measures(gathered: Gathered, done: Sequence[tuple[str, Row]]) -> dict[str, Any]:
    """Return what is measured of the vectors of the first seed."""

    def found(kind: str, model: str, row: Row, task: str = "") -> dict[str, Any] | None:
        lr = 0.0 if kind == "mask" else gathered.chosen[model, row.row]
        place = Place(kind, model, row.row, lr, gathered.recipe.seeds[0], task)
        cell = gathered.cells.get(place)
        return None if cell is None else cell.found

    def of(kind: str, key: str | None) -> dict[str, Any]:
        def make(model: str, row: Row) -> Any:
            cell = found(kind, model, row)
            return cell if cell is None or key is None else cell[key]

        return _nested(done, make)

    def masks(model: str, row: Row) -> dict[str, Any] | None:
        cell = found("overlap", model, row)
        if cell is None:
            return None
        calibrated = {task: found("mask", model, row, task) for task in gathered.names}
        return {
            task: {**each, "stability": (calibrated[task] or {}).get("stability")}
            for task, each in cell["masks"].items()
        }

    def drift(model: str, row: Row) -> dict[str, Any] | None:
        cells = {task: found("drift", model, row, task) for task in gathered.names}
        return {task: cell["points"] for task, cell in cells.items() if cell} or None

    return {
        "masks": _nested(done, masks),
        "mask_iou": of("overlap", "iou"),
        **{kind: of(kind, "matrix") for kind in _MATRICES},
        "disentanglement": of("disentanglement", None),
        "linearity": of("linearity", "tasks"),
        "drift": _nested(done, drift),
    }


def _files(gathered: Gathered) -> list[dict[str, Any]]:
    """Return the vectors and masks; one that several rows share is listed with the first."""
    files: dict[str, dict[str, Any]] = {}
    for place, cell in gathered.cells.items():
        if "file" in cell.found:
            entry = {"path": cell.found["file"], "kind": place.kind, "model": place.model}
            entry |= {"row": place.row, "task": place.task, "seed": place.seed}
            entry["lr"] = place.lr or None
            entry["bytes"] = cell.found["bytes"]
            entry["entries"] = cell.found.get("entries", cell.found.get("nnz"))
            files.setdefault(entry["path"], entry)
    return list(files.values())


def _timings(gathered: Gathered, done: Sequence[tuple[str, Row]]) -> dict[str, Any]:
    """Return the seconds of all cells, by kind and by row."""
    by_kind: dict[str, float] = {}
    for (kind, _), cell in {
        (place.kind, cell.key.digest): cell for place, cell in gathered.cells.items()
    }.items():
        by_kind[kind] = round(by_kind.get(kind, 0.0) + cell.seconds, 3)

    def by_row(model: str, row: Row) -> dict[str, Any]:
        own = {
            kind: [
                cell
                for place, cell in gathered.cells.items()
                if place[:3] == (kind, model, row.row)
            ]
            for kind in ("mask", "vector")
        }
        seconds = {kind: round(sum(c.seconds for c in cells), 3) for kind, cells in own.items()}
        steps = [cell.step_seconds for cell in own["vector"] if cell.step_seconds is not None]
        peaks = [cell.peak_bytes for cell in own["vector"] if cell.peak_bytes is not None]
        return {
            "calibrate": seconds["mask"],
            "train": seconds["vector"],
            "step": median(steps) if steps else None,
            "peak_bytes": max(peaks, default=None),
        }

    return {
        "total": round(sum(by_kind.values()), 3),
        "by_kind": by_kind,
        "by_row": _nested(done, by_row),
    }
