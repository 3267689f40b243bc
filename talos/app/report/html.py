"""The page's building blocks: tables, figures, sections. All texts of the results are escaped."""

import html
from collections.abc import Iterable, Mapping, Sequence

from talos.app.report.results import Results
from talos.app.report.rows import percent, row_style, titles
from talos.app.report.style import VARIABLES

__all__ = ["details", "escape", "estimate", "figure", "row_label", "section", "table"]

_NARROW = 4  # columns that fit on a phone; a table of more says there that it scrolls


def escape(text: object) -> str:
    """Return a text that is safe between tags and in attributes."""
    return html.escape(str(text), quote=True)


def estimate(entry: Mapping[str, float] | None) -> str:
    """Return an estimate with its interval as HTML, in per cent; nothing where there is none."""
    if entry is None:
        return ""
    return (
        f"<b>{percent(entry['value'])}</b> "
        f"<small>{percent(entry['low'])}–{percent(entry['high'])}</small>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> str:
    """Return a table that scrolls sideways within its frame where it must, its first column fixed.

    Args:
        head: HTML of the head's cells.
        rows: HTML of each row's cells.
        text_columns: number of columns from the left that hold text; the others hold numbers.
    """

    def cells(tag: str, row: Sequence[str]) -> str:
        parts = []
        for column, cell in enumerate(row):
            kind = "" if column < text_columns else " class=n"
            parts.append(f"<{tag}{kind}>{cell}</{tag}>")
        return "<tr>" + "".join(parts) + "</tr>"

    lines = "".join(cells("td", row) for row in rows)
    kind = "wide many" if len(head) > _NARROW else "wide"
    return (
        f'<div class="{kind}" tabindex=0><table><thead>{cells("th", head)}</thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def figure(svg: str, label: str) -> str:
    """Return a figure in the page's colours, which differ in a dark theme.

    Args:
        svg: the figure's element.
        label: a description for screen readers.
    """
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return f'<figure role=img aria-label="{escape(label)}">{svg}</figure>'


def section(title: str, text: str, *parts: str) -> str:
    """Return a section of a heading, an introduction in plain text, and parts in HTML."""
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{''.join(parts)}</section>"


def details(summary: str, *parts: str) -> str:
    """Return parts in HTML that are hidden until a reader opens them."""
    return f"<details><summary>{escape(summary)}</summary>{''.join(parts)}</details>"


def row_label(results: Results, row: str) -> str:
    """Return a row's title as HTML, with a dot of its colour."""
    colour = VARIABLES[row_style(results, row).colour]
    return (
        f'<span class=row><span class=dot style="background:{colour}"></span>'
        f"<span>{escape(titles(results)[row])}</span></span>"
    )
