"""Rows beside each other: accuracies with intervals, negation, linearity and costs."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from talos.app.report.headline import summaries, zero_shot
from talos.app.report.results import Results
from talos.app.report.rows import Table, percent, row_style, runs_of, span, titles, with_row
from talos.app.report.style import GREY, INK
from talos.app.report.svg import Panel, folded
from talos.tensors import readable_size

__all__ = [
    "cost",
    "cost_table",
    "linearity",
    "linearity_table",
    "negation",
    "negation_table",
    "summary",
    "summary_table",
]

_LETTERS = 50  # of a title over its mark
_LINE = 0.19  # inches of a line of text


def summary(results: Results, model: str) -> list[Panel]:
    """Return the plots of merged accuracy, and of its difference from the first row's."""
    own = summaries(results, model)
    found = {row: each["figures"]["added"] for row, each in own.items()}
    gaps = {r: each["against_first"]["added"] for r, each in own.items() if each["against_first"]}
    if not found:
        return []
    before = (100 * zero_shot(results, model), "dotted: the pretrained model")
    label = "accuracy of the model with all vectors added, %"
    panels = [_intervals(results, found, label, before)]
    if gaps:
        first = titles(results)[next(iter(found))]
        label = f"points of accuracy more than\n{folded(first, _LETTERS, 1)}"
        panels.append(_intervals(results, gaps, label, (0.0, ""), sign="+"))
    return panels


def summary_table(results: Results, model: str) -> Table:
    """Return a line for each row: accuracies with intervals, and the difference from the first."""
    rows = []
    for row, each in summaries(results, model).items():
        gap = each["against_first"]
        rows.append(
            (
                titles(results)[row],
                *(span(each["figures"][key]) for key in ("alone", "added", "normalised")),
                span(gap["added"], sign="+") if gap else "",
            )
        )
    head = ("row", "alone, %", "added, %", "normalised, %", "added, points more than the first row")
    return head, rows


def negation(results: Results, model: str) -> list[Panel]:
    """Return the plot of the task to forget against the other tasks."""
    found = _negations(results, model)
    before = _before_negation(results, model)

    def paint(axes: Any) -> None:
        for row, figures in found.items():
            style = row_style(results, row)
            ends = [
                [[abs(100 * (f[end] - f["value"]))] for end in ("low", "high")] for f in figures
            ]
            axes.errorbar(
                *(100 * f["value"] for f in figures),
                xerr=ends[0],
                yerr=ends[1],
                color=style.colour,
                marker=style.marker,
                markersize=7,
                markeredgecolor=INK,
                linestyle="",
                elinewidth=1.4,
                label=titles(results)[row],
            )
        if before:
            point = [100 * value for value in before]
            axes.plot(*point, "*", color=INK, markersize=11, label="pretrained model")
        axes.set_xlabel("accuracy on the task to forget, % (less is better)")
        axes.set_ylabel("accuracy on the other tasks, %\n(more is better)")
        axes.grid(True)

    return [Panel(2.9, paint)] if found else []


def negation_table(results: Results, model: str) -> Table:
    """Return a line for the pretrained model and for each row: target and control."""
    before = _before_negation(results, model)
    rows: list[Sequence[str]] = [("pretrained model", *map(percent, before))] if before else []
    for row, figures in _negations(results, model).items():
        rows.append((titles(results)[row], *map(span, figures)))
    return ("row", "task to forget, %", "other tasks, %"), rows


def linearity(results: Results, model: str) -> list[Panel]:
    """Return the plot of the first-order expansion's accuracy against the tuned model's."""
    found = with_row(results, "linearity", model)
    values = [
        100 * each[key]["value"]
        for tasks in found.values()
        for each in tasks.values()
        for key in ("tuned", "expansion")
    ]

    def paint(axes: Any) -> None:
        ends = [min(values) - 3, max(values) + 3]
        axes.plot(ends, ends, "--", color=GREY, linewidth=1)
        for row, tasks in found.items():
            style = row_style(results, row)
            x, y = (
                [100 * each[key]["value"] for each in tasks.values()]
                for key in ("tuned", "expansion")
            )
            how = {"color": style.colour, "markersize": 7, "markeredgecolor": INK}
            how |= {"markeredgewidth": 0.7, "label": titles(results)[row]}
            axes.plot(x, y, style.marker, **how)
        axes.set_xlim(ends)
        axes.set_ylim(ends)
        axes.set_xlabel("accuracy of the tuned model, %")
        axes.set_ylabel("accuracy of its first-order expansion, %")
        axes.grid(True)

    return [Panel(3.6, paint)] if found else []


def linearity_table(results: Results, model: str) -> Table:
    """Return a line for each task of each row."""
    rows = [
        (
            titles(results)[row],
            task,
            span(each["tuned"]),
            span(each["expansion"]),
            percent(each["equal"]),
        )
        for row, tasks in with_row(results, "linearity", model).items()
        for task, each in tasks.items()
    ]
    return ("row", "task", "tuned, %", "expansion, %", "same answers, %"), rows


def cost(results: Results, model: str) -> list[Panel]:
    """Return the bars of each row's time a step, peak memory, and bytes of a file."""
    return [
        _bars(results, {row: each[place] for row, each in found.items()}, label, form)
        for found in (_costs(results, model),)
        if found
        for place, (label, form) in enumerate(_COSTS)
        if any(each[place] is not None for each in found.values())
    ]


def cost_table(results: Results, model: str) -> Table:
    """Return a line for each row; the first is a checkpoint of all weights."""
    [dense] = [each["dense_bytes"] for each in results["models"] if each["name"] == model]
    rows: list[Sequence[str]] = [("checkpoint of all weights", "", "", readable_size(dense))]
    for row, each in _costs(results, model).items():
        cells = ("" if v is None else form(v) for v, (_, form) in zip(each, _COSTS, strict=True))
        rows.append((titles(results)[row], *cells))
    return ("row", "a step of training", "peak memory", "one vector's file"), rows


def _milliseconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


_COSTS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("a step of training (median)", _milliseconds),
    ("peak memory", readable_size),
    ("one task vector's file", readable_size),
)


def _costs(results: Results, model: str) -> dict[str, tuple[float | None, ...]]:
    """Return each row's seconds a step, peak bytes, and mean bytes of a vector's file."""
    times = results["timings"].get("by_row", {}).get(model, {})
    return {
        row: (
            times.get(row, {}).get("step"),
            times.get(row, {}).get("peak_bytes"),
            fmean(run["bytes"] for run in runs),
        )
        for row, runs in runs_of(results, model).items()
    }


def _negations(results: Results, model: str) -> dict[str, list[dict[str, float]]]:
    """Return the target and the control of each row that was negated."""
    return {
        row: [each["figures"]["target"], each["figures"]["control"]]
        for row, each in summaries(results, model).items()
        if each["figures"]["target"] and each["figures"]["control"]
    }


def _before_negation(results: Results, model: str) -> list[float]:
    """Return the pretrained accuracy on the tasks to forget, and on the others: means."""
    for runs in runs_of(results, model).values():
        if found := [each for each in (runs[0]["negation"] or {}).values() if each]:
            keys = ("target_zero_shot", "control_zero_shot")
            return [fmean(each[key]["value"] for each in found) for key in keys]
    return []


def _intervals(
    results: Results,
    found: dict[str, dict[str, Any]],
    label: str,
    line: tuple[float, str],
    *,
    sign: str = "",
) -> Panel:
    """Return a plot of a point with its interval for each row, below its title."""
    places, height = _places([titles(results)[row] for row in found])

    def paint(axes: Any) -> None:
        at, text = line
        for (row, each), (top, middle) in zip(found.items(), places, strict=True):
            style = row_style(results, row)
            value, low, high = (100 * each[key] for key in ("value", "low", "high"))
            ends = [middle - 0.6, middle + 0.6]
            axes.plot([at, at], ends, ":" if text else "-", color=GREY, linewidth=1.5)
            axes.plot([low, high], [middle] * 2, color=style.colour, linewidth=2)
            axes.plot(
                *([value], [middle], style.marker),
                color=style.colour,
                markersize=8,
                markeredgecolor=INK,
            )
            seeds = [100 * v for v in each.get("by_seed", ())]
            if len(seeds) > 1:
                axes.plot(seeds, [middle + 0.3] * len(seeds), "|", color=GREY, markersize=5)
            _title(axes, top, titles(results)[row])
        _rows(axes, places, label + (f"\n({text})" if text else ""))
        axes.xaxis.grid(True)

    return Panel(height + 0.75, paint)


def _bars(
    results: Results, found: dict[str, float | None], label: str, form: Callable[[float], str]
) -> Panel:
    """Return a plot of a bar for each row, below its title."""
    places, height = _places([titles(results)[row] for row in found])
    longest = max(value for value in found.values() if value is not None)

    def paint(axes: Any) -> None:
        for (row, value), (top, middle) in zip(found.items(), places, strict=True):
            if value is not None:
                axes.barh([middle], [value], height=0.75, color=row_style(results, row).colour)
                axes.text(value, middle, f" {form(value)}", va="center", fontsize=9)
            _title(axes, top, titles(results)[row])
        axes.set_xlim(0, 1.25 * longest)
        _rows(axes, places, "")
        axes.spines["bottom"].set_visible(False)
        axes.set_xticks([])

    return Panel(height + 0.1, paint, label)


def _places(names: Sequence[str]) -> tuple[list[tuple[float, float]], float]:
    """Return where each title begins and where the middle of its mark is, and the height."""
    places, down = [], 0.0
    for name in names:
        lines = folded(name, _LETTERS).count("\n") + 1
        places.append((down, down + lines + 0.5))
        down += lines + 1.2
    return places, _LINE * down


def _title(axes: Any, top: float, name: str) -> None:
    axes.text(
        *(0, top, folded(name, _LETTERS)),
        transform=axes.get_yaxis_transform(),
        va="top",
        fontsize=9.5,
    )


def _rows(axes: Any, places: Sequence[tuple[float, float]], label: str) -> None:
    axes.set_ylim(places[-1][1] + 0.8, -0.2)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(label)
