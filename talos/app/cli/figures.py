"""The figures of `talos eval` and `talos compare` as tables for a terminal."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from talos.app.cli.console import table
from talos.app.cli.tables import interval
from talos.app.report.runs import Row

__all__ = ["NOTES", "TABLES", "comparison"]

Titled = tuple[str, Table]
Figures = dict[str, Any]


def _accuracy(figures: Figures) -> Iterator[Titled]:
    if "grid" in figures:
        yield _grid(figures, ["absolute"], "validation accuracy, %")
    kind = next(
        (k for k in ("edited", "single") for e in figures["tasks"].values() if k in e), None
    )
    after = [] if kind is None else ["alone" if kind == "single" else kind, "difference"]
    first = "accuracy" if kind is None else "before"  # the model may be an edited one
    shown = table(["task"], ["examples", first, *after])
    for task, each in figures["tasks"].items():
        row = [escape(task), f"{each['pretrained']['n']:,}", interval(each["pretrained"])]
        if kind in each:
            row += [interval(each[kind]), interval(each["difference"], signed=True)]
        shown.add_row(*row)
    own = " with each task's own vector" if kind == "single" else ""
    at = f" at {_scale(figures['scaling_coef'])}" if "scaling_coef" in figures else ""
    yield f"accuracy{own}{at}, % with 95 % intervals", shown


def _addition(figures: Figures) -> Iterator[Titled]:
    if figures["grid"]:
        yield _grid(figures, ["absolute", "normalised"], "addition, validation examples, %")
    shown = table(["task"], ["alone", "added"])
    for task, estimate in figures["tasks"].items():
        shown.add_row(escape(task), interval(figures["single"][task]), interval(estimate))
    shown.add_row("absolute", "", interval(figures["absolute"]), style="bold")
    shown.add_row("normalised", "", interval(figures["normalised"]), style="bold")
    yield f"addition at {_scale(figures['scaling_coef'])}, % with 95 % intervals", shown


def _negation(figures: Figures) -> Iterator[Titled]:
    if len(figures) == 1:
        (each,) = figures.values()
        yield _grid(each, ["control", "target"], "negation, validation examples, %", -1)
    columns = ["scale", "target before", "target after", "control before", "control after"]
    shown = table(["task to forget"], columns)
    for task, each in figures.items():
        shown.add_row(
            escape(task),
            _scale(-each["scaling_coef"]),
            f"{100 * each['target_zero_shot']['value']:.1f}",
            interval(each["target"]),
            f"{100 * each['control_zero_shot']['value']:.1f}",
            interval(each["control"]),
        )
    yield "negation, % with 95 % intervals", shown


def _why_zero(figures: Figures) -> Iterator[str]:
    """Yield a line if the search chose 0."""
    if figures.get("why_zero"):
        yield figures["why_zero"]


def _why_zeros(figures: Figures) -> Iterator[str]:
    """Yield a line for each task of which the search chose 0."""
    for task, each in figures.items():
        for line in _why_zero(each):
            yield f"{task}, subtracted: {line}"


def _ratios(title: str) -> Callable[[Figures], Iterator[Titled]]:
    """Return what draws a matrix of ratios, a row for each vector."""

    def draw(figures: Figures) -> Iterator[Titled]:
        columns = list(next(iter(figures.values())))
        shown = table(["vector of"], [escape(task) for task in columns])
        for task, row in figures.items():
            shown.add_row(escape(task), *(interval(row[other]) for other in columns))
        yield title, shown

    return draw


def _disentanglement(figures: Figures) -> Iterator[Titled]:
    first, second = figures["tasks"]
    coefs = [f"{coef:.2f}" for coef in figures["scaling_coefs"]]
    shown = table([f"{escape(first)} ↓ {escape(second)} →"], coefs)
    for coef, row in zip(coefs, figures["error"], strict=True):
        shown.add_row(coef, *(f"{100 * error:.1f}" for error in row))
    yield "disentanglement error, % (0 to 200)", shown


def _linearity(figures: Figures) -> Iterator[Titled]:
    shown = table(["task"], ["tuned", "expansion", "difference", "equal answers"])
    for task, each in figures.items():
        shown.add_row(
            escape(task),
            interval(each["tuned"]),
            interval(each["expansion"]),
            interval(each["difference"], signed=True),
            f"{100 * each['equal']:.1f}",
        )
    yield "linearity, % with 95 % intervals", shown


def _iou(figures: Figures) -> Iterator[Titled]:
    tasks = figures["tasks"]
    shown = table(["mask of"], [escape(task) for task in tasks])
    for task, row, chance in zip(tasks, figures["iou"], figures["by_chance"], strict=True):
        cells = (f"{a:.3f} [dim]({b:.3f})[/dim]" for a, b in zip(row, chance, strict=True))
        shown.add_row(escape(task), *cells)
    yield "intersection over union of the masks (by chance)", shown


def _grid(figures: Figures, keys: Sequence[str], title: str, sign: int = 1) -> Titled:
    """Return the points of a search, of several tasks each, with a mark at the one taken."""
    tasks = list(figures["grid"][0].get("tasks", ()))
    tasks = tasks if len(tasks) > 1 else []
    shown = table([], ["scale", *map(escape, tasks), *keys])
    for point in figures["grid"]:
        mark = " ◂" if point["scaling_coef"] == figures["scaling_coef"] else ""
        cells = ["" if point[key] is None else f"{100 * point[key]:.1f}" for key in keys]
        own = [f"{100 * point['tasks'][task]:.1f}" for task in tasks]
        scale = _scale(sign * point["scaling_coef"])
        shown.add_row(scale, *own, *cells[:-1], f"{cells[-1]}{mark}")
    return title, shown


def _scale(coef: float) -> str:
    """Return a coefficient with two decimals; one that they would show as 0 has a digit more."""
    return f"{coef + 0.0:.2f}" if coef == 0 or abs(coef) >= 0.005 else f"{coef:.1g}"


TABLES: dict[str, Callable[[Figures], Iterator[Titled]]] = {
    "accuracy": _accuracy,
    "addition": _addition,
    "negation": _negation,
    "interference": _ratios("interference: accuracy with the vector, % of that before"),
    "disentanglement": _disentanglement,
    "linearity": _linearity,
    "iou": _iou,
    "sensitivity": _ratios("sensitivity: accuracy without its weights, % of that before"),
}
"""What draws the figures of each metric."""

NOTES: dict[str, Callable[[Figures], Iterator[str]]] = {
    "accuracy": _why_zero,
    "addition": _why_zero,
    "negation": _why_zeros,
}
"""What prints lines under the tables of a metric."""


def comparison(rows: Sequence[Row]) -> Table:
    """Return the table of `talos compare`."""
    normalised = any(row.normalised is not None for row in rows)
    columns = ["scale", "accuracy", "difference", *(["normalised", "difference"] * normalised)]
    shown = table(["task", "edit"], columns)
    shown.columns[1].overflow = "fold"
    before: str | None = ""
    for row in rows:
        task = "mean" if row.task is None else escape(row.task)
        scale = "" if row.scaling_coef is None else _scale(row.scaling_coef)
        cells = [scale, interval(row.accuracy), _signed(row.difference)]
        if normalised:
            own = "" if row.normalised is None else interval(row.normalised)
            cells += [own, _signed(row.normalised_difference)]
        shown.add_row("" if row.task == before else task, escape(row.run), *cells)
        before = row.task
    return shown


def _signed(entry: Any) -> str:
    return "" if entry is None else interval(entry, signed=True)
