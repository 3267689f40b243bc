"""Curves over the scaling coefficient, bars of sizes and times."""

from collections.abc import Callable, Sequence
from typing import Any

from talos.app.demo.report.results import Results, seconds_by_phase, shared_label
from talos.app.demo.report.style import GREY
from talos.app.demo.report.svg import draw, method_colour

__all__ = ["accuracy_curve", "negation_curve", "phase_bars", "size_bars"]


def accuracy_curve(results: Results) -> str:
    """Draw the merged models' validation accuracy against the scaling coefficient."""

    def paint(axes: Any) -> None:
        for method in results["methods"]:
            entry = results["addition"][method["name"]]
            colour = method_colour(results, method["name"])
            _curve(axes, entry, "absolute", color=colour, linewidth=2, label=method["title"])
        axes.set_ylabel("mean accuracy, %")

    return _coefficients("addition", results, paint)


def negation_curve(results: Results, task: str) -> str:
    """Draw target (solid) and control (dashed) accuracy on validation data of a negated task."""

    def paint(axes: Any) -> None:
        for method in results["methods"]:
            entry = results["negation"][method["name"]][task]
            colour = method_colour(results, method["name"])
            for key, line in (("target", "-"), ("control", "--")):
                label = method["title"] if key == "target" else None  # the caption explains dashes
                _curve(axes, entry, key, line, color=colour, linewidth=1.8, label=label)
        axes.set_ylabel("accuracy, %")
        axes.set_ylim(bottom=0, top=100)

    return _coefficients(f"negation-{task}", results, paint)


def size_bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """Draw file sizes as bars; a row is a label, megabytes and a colour."""

    def paint(axes: Any) -> None:
        places = range(len(rows))
        axes.barh(places, [size for _, size, _ in rows], color=[c for _, _, c in rows])
        for place, (_, size, _) in zip(places, rows, strict=True):
            axes.text(size, place, f" {size:.1f} MB", va="center", fontsize=9.5)
        axes.set_yticks(places, [label for label, _, _ in rows])
        axes.tick_params(length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.22 * max((size for _, size, _ in rows), default=1.0))
        axes.set_xlabel("megabytes")
        axes.spines["left"].set_visible(False)

    return draw("sizes", 0.8 + 0.36 * len(rows), paint)


def phase_bars(results: Results) -> str:
    """Draw the seconds of each phase, a colour for each method."""
    labels: dict[str | None, str] = {None: shared_label(results)}
    labels.update({method["name"]: method["title"] for method in results["methods"]})
    phases = seconds_by_phase(results)
    columns = 3 if len(results["methods"]) < 3 else 2

    def paint(axes: Any) -> None:
        for place, parts in enumerate(phases.values()):
            left = 0.0
            for method, seconds in parts.items():
                colour = method_colour(results, method) if method else GREY
                label = labels.pop(method, None)  # each is in the legend once
                axes.barh([place], [seconds], left=left, color=colour, label=label)
                left += seconds
            axes.text(left, place, f" {left:.0f} s", va="center", fontsize=9.5)
        longest = max((sum(parts.values()) for parts in phases.values()), default=1.0)
        axes.set_yticks(range(len(phases)), list(phases))
        axes.tick_params(length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.18 * longest)
        axes.set_xlabel("seconds")
        axes.spines["left"].set_visible(False)
        _legend(axes, columns)

    return draw("phases", 1.1 + 0.34 * len(phases), paint)


def _coefficients(name: str, results: Results, paint: Callable[[Any], None]) -> str:
    """Draw curves over the scaling coefficient: of all that can be compared, over the same range.

    The legend of more methods needs more height.
    """
    entries = [results["addition"][method["name"]] for method in results["methods"]]
    for tasks in results["negation"].values():
        entries += tasks.values()
    last = max(point["scaling_coef"] for entry in entries for point in entry["grid"])

    def framed(axes: Any) -> None:
        paint(axes)
        axes.set_xlim(-0.03 * last, 1.03 * last)
        axes.set_xlabel("scaling coefficient")
        axes.grid(True)
        _legend(axes, 2)

    return draw(name, 3.1 + 0.09 * max(0, len(results["methods"]) - 2), framed)


def _curve(axes: Any, entry: dict[str, Any], key: str, line: str = "-", **style: Any) -> None:
    """Draw the points of a grid that have a value; mark the chosen one, but not of a control."""
    points = [point for point in entry["grid"] if point[key] is not None]
    x = [point["scaling_coef"] for point in points]
    y = [100 * point[key] for point in points]
    axes.plot(x, y, line, **style)
    if key != "control":
        chosen = min(range(len(x)), key=lambda i: abs(x[i] - entry["scaling_coef"]))
        axes.plot([x[chosen]], [y[chosen]], "o", color=style["color"], markersize=7)


def _legend(axes: Any, columns: int) -> None:
    """Put the legend above the plot, where no line can run through it."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, fontsize=9.5)
