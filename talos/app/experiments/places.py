"""Which cells a recipe has, and in which order they are made."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from talos.app.experiments.recipe import Recipe, Row

__all__ = ["SPARSE", "Place", "all_places", "judged_places", "swept_places"]

SPARSE = ("talos", "random", "magnitude", "lota")
"""The methods whose vectors select a part of the weights."""

_OF_ROWS = ("interference", "disentanglement", "linearity", "sensitivity")


class Place(NamedTuple):
    """Where a cell stands in an experiment.

    Attributes:
        kind: pretrained, mask, vector, addition, negation, overlap, or a measure of the recipe.
        model: the model's name.
        row: the row's name; empty: shared by all.
        lr: the learning rate; 0 of a mask.
        seed: the seed.
        task: the task's name; empty: of all tasks.
    """

    kind: str
    model: str
    row: str = ""
    lr: float = 0.0
    seed: int = 0
    task: str = ""


def swept_places(recipe: Recipe, model: str, row: Row, names: Sequence[str]) -> Iterator[Place]:
    """Yield the cells that a row's learning rate is chosen by: all rates, with the first seed.

    Args:
        recipe: the recipe.
        model: the model's name.
        row: the row.
        names: the names of the tasks.
    """
    for lr in row.lr:
        yield from _trained(model, row, lr, recipe.seeds[0], names)


def judged_places(
    recipe: Recipe, model: str, row: Row, names: Sequence[str], lr: float
) -> Iterator[Place]:
    """Yield the further cells of a row at its chosen learning rate.

    The sum is measured with all seeds, everything else with the first.

    Args:
        recipe: the recipe.
        model: the model's name.
        row: the row.
        names: the names of the tasks.
        lr: the rate.
    """
    measures, first = recipe.evaluation.measures, recipe.seeds[0]
    for seed in recipe.seeds:
        if seed != first:
            yield from _trained(model, row, lr, seed, names)
    if "negation" in measures:
        yield from (Place("negation", model, row.row, lr, first, task) for task in names)
    kinds = [kind for kind in _OF_ROWS if kind in measures and _applies(kind, row)]
    if row.method in SPARSE:
        kinds.append("overlap")
    yield from (Place(kind, model, row.row, lr, first) for kind in kinds)
    if "drift" in measures and _applies("drift", row):
        yield from (Place("drift", model, row.row, lr, first, task) for task in names)


def all_places(recipe: Recipe, names: Sequence[str]) -> list[tuple[Place, Row | None]]:
    """Return every cell once, with its row; rows that train alike share vectors.

    The rate that will be chosen is not known: the smallest one stands for it.

    Args:
        recipe: the recipe.
        names: the names of the tasks.
    """
    found: dict[object, tuple[Place, Row | None]] = {}
    for model in [each.name for each in recipe.models]:
        for task in names:
            place = Place("pretrained", model, task=task)
            found[place] = place, None
        for row in recipe.rows:
            swept = swept_places(recipe, model, row, names)
            for place in (*swept, *judged_places(recipe, model, row, names, row.lr[0])):
                found.setdefault((_shared(place.kind, row), place._replace(row="")), (place, row))
    return list(found.values())


def _trained(model: str, row: Row, lr: float, seed: int, names: Sequence[str]) -> Iterator[Place]:
    """Yield the masks and vectors of a row with one rate and seed, and their sum."""
    for task in names:
        if row.calibration is not None:
            yield Place("mask", model, row.row, 0.0, seed, task)
        yield Place("vector", model, row.row, lr, seed, task)
    yield Place("addition", model, row.row, lr, seed)


def _applies(kind: str, row: Row) -> bool:
    """Return whether a measure says something of a method."""
    if kind == "sensitivity":
        return row.method in SPARSE
    if kind == "drift":  # what these train is linear in its weights
        return row.method not in ("linearized", "l_lora")
    return kind != "linearity" or row.method != "linearized"


def _shared(kind: str, row: Row) -> str:
    """Return what decides a row's cells of a kind, beside model, rate, seed and task."""
    if kind == "mask":
        return repr(row.calibration)
    merge = row.merge if kind == "addition" else {}
    return repr(replace(row, row="", title="", lr=(), merge=merge))
