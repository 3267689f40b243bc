"""An experiment's results on a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from talos.app.cli.console import print_line, table
from talos.app.report.headline import chance, headline, summaries, verdict, zero_shot
from talos.app.report.rows import percent, titles

__all__ = ["interval", "overview", "show_results"]


def interval(entry: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """Format an estimate and its interval in per cent, with rich's markup; nothing for None."""
    if entry is None:
        return ""
    form = "+.1f" if signed else ".1f"
    value, low, high = (format(100 * entry[key], form) for key in ("value", "low", "high"))
    return f"{value} [dim]{low} to {high}[/dim]" if signed else f"{value} [dim]{low}–{high}[/dim]"


def overview(results: dict[str, Any], model: str) -> Table:
    """Return a table of means over the tasks and seeds, a line for each row of a model."""
    found = summaries(results, model)
    columns = ["all added", "against the first", "alone", "normalised"]
    columns += ["forgotten\ntask", "its other\ntasks", "learning\nrate"]
    shown = table(["mean over the tasks"], columns)
    before = percent(zero_shot(results, model))
    shown.add_row("pretrained", before, "", before, "", before, before)
    for row, each in found.items():
        figures, gap = each["figures"], each["against_first"]
        shown.add_row(
            escape(titles(results)[row]),
            interval(figures["added"]),
            f"{interval(gap['added'], signed=True)} [dim]{verdict(each)}[/dim]" if gap else "",
            *(interval(figures[key]) for key in ("alone", "normalised", "target", "control")),
            _rate(results, model, row, each["lr"]),
        )
    return shown


def _rate(results: Mapping[str, Any], model: str, row: str, lr: float) -> str:
    """Return a chosen learning rate, and whether a better one may lie beyond those tried."""
    tried = [each["lr"] for each in results["rates"][model][row]]
    ends = {min(tried): "smallest tried", max(tried): "largest tried"}
    beside = "only one" if len(tried) == 1 else ends.get(lr, "")
    return f"{lr:g} [dim]{beside}[/dim]" if beside else f"{lr:g}"


def show_results(console: Console, results: dict[str, Any]) -> None:
    """Print the table of each model and who won."""
    for model in results["models"]:
        name = escape(str(model["name"]))
        over = chance(results)
        console.print(f"[bold]{name}: test accuracy in %, 95 % intervals over {over}[/bold]")
        console.print(overview(results, model["name"]))
        console.print()
    for sentence in headline(results):
        print_line(console, sentence)
