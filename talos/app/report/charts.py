"""Curves over the scaling coefficient, bars of sizes and times."""

from collections.abc import Sequence
from typing import Any

from talos.app.report.results import Results
from talos.app.report.svg import GREY, draw, method_colour

__all__ = ["accuracy_curve", "negation_curve", "phase_bars", "size_bars"]


def accuracy_curve(results: Results) -> str:
    """Draws the merged model's accuracy on validation data against the scaling coefficient.

    Args:
        results: the results.

    Returns:
        An SVG element: one line a method, a dot at the chosen coefficient.
    """

    def paint(axes: Any) -> None:
        for method in results["methods"]:
            entry = results["addition"][method["name"]]
            colour = method_colour(results, method["name"])
            x = [point["scaling_coef"] for point in entry["grid"]]
            y = [100 * point["absolute"] for point in entry["grid"]]
            axes.plot(x, y, color=colour, linewidth=2, label=method["title"])
            chosen = min(range(len(x)), key=lambda i: abs(x[i] - entry["scaling_coef"]))
            axes.plot([x[chosen]], [y[chosen]], "o", color=colour, markersize=7)
        axes.set_xlabel("scaling coefficient")
        axes.set_ylabel("mean accuracy, %")
        axes.grid(True)
        _legend(axes, 2)

    return draw("addition", _height(results), paint)


def negation_curve(results: Results, task: str) -> str:
    """Draws target and control accuracy on validation data against the scaling coefficient.

    Args:
        results: the results.
        task: the task whose vector is subtracted.

    Returns:
        An SVG element: solid lines the target, dashed ones the control, a dot where it was chosen.
    """

    def paint(axes: Any) -> None:
        for method in results["methods"]:
            entry = results["negation"][method["name"]][task]
            colour = method_colour(results, method["name"])
            for key, line in (("target", "-"), ("control", "--")):
                points = [p for p in entry["grid"] if p[key] is not None]
                x = [p["scaling_coef"] for p in points]
                y = [100 * p[key] for p in points]
                label: str | None = f"{method['title']}: {key}"
                if len(results["methods"]) > 2:  # the caption tells solid from dashed
                    label = method["title"] if key == "target" else None
                axes.plot(x, y, line, color=colour, linewidth=1.8, label=label)
                if key == "target":
                    at = min(range(len(x)), key=lambda i: abs(x[i] - entry["scaling_coef"]))
                    axes.plot([x[at]], [y[at]], "o", color=colour, markersize=7)
        axes.set_xlabel("scaling coefficient")
        axes.set_ylabel("accuracy, %")
        axes.set_ylim(bottom=0, top=100)
        axes.grid(True)
        _legend(axes, 2)

    return draw(f"negation-{task}", _height(results), paint)


def size_bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """Draws file sizes as bars.

    Args:
        rows: label, megabytes and colour of each.

    Returns:
        An SVG element.
    """

    def paint(axes: Any) -> None:
        places = range(len(rows))
        axes.barh(places, [size for _, size, _ in rows], color=[c for _, _, c in rows])
        for place, (_, size, _) in zip(places, rows, strict=True):
            axes.text(size, place, f" {size:.1f} MB", va="center", fontsize=8.5)
        axes.set_yticks(places, [label for label, _, _ in rows])
        axes.tick_params(length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.22 * max((size for _, size, _ in rows), default=1.0))
        axes.set_xlabel("megabytes")
        axes.spines["left"].set_visible(False)

    return draw("sizes", 0.8 + 0.36 * len(rows), paint)


def phase_bars(results: Results) -> str:
    """Draws the seconds of each phase, a colour for each method.

    Args:
        results: the results.

    Returns:
        An SVG element.
    """
    titles = {method["name"]: method["title"] for method in results["methods"]}
    shared = "both" if len(titles) < 3 else "all"
    phases: dict[str, dict[str, float]] = {}
    for entry in results["timings"]["phases"]:
        parts = phases.setdefault(entry["phase"], {})
        method = entry["method"] or ""
        parts[method] = parts.get(method, 0.0) + entry["seconds"]

    def paint(axes: Any) -> None:
        seen: set[str] = set()
        names = list(phases)
        for place, name in enumerate(names):
            left = 0.0
            for method, seconds in phases[name].items():
                colour = method_colour(results, method) if method else GREY
                label = titles.get(method, shared) if method not in seen else None
                seen.add(method)
                axes.barh([place], [seconds], left=left, color=colour, label=label)
                left += seconds
            axes.text(left, place, f" {left:.0f} s", va="center", fontsize=8.5)
        longest = max((sum(parts.values()) for parts in phases.values()), default=1.0)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.18 * longest)
        axes.set_xlabel("seconds")
        axes.spines["left"].set_visible(False)
        _legend(axes, 3 if len(titles) < 3 else 2)

    return draw("phases", 1.1 + 0.34 * len(phases), paint)


def _height(results: Results) -> float:
    """Inches of a plot of curves: more where the legend has more rows."""
    return 3.1 + 0.09 * max(0, len(results["methods"]) - 2)


def _legend(axes: Any, columns: int) -> None:
    """Puts the legend above the plot, where no line can run through it."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, fontsize=8.5)
