"""Accuracy against the coefficient, the rate and the density; gradient drift against the step."""

import json
from collections.abc import Iterable, Sequence
from math import log
from statistics import fmean
from typing import Any

from talos.app.report.headline import summaries
from talos.app.report.results import Results
from talos.app.report.rows import Table, number, percent, row_style, runs_of, titles, with_row
from talos.app.report.style import INK
from talos.app.report.svg import Panel

__all__ = [
    "coefficient",
    "coefficient_table",
    "density",
    "density_table",
    "drift",
    "drift_table",
    "rates",
    "rates_table",
]

_LETTER = 0.025  # of the width of an axis: numbers must not run into each other


def coefficient(results: Results, model: str) -> list[Panel]:
    """Return the plot of each row's merged accuracy on validation data, and its chosen points."""
    searches = _searches(results, model)

    def paint(axes: Any) -> None:
        for place, (row, (curve, chosen)) in enumerate(searches.items()):
            points = [(coef, 100 * value) for coef, value in curve.items()]
            _line(axes, results, row, points, markersize=4.5, markevery=(place % 4, 4))
            at = sorted({coef for coef in chosen if coef in curve})
            _mark(axes, results, row, [(coef, 100 * curve[coef]) for coef in at])
        axes.set_xlabel("scaling coefficient")
        axes.set_ylabel("mean accuracy, %")
        axes.grid(True)

    return [Panel(2.9, paint)] if searches else []


def coefficient_table(results: Results, model: str) -> Table:
    """Return the chosen coefficients and the points of the curves."""
    searches = _searches(results, model)
    names = titles(results)
    coefs = sorted({coef for curve, _ in searches.values() for coef in curve})
    chosen = [" ".join(number(coef) for coef in found) for _, found in searches.values()]
    rows = [("chosen, by seed", *chosen)]
    for coef in coefs:
        values = (percent(curve.get(coef)) for curve, _ in searches.values())
        rows.append((number(coef), *values))
    return ("coefficient", *(names[row] for row in searches)), rows


def rates(results: Results, model: str) -> list[Panel]:
    """Return the plots of the added and the single vectors' accuracy against the learning rate."""
    swept = with_row(results, "rates", model)
    every = [point["lr"] for points in swept.values() for point in points]
    chosen = [point["lr"] for points in swept.values() for point in points if point["chosen"]]

    def panel(key: str, title: str) -> Panel:
        def paint(axes: Any) -> None:
            for row, points in swept.items():
                _line(axes, results, row, [(p["lr"], 100 * p[key]) for p in points])
                best = [(p["lr"], 100 * p[key]) for p in points if p["chosen"]]
                _mark(axes, results, row, best)
            _log_axis(axes, every, chosen)
            axes.set_xlabel("learning rate")
            axes.set_ylabel("mean accuracy, %")

        return Panel(2.6, paint, title)

    if not any(len(points) > 1 for points in swept.values()):
        return []
    return [panel("added", "all vectors added"), panel("alone", "each vector alone")]


def rates_table(results: Results, model: str) -> Table:
    """Return a line for each rate of each row."""
    names = titles(results)
    rows = [
        (
            names[row],
            number(point["lr"]),
            *(percent(point[key]) for key in ("added", "alone", "normalised")),
            number(point["scaling_coef"]),
            "yes" if point["chosen"] else "",
        )
        for row, points in with_row(results, "rates", model).items()
        for point in points
    ]
    head = ("row", "learning rate", "added, %", "alone, %", "normalised, %", "coefficient")
    return (*head, "chosen"), rows


def density(results: Results, model: str) -> list[Panel]:
    """Return the plots of accuracy against density: a curve for rows that differ in it alone."""
    groups = _densities(results, model)
    figures = {row: each["figures"] for row, each in summaries(results, model).items()}
    shown = {row for points in groups for _, row in points}
    every = [point for points in groups for point, _ in points]

    def panel(key: str, title: str) -> Panel:
        def paint(axes: Any) -> None:
            for points in groups:
                first = points[0][1]
                name = _without_density(titles(results)[first])
                found = [(x, figures[row][key]) for x, row in points]
                values = [(x, 100 * f["value"]) for x, f in found]
                _line(axes, results, first, values, label=name)
                axes.fill_between(
                    [x for x, _ in found],
                    *([100 * each[end] for _, each in found] for end in ("low", "high")),
                    color=row_style(results, first).colour,
                    alpha=0.15,
                    linewidth=0,
                )
            for row, each in figures.items():
                if row not in shown:
                    style = row_style(results, row)
                    ends = [min(every), max(every)]
                    y = [100 * each[key]["value"]] * 2
                    how = {"color": style.colour, "marker": style.marker, "linewidth": 1.2}
                    axes.plot(ends, y, ":", label=titles(results)[row], **how)
            _log_axis(axes, every)
            axes.set_xlabel("density (share of the entries that are trained)")
            axes.set_ylabel("mean accuracy, %")

        return Panel(2.6, paint, title)

    if not groups:
        return []
    return [panel("added", "all vectors added"), panel("alone", "each vector alone")]


def density_table(results: Results, model: str) -> Table:
    """Return a line for each row, with its density where it has one."""
    densities = {row: each for points in _densities(results, model) for each, row in points}
    rows = []
    for row, each in summaries(results, model).items():
        figures = [each["figures"][key] for key in ("added", "alone")]
        numbers = (percent(f[key]) for f in figures for key in ("value", "low", "high"))
        at = densities.get(row)
        rows.append((titles(results)[row], number(at), *numbers))
    ends = ("low", "high")
    return ("row", "density", "added, %", *ends, "alone, %", *ends), rows


def drift(results: Results, model: str) -> list[Panel]:
    """Return the plot of how far training moves the gradient, the mean over the tasks."""
    found = _drifts(results, model)

    def paint(axes: Any) -> None:
        for row, points in found.items():
            _line(axes, results, row, points.items())
        axes.set_xlabel("step of training")
        axes.set_ylabel("squared change of the gradient,\nratio to its squared length at first")
        axes.set_ylim(bottom=0)
        axes.grid(True)

    return [Panel(2.9, paint)] if found else []


def drift_table(results: Results, model: str) -> Table:
    """Return a line for each step, a column for each row."""
    found = _drifts(results, model)
    steps = sorted({step for points in found.values() for step in points})
    head = ("step", *(titles(results)[row] for row in found))
    rows = [(str(s), *(number(points.get(s), ".3g") for points in found.values())) for s in steps]
    return head, rows


def _searches(results: Results, model: str) -> dict[str, tuple[dict[float, float], list[float]]]:
    """Return each row's accuracy by coefficient, the mean of its seeds, and the chosen ones."""
    found = {}
    for row, runs in runs_of(results, model).items():
        values: dict[float, list[float]] = {}
        for run in runs:
            for point in run["addition"]["grid"]:
                if point["absolute"] is not None:
                    values.setdefault(point["scaling_coef"], []).append(point["absolute"])
        curve = {coef: fmean(each) for coef, each in values.items() if len(each) == len(runs)}
        if len(curve) > 1:
            found[row] = (curve, [run["addition"]["scaling_coef"] for run in runs])
    return found


def _densities(results: Results, model: str) -> list[list[tuple[float, str]]]:
    """Return the densities, with their rows, of rows that differ in nothing else."""
    here = summaries(results, model)
    groups: dict[str, list[tuple[float, str]]] = {}
    for row in results["rows"]:
        settings = dict(row["settings"])
        each = settings.pop("density", None)
        if each is not None and row["row"] in here:
            key = json.dumps([row["method"], _without_density(row["title"]), settings])
            groups.setdefault(key, []).append((each, row["row"]))
    return [sorted(points) for points in groups.values() if len(points) > 1]


def _without_density(title: str) -> str:
    return ", ".join(part for part in title.split(", ") if not part.startswith("density "))


def _drifts(results: Results, model: str) -> dict[str, dict[int, float]]:
    """Return each row's drift by step, the mean over its tasks."""
    found = {}
    for row, tasks in with_row(results, "drift", model).items():
        values: dict[int, list[float]] = {}
        for points in tasks.values():
            for point in points:
                values.setdefault(point["step"], []).append(point["ratio"])
        mean = {step: fmean(each) for step, each in values.items() if len(each) == len(tasks)}
        if mean:
            found[row] = mean
    return found


def _line(
    axes: Any,
    results: Results,
    row: str,
    points: Iterable[tuple[float, float]],
    **how: Any,
) -> None:
    """Draw a row's line through points."""
    style = row_style(results, row)
    x, y = zip(*sorted(points), strict=True)
    usual = {"linewidth": 1.8, "marker": style.marker, "markersize": 5.5}
    usual |= {"color": style.colour, "label": titles(results)[row]}
    axes.plot(x, y, style.line, **usual | how)


def _mark(axes: Any, results: Results, row: str, points: Sequence[tuple[float, float]]) -> None:
    """Draw large markers at the points that a row chose."""
    style = row_style(results, row)
    x, y = ([point[place] for point in points] for place in (0, 1))
    axes.plot(x, y, style.marker, color=style.colour, markersize=9, markeredgecolor=INK)


def _log_axis(axes: Any, values: Sequence[float], first: Sequence[float] = ()) -> None:
    """Make the x axis logarithmic, with numbers at the values that leave room for them.

    Args:
        axes: of matplotlib.
        values: all that are drawn.
        first: those whose numbers matter most.
    """
    low, high = min(values), max(values)
    room = 1.25 * (high / low) ** 0.03
    axes.set_xscale("log")
    axes.set_xlim(low / room, high * room)
    width = log(high * room) - log(low / room)

    def apart(tick: float, other: float) -> bool:
        letters = (len(number(tick)) + len(number(other))) / 2 + 1
        return abs(log(tick / other)) > _LETTER * letters * width

    kept: list[float] = []
    for tick in [*sorted(set(first)), *sorted(set(values))]:
        if all(apart(tick, other) for other in kept):
            kept.append(tick)
    axes.set_xticks(kept, [number(tick) for tick in kept])
    axes.minorticks_off()
    axes.margins(y=0.1)
    axes.grid(True)
