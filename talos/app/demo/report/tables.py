"""The demo's results on a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from talos.app.cli.console import print_line, table
from talos.app.demo.report.results import FIGURES, SWEEP_SCHEMA, headline
from talos.app.demo.report.sweep import spread, unedited

__all__ = ["interval", "overview", "show_results"]


def interval(entry: Mapping[str, Any], *, signed: bool = False) -> str:
    """Format an estimate and its interval in per cent, with rich's markup."""
    form = "+.1f" if signed else ".1f"
    value, low, high = (format(100 * entry[key], form) for key in ("value", "low", "high"))
    return f"{value} [dim]{low} to {high}[/dim]" if signed else f"{value} [dim]{low}–{high}[/dim]"


_COLUMNS = ("alone", "added", "normalised", "target\nnegated", "control\nkept")


def overview(results: dict[str, Any]) -> Table:
    """Return a table of means over the tasks, a row for each method."""
    shown = table(["mean over the tasks"], _COLUMNS)
    zero_shot = _mean(results["zero_shot"])
    shown.add_row("zero-shot", zero_shot, zero_shot, "", zero_shot, zero_shot)
    for method in results["methods"]:
        name = method["name"]
        added, negated = results["addition"][name], results["negation"][name]
        shown.add_row(
            method["title"],
            _mean(results["single"][name]),
            interval(added["absolute"]),
            interval(added["normalised"]),
            _mean({task: entry["target"] for task, entry in negated.items()}),
            _mean({task: entry["control"] for task, entry in negated.items()}),
        )
    return shown


def show_results(console: Console, results: dict[str, Any]) -> None:
    """Print a demo's table and its headline, or the table of a sweep."""
    if results["schema"] == SWEEP_SCHEMA:
        console.print("[bold]test accuracy in %, mean with lowest and highest seed[/bold]")
        console.print(_sweep(results))
        for sentence in unedited(results):
            print_line(console, sentence)
        return
    console.print("[bold]test accuracy in % with 95 % intervals[/bold]")
    console.print(overview(results))
    console.print()
    for sentence in headline(results):
        print_line(console, sentence)


def _sweep(results: dict[str, Any]) -> Table:
    """Return a table of means over tasks and seeds, a row for each method and density."""
    titles = {method["name"]: method["title"] for method in results["methods"]}
    shown = table(["mean over tasks and seeds", "density"], _COLUMNS)
    zero_shot = f"{100 * results['zero_shot']:.1f}"
    shown.add_row("zero-shot", "", zero_shot, zero_shot, "", "", zero_shot)
    for entry in results["summary"]:
        cells = []
        for key in FIGURES:
            mean, ends = spread(entry[key])
            cells.append(f"{mean} [dim]{ends}[/dim]" if ends else mean)
        density = "" if entry["density"] is None else f"{entry['density']:g}"
        shown.add_row(titles[entry["method"]], density, *cells)
    return shown


def _mean(entries: dict[str, dict[str, Any]]) -> str:
    return f"{100 * sum(entry['value'] for entry in entries.values()) / len(entries):.1f}"
