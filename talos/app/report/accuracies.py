"""The page's tables of accuracies: who won, the tasks, addition and negation task by task."""

from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from talos.app.report.headline import leading, summaries, verdict, zero_shot
from talos.app.report.html import details, escape, estimate, row_label, table
from talos.app.report.results import Results
from talos.app.report.rows import percent, runs_of, span, titles

__all__ = ["added_by_task", "answer", "failed_rates", "negated_by_task", "tasks", "why_zero"]


def answer(results: Results, model: str) -> str:
    """Return the table that says who won: a line for the pretrained model and for each row."""
    found = summaries(results, model)
    if not found:
        return ""
    before = percent(zero_shot(results, model))
    best = leading(found) if len(found) > 1 else []
    columns: dict[str, list[str]] = {
        "": ["pretrained"],
        "all added": [before],
        f"against {escape(next(iter(titles(results).values())))}": [""],
        "alone": [before],
        "normalised": [""],
        "forgotten task": [before],
        "its other tasks": [before],
        "learning rate": [""],
        "seeds": [""],
    }
    for row, each in found.items():
        figures, gap = each["figures"], each["against_first"]
        added = estimate(figures["added"])
        cells = (
            row_label(results, row),
            f"<span class=best>{added}</span>" if row in best else added,
            _gap(gap["added"], verdict(each)) if gap else "",
            *(estimate(figures[key]) for key in ("alone", "normalised", "target", "control")),
            f"{each['lr']:g}",
            str(each["seeds"]),
        )
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell)
    shown = {head: cells for head, cells in columns.items() if head == "" or any(cells[1:])}
    return table(list(shown), zip(*shown.values(), strict=True))


def tasks(results: Results) -> str:
    """Return the table of the tasks with their classes and examples."""
    lines = [
        (
            f"<b>{escape(task['name'])}</b>",
            f"<div class=long>{escape(task['description'])}</div>",
            escape(task["reads"]),
            str(task["classes"]),
            percent(task["chance"]),
            *(f"{task['examples'][split]:,}" for split in ("train", "validation", "test")),
        )
        for task in results["tasks"]
    ]
    head = ("task", "what it asks", "reads", "classes", "by chance, %")
    return table((*head, "train", "validation", "test"), lines, text_columns=3)


def added_by_task(results: Results, model: str) -> str:
    """Return the table of each task's accuracy: alone, and with all vectors added."""

    def cell(runs: list[dict[str, Any]], task: str) -> str:
        alone = fmean(run["single"][task]["value"] for run in runs)
        added = [run["addition"]["tasks"][task] for run in runs]
        ends = {key: fmean(each[key] for each in added) for key in ("value", "low", "high")}
        return f"{percent(alone)} → {estimate(ends)}"

    before = {task: percent(each["value"]) for task, each in results["zero_shot"][model].items()}
    return _by_task(results, model, before, cell)


def negated_by_task(results: Results, model: str) -> str:
    """Return the table of the accuracy on each forgotten task, and on the others meanwhile."""

    def cell(runs: list[dict[str, Any]], task: str) -> str:
        found = [run["negation"][task] for run in runs if run["negation"][task]]
        if not found:
            return ""
        target, control = (fmean(e[k]["value"] for e in found) for k in ("target", "control"))
        return f"<b>{percent(target)}</b> <small>others {percent(control)}</small>"

    before = {}
    for run in results["runs"]:
        for task, each in run["negation"].items():
            if run["model"] == model and each:
                target, control = (each[f"{k}_zero_shot"]["value"] for k in ("target", "control"))
                others = f"<small>others {percent(control)}</small>"
                before[task] = f"{percent(target)} {others}"
    return _by_task(results, model, before, cell) if before else ""


def failed_rates(results: Results, model: str) -> str:
    """Return a line for each row with rates that were tried and have no figures."""
    found = []
    for each in results["rows"]:
        known = [point["lr"] for point in results["rates"].get(model, {}).get(each["row"], ())]
        failed = [f"{lr:g}" for lr in each["lr"] if lr not in known]
        if known and failed:
            found.append(f"{each['title']}: training failed at {', '.join(failed)}.")
    return "".join(f"<p>{escape(line)}</p>" for line in found)


def why_zero(results: Results, model: str, search: str) -> str:
    """Return hidden lines, one for each search of "addition" or "negation" without an edit."""
    found = []
    for row, runs in runs_of(results, model).items():
        for run in runs:
            searches = {"": run["addition"]} if search == "addition" else run["negation"]
            for task, each in searches.items():
                if each and each["why_zero"]:
                    where = filter(None, (titles(results)[row], task, f"seed {run['seed']}"))
                    found.append(f"{', '.join(where)}: {each['why_zero']}.")
    lines = (f"<p>{escape(line)}</p>" for line in found)
    return details("Why the coefficient 0 was chosen", *lines) if found else ""


def _by_task(
    results: Results,
    model: str,
    before: Mapping[str, str],
    cell: Callable[[list[dict[str, Any]], str], str],
) -> str:
    """Return a table with a column for each task: the pretrained model, then each row's runs."""
    names = [task["name"] for task in results["tasks"]]
    lines = [["pretrained", *(before.get(name, "") for name in names)]]
    for row, runs in runs_of(results, model).items():
        lines.append([row_label(results, row), *(cell(runs, name) for name in names)])
    return table(("", *map(escape, names)), lines)


def _gap(gap: Mapping[str, float], verdict: str) -> str:
    value, _, ends = span(gap, sign="+").partition(" ")
    return f"<b>{value}</b> {verdict} <small>{ends.strip('()')}</small>"
