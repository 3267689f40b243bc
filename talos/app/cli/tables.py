"""The demo's results as tables for a terminal."""

from typing import Any

from rich.table import Table

__all__ = ["accuracies", "interval", "negation", "overview"]


def interval(entry: dict[str, Any], *, signed: bool = False) -> str:
    """Writes an estimate with its interval, in per cent.

    Args:
        entry: `value`, `low` and `high`.
        signed: whether a plus sign is written.

    Returns:
        Text with rich's markup.
    """
    form = "+.1f" if signed else ".1f"
    value, low, high = (format(100 * entry[key], form) for key in ("value", "low", "high"))
    return f"{value} [dim]{low} to {high}[/dim]" if signed else f"{value} [dim]{low}–{high}[/dim]"


def accuracies(results: dict[str, Any]) -> Table:
    """Lays out single-task and merged accuracies.

    Args:
        results: the results of a demo.

    Returns:
        A row a task, then the means and the normalised accuracy.
    """
    methods = [method["name"] for method in results["methods"]]
    table = Table(box=None, header_style="bold")
    table.add_column("task")
    table.add_column("zero-shot", justify="right")
    for method in results["methods"]:
        short = method["title"].split(" (")[0]
        coef = results["addition"][method["name"]]["scaling_coef"]
        table.add_column(f"{short}\nalone", justify="right")
        table.add_column(f"{short}\nadded, {coef:.2f}", justify="right")
    names = [task["name"] for task in results["tasks"]]
    for name in names:
        row = [name, interval(results["zero_shot"][name])]
        for method in methods:
            row.append(interval(results["single"][method][name]))
            row.append(interval(results["addition"][method]["tasks"][name]))
        table.add_row(*row)
    row = ["mean", _mean(results["zero_shot"])]
    for method in methods:
        row.append(_mean(results["single"][method]))
        row.append(interval(results["addition"][method]["absolute"]))
    table.add_row(*row, style="bold")
    row = ["normalised", ""]
    for method in methods:
        row += ["", interval(results["addition"][method]["normalised"])]
    table.add_row(*row, style="bold")
    return table


def negation(results: dict[str, Any]) -> Table:
    """Lays out target and control accuracies after negation.

    Args:
        results: the results of a demo.

    Returns:
        A row a task.
    """
    table = Table(box=None, header_style="bold")
    table.add_column("forgotten")
    for method in results["methods"]:
        short = method["title"].split(" (")[0]
        table.add_column(f"{short}\ntarget", justify="right")
        table.add_column("\ncontrol", justify="right")
        table.add_column("\ncoef.", justify="right")
    for task in results["tasks"]:
        row = [task["name"]]
        for method in results["methods"]:
            entry = results["negation"][method["name"]][task["name"]]
            row.append(_change(entry["target_zero_shot"], entry["target"]))
            row.append(_change(entry["control_zero_shot"], entry["control"]))
            row.append(f"{entry['scaling_coef']:.2f}")
        table.add_row(*row)
    return table


def overview(results: dict[str, Any]) -> Table:
    """Lays out the means over the tasks; for more methods than fit beside each other.

    Args:
        results: the results of a demo.

    Returns:
        A row a method: alone, added, forgotten.
    """
    table = Table(box=None, header_style="bold")
    table.add_column("mean over the tasks")
    for column in ("alone", "added", "normalised", "target\nnegated", "control\nkept"):
        table.add_column(column, justify="right")
    zero_shot = _mean(results["zero_shot"])
    table.add_row("zero-shot", zero_shot, zero_shot, "", zero_shot, zero_shot)
    for method in results["methods"]:
        name = method["name"]
        added, negated = results["addition"][name], results["negation"][name]
        table.add_row(
            method["title"],
            _mean(results["single"][name]),
            interval(added["absolute"]),
            interval(added["normalised"]),
            _mean({task: entry["target"] for task, entry in negated.items()}),
            _mean({task: entry["control"] for task, entry in negated.items()}),
        )
    return table


def _change(before: dict[str, Any], after: dict[str, Any]) -> str:
    return f"[dim]{100 * before['value']:.1f} →[/dim] {100 * after['value']:.1f}"


def _mean(entries: dict[str, dict[str, Any]]) -> str:
    return f"{100 * sum(entry['value'] for entry in entries.values()) / len(entries):.1f}"
