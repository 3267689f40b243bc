"""What a run of a recipe will do: the part of it that is asked for, its cells, time and space."""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TypeVar

from talos.app.experiments.recipe import Recipe
from talos.app.nearest import did_you_mean
from talos.errors import TalosValueError

__all__ = ["select"]

T = TypeVar("T")


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
        >>> part = select(read_recipe("text"), ["talos*", "minilm", "addition"])
        >>> [row.row for row in part.rows], part.evaluation.measures
        (['talos', 'talos-select-highest'], ('addition',))
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
