"""The page's building blocks: tables, figures, sections. All texts of the results are escaped."""

import html
from collections.abc import Iterable, Sequence

from talos.app.demo.report.results import Results, percent
from talos.app.demo.report.style import VARIABLES
from talos.app.demo.report.svg import method_colour

__all__ = ["escape", "estimate", "figure", "method_label", "section", "table"]

_NARROW = 4  # columns that fit on a phone; a table of more says there that it scrolls


def escape(text: object) -> str:
    """Return a text that is safe between tags and in attributes."""
    return html.escape(str(text), quote=True)


def estimate(entry: dict[str, float]) -> str:
    """Return an estimate with its interval as HTML, in per cent."""
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


def figure(svg: str, caption: str, label: str) -> str:
    """Return a figure with its caption, in the page's colours, which differ in a dark theme.

    Args:
        svg: the figure's element.
        caption: text under it.
        label: a description for screen readers.
    """
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return (
        f'<figure role=img aria-label="{escape(label)}">{svg}'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def section(title: str, text: str, *parts: str) -> str:
    """Return a section of a heading, an introduction in plain text, and parts in HTML."""
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{''.join(parts)}</section>"


def method_label(results: Results, method: dict[str, str]) -> str:
    """Return a method's title as HTML, with a dot of its colour."""
    colour = VARIABLES[method_colour(results, method["name"])]
    return (
        f'<span class=method><span class=dot style="background:{colour}"></span>'
        f"{escape(method['title'])}</span>"
    )
