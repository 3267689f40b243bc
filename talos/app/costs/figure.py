"""Two figures: the time of an iteration and its peak memory, in units of non-linear fine-tuning's.

Bars are what was measured, by part; diamonds are the paper's.
"""

from collections.abc import Callable, Mapping
from typing import Any

from talos.app.costs.forms import BASELINE
from talos.app.costs.results import paper_ratios
from talos.app.report.svg import GREY, INK, draw

__all__ = ["memory_bars", "time_bars"]

Parts = dict[str, tuple[Callable[[Mapping[str, Any]], float], str]]

_TIME: Parts = {
    "forward and backward": (lambda form: form["forward_backward"], "#0f766e"),
    "optimizer": (lambda form: form["optimizer"], "#c2410c"),
}
_MEMORY: Parts = {
    "weights": (lambda form: form["memory"]["weights"], GREY),
    "gradients": (lambda form: form["memory"]["gradients"], "#c2410c"),
    "state": (lambda form: form["memory"]["state"], "#4f46e5"),
    "activations, workspace": (
        lambda form: max(form["memory"]["activations"], form["memory"]["workspace"]),
        "#0f766e",
    ),
}


def time_bars(results: Mapping[str, Any]) -> str:
    """Draws the time of an iteration.

    Args:
        results: of `talos.app.costs.results`, non-linear fine-tuning among the forms.

    Returns:
        An SVG document.
    """
    return _bars("time", results, _TIME, lambda form: form["total"], 1)


def memory_bars(results: Mapping[str, Any]) -> str:
    """Draws the peak memory of an iteration.

    Args:
        results: of `talos.app.costs.results`, non-linear fine-tuning among the forms.

    Returns:
        An SVG document.
    """
    return _bars("peak memory", results, _MEMORY, lambda form: form["memory"]["peak"], 2)


def _bars(
    what: str,
    results: Mapping[str, Any],
    parts: Parts,
    whole: Callable[[Mapping[str, Any]], float],
    place: int,
) -> str:
    forms, model = results["forms"], results["settings"]["model"]
    unit = whole(next(form for form in forms if form["form"] == BASELINE))
    reported = [paper_ratios(model, form["form"]) for form in forms]
    theirs = [(row, each[place]) for row, each in enumerate(reported) if each is not None]

    def paint(axes: Any) -> None:
        lefts = [0.0] * len(forms)
        for label, (part, colour) in parts.items():
            widths = [part(form) / unit for form in forms]
            axes.barh(range(len(forms)), widths, left=lefts, color=colour, label=label)
            lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
        for row, form in enumerate(forms):
            at = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center"}
            axes.text(1.0, row, f"{whole(form) / unit:.2f}", fontsize=8.5, **at)
        if theirs:
            rows, values = zip(*theirs, strict=True)
            axes.plot(values, rows, "D", color=INK, markersize=5, label="paper", linestyle="none")
        axes.set_yticks(range(len(forms)), [form["title"] for form in forms])
        axes.tick_params(length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25 * max([*lefts, *(value for _, value in theirs)]))
        axes.set_xlabel(f"{what}, non-linear = 1")
        axes.spines["left"].set_visible(False)
        axes.figure.legend(loc="outside upper left", ncols=3, fontsize=8)

    inline = draw(f"costs-{what}", 1.3 + 0.34 * len(forms), paint)
    standalone = 'xmlns="http://www.w3.org/2000/svg" style="background:#fff"'
    return inline.replace("<svg", f"<svg {standalone}", 1) + "\n"
