"""The demo's results as a table for a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from talos.app.cli.console import table

__all__ = ["interval", "overview"]


def interval(entry: Mapping[str, Any], *, signed: bool = False) -> str:
    """Format an estimate and its interval in per cent, with rich's markup."""
    form = "+.1f" if signed else ".1f"
    value, low, high = (format(100 * entry[key], form) for key in ("value", "low", "high"))
    return f"{value} [dim]{low} to {high}[/dim]" if signed else f"{value} [dim]{low}–{high}[/dim]"


def overview(results: dict[str, Any]) -> Table:
    """Return a table of means over the tasks, a row for each method."""
    columns = ("alone", "added", "normalised", "target\nnegated", "control\nkept")
    shown = table(["mean over the tasks"], columns)
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


def _mean(entries: dict[str, dict[str, Any]]) -> str:
    return f"{100 * sum(entry['value'] for entry in entries.values()) / len(entries):.1f}"
