"""Two figures of a workload: an iteration's time and its peak memory, with non-linear's as unit.

Bars are what was measured, by part; diamonds are the paper's.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benches.results import BASELINE, Costs, paper_ratios, ratios
from talos.app.report.style import GREY, INK
from talos.app.report.svg import Panel, save

Parts = dict[str, tuple[Callable[[Mapping[str, Any]], float], str]]

TIME: Parts = {
    "forward and backward": (lambda form: form["forward_backward"], "#0f766e"),
    "optimizer": (lambda form: form["optimizer"], "#c2410c"),
}
MEMORY: Parts = {
    "weights": (lambda form: form["memory"]["weights"], GREY),
    "gradients": (lambda form: form["memory"]["gradients"], "#c2410c"),
    "state": (lambda form: form["memory"]["state"], "#4f46e5"),
    "activations, workspace": (
        lambda form: max(form["memory"]["activations"], form["memory"]["workspace"]),
        "#0f766e",
    ),
}


def draw_costs(folder: Path, model: str, label: str, forms: Costs) -> None:
    """Draw one workload's forms.

    Without matplotlib, or where non-linear fine-tuning was not measured, nothing is drawn.
    """
    if find_spec("matplotlib") is None or ratios(forms, forms[0]) is None:
        return
    stem = label.replace(", ", "-").replace(" ", "-")
    time = _bars("time", model, forms, TIME, 1)
    memory = _bars("peak memory", model, forms, MEMORY, 2)
    save(folder / f"{stem}-time.svg", "costs-time", [time])
    save(folder / f"{stem}-memory.svg", "costs-memory", [memory])


def _bars(what: str, model: str, forms: Costs, parts: Parts, place: int) -> Panel:
    base = next(form for form in forms if form["form"] == BASELINE)
    unit = sum(part(base) for part, _ in parts.values())
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
            ratio = (ratios(forms, form) or ())[place]
            axes.text(1.0, row, f"{ratio:.2f}", fontsize=8.5, **at)
        if theirs:
            rows, values = zip(*theirs, strict=True)
            axes.plot(values, rows, "D", color=INK, markersize=5, label="paper", linestyle="none")
        axes.set_yticks(range(len(forms)), [form["title"] for form in forms])
        axes.tick_params(length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25 * max([*lefts, *(value for _, value in theirs)]))
        axes.set_xlabel(f"{what}, non-linear = 1")
        axes.spines["left"].set_visible(False)

    return Panel(1.0 + 0.34 * len(forms), paint)
