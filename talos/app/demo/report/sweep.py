"""The page of a sweep: means and ranges over the seeds, accuracy against density."""

from collections.abc import Sequence
from typing import Any

from talos.app.demo.report.accuracies import tasks
from talos.app.demo.report.artefacts import setting_rows
from talos.app.demo.report.html import escape, figure, method_label, section, table
from talos.app.demo.report.results import FIGURES, Results, percent
from talos.app.demo.report.style import GREY
from talos.app.demo.report.svg import draw, method_colour

__all__ = ["content", "spread", "unedited"]


def spread(entry: dict[str, Any]) -> tuple[str, str]:
    """Format a mean and its range over the seeds, in per cent; of one seed there is no range.

    Example:
        >>> spread({"mean": 0.5, "low": 0.25, "high": 0.75})
        ('50.0', '25.0–75.0')
        >>> spread({"mean": 1, "low": 1, "high": 1})
        ('100.0', '')
    """
    low, high = percent(entry["low"]), percent(entry["high"])
    return percent(entry["mean"]), "" if low == high else f"{low}–{high}"


def unedited(results: Results) -> list[str]:
    """Say which runs ended in no edit, a sentence for each method and density."""
    titles = {method["name"]: method["title"] for method in results["methods"]}
    found = []
    for entry in results["summary"]:
        name, density = entry["method"], entry["density"]
        none = [
            name in cell.get("unedited", ())
            for cell in results["cells"]
            if _of(cell, name, density)
        ]
        if any(none):
            at = "" if density is None else f" at density {density:g}"
            found.append(
                f"{titles[name]}{at}: no sum of the vectors was better on validation data in "
                f"{sum(none)} of {len(none)} runs, whose merged model is the pretrained one."
            )
    return found


def _of(cell: dict[str, Any], method: str, density: float | None) -> bool:
    return method in cell["figures"] and density in (None, cell["density"])


def content(results: Results) -> tuple[str, list[str]]:
    """Return the title of the page and the HTML of its sections."""
    densities = sorted({cell["density"] for cell in results["cells"]})
    seeds = sorted({cell["seed"] for cell in results["cells"]})
    counts = _count(densities, "density", "densities"), _count(seeds, "seed", "seeds")
    title = ", ".join((f"{len(results['tasks'])} tasks", *counts))
    header = (
        "<header><p class=eyebrow>talos · sparse fine-tuning and task arithmetic</p>"
        f"<h1>{escape(title)}</h1></header>"
    )
    return title, [
        header,
        tasks(results),
        _seeds_and_densities(results, densities),
        _cells(results),
        _made(results),
    ]


def _seeds_and_densities(results: Results, densities: list[float]) -> str:
    methods = {method["name"]: method for method in results["methods"]}
    zero_shot = f"<b>{percent(results['zero_shot'])}</b>"
    rows = [["pretrained", "", zero_shot, zero_shot, "", "", zero_shot]]
    for entry in results["summary"]:
        label = method_label(results, methods[entry["method"]])
        density = "" if entry["density"] is None else f"{entry['density']:g}"
        rows.append([label, density, *(_cell(entry[key]) for key in FIGURES)])
    columns = ("alone", "added", "normalised", "target negated", "control kept")
    pictures = ""
    if len(densities) > 1:
        drawn = figure(
            _curve(results),
            "Test accuracy of the model with all task vectors added, mean over the tasks. Bars "
            "reach from the lowest to the highest seed. Dashed: the pretrained model.",
            "accuracy of the merged model against the density",
        )
        pictures = f"<div class=grid>{drawn}</div>"
    return section(
        "Seeds and densities",
        "Test accuracy in per cent, mean over the tasks and the seeds, with the lowest and the "
        "highest seed. Alone: each task's own model. Added: one model with all task vectors. "
        "Normalised: added divided by alone, task by task. Target and control: the task to forget, "
        "and the mean of the others, after negation. The splits of the data are the same for all "
        "seeds.",
        table(("method", "density", *columns), rows),
        *(f"<p>{escape(line)}</p>" for line in unedited(results)),
        pictures,
    )


def _cells(results: Results) -> str:
    rows = [
        (
            f'<a href="{escape(cell["folder"])}/report.html">{escape(cell["folder"])}</a>',
            f"{cell['density']:g}",
            str(cell["seed"]),
            *(_added(cell["figures"], method["name"]) for method in results["methods"]),
        )
        for cell in results["cells"]
    ]
    labels = (f"{method_label(results, method)}, added" for method in results["methods"])
    return section(
        "The runs",
        "Each has a report, task vectors and masks of its own. A method without a density was run "
        "at the first density only.",
        table(("report", "density", "seed", *labels), rows),
    )


def _made(results: Results) -> str:
    model = ("model", escape(results["settings"]["model"]))
    return section(
        "Settings",
        "The same seed on the same machine gives the same numbers.",
        table(("setting", "value"), [model, *setting_rows(results)], text_columns=2),
    )


def _curve(results: Results) -> str:
    """Draw the merged models' accuracy against the density, with ranges over the seeds."""

    def paint(axes: Any) -> None:
        for method in results["methods"]:
            own = [each for each in results["summary"] if each["method"] == method["name"]]
            colour = method_colour(results, method["name"])
            y = [100 * each["added"]["mean"] for each in own]
            if own[0]["density"] is None:
                axes.axhline(y[0], color=colour, linewidth=1.5, label=method["title"])
                continue
            ranges = [
                [100 * abs(each["added"][end] - each["added"]["mean"]) for each in own]
                for end in ("low", "high")
            ]
            x = [each["density"] for each in own]
            style: dict[str, Any] = {"color": colour, "label": method["title"], "capsize": 3}
            axes.errorbar(x, y, ranges, marker="o", linewidth=2, **style)
        axes.axhline(100 * results["zero_shot"], color=GREY, linewidth=1, linestyle="--")
        axes.set_xscale("log")
        ticks = sorted({cell["density"] for cell in results["cells"]})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("density")
        axes.set_ylabel("mean accuracy, %")
        axes.grid(True)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    return draw("densities", 3.2, paint)


def _cell(entry: dict[str, Any]) -> str:
    mean, ends = spread(entry)
    return f"<b>{mean}</b> <small>{ends}</small>" if ends else f"<b>{mean}</b>"


def _added(figures: dict[str, Any], method: str) -> str:
    return percent(figures[method]["added"]) if method in figures else ""


def _count(items: Sequence[object], one: str, several: str) -> str:
    return f"{len(items)} {one if len(items) == 1 else several}"
