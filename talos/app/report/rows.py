"""The rows of a study's tables as figures show them: the same colour and marker everywhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from talos.app.report.style import METHODS

__all__ = [
    "RowStyle",
    "Table",
    "number",
    "percent",
    "row_style",
    "runs_of",
    "span",
    "titles",
    "with_row",
]

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""The head of a table and its lines: text, not HTML."""

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")


@dataclass(frozen=True)
class RowStyle:
    """How a row is drawn.

    Attributes:
        colour: of its lines, markers and bars.
        marker: a marker of matplotlib.
        line: a line style of matplotlib; rows of one colour differ in it.
    """

    colour: str
    marker: str
    line: str


def row_style(results: Mapping[str, Any], row: str) -> RowStyle:
    """Return how a row is drawn, the same in every figure and table; no two of 16 are alike."""
    place = [each["row"] for each in results["rows"]].index(row)
    turn, colour = divmod(place, len(METHODS))
    marker = _MARKERS[(colour + 3 * turn) % len(_MARKERS)]
    return RowStyle(METHODS[colour], marker, "-" if turn % 2 == 0 else "--")


def titles(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the title of each row, in the order of the tables."""
    return {each["row"]: each["title"] for each in results["rows"]}


def with_row(results: Mapping[str, Any], part: str, model: str) -> dict[str, Any]:
    """Return what a part of the results has of each row of a model, in the order of the tables.

    Args:
        results: of an experiment.
        part: a key of the results that goes model -> row -> what was found.
        model: the name of a model.
    """
    found = results.get(part, {}).get(model, {})
    return {row: found[row] for row in titles(results) if found.get(row)}


def runs_of(results: Mapping[str, Any], model: str) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of each row of a model, one for each seed."""
    runs: dict[str, list[dict[str, Any]]] = {row: [] for row in titles(results)}
    for run in results["runs"]:
        if run["model"] == model:
            runs[run["row"]].append(run)
    return {row: each for row, each in runs.items() if each}


def number(value: float | None, form: str = ".4g") -> str:
    """Format a number; nothing where there is none."""
    return "" if value is None else format(value, form)


def percent(value: float | None, digits: int = 1) -> str:
    """Format a share in per cent; nothing where there is none."""
    return "" if value is None else f"{100 * value:.{digits}f}"


def span(estimate: Mapping[str, float], *, sign: str = "") -> str:
    """Format an estimate with its interval, in per cent.

    Example:
        >>> span({"value": 0.5, "low": 0.45, "high": 0.56})
        '50.0 (45.0 to 56.0)'
    """
    value, low, high = (f"{100 * estimate[key]:{sign}.1f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"
