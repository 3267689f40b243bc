"""The page's building blocks: tables, figures, sections. Every text that comes in is escaped."""

import html
from collections.abc import Iterable, Sequence

from talos.app.report.results import Results, percent
from talos.app.report.svg import method_colour

__all__ = ["escape", "estimate", "figure", "method_label", "section", "table"]


def escape(text: object) -> str:
    """Makes a text safe between tags and in attributes.

    Args:
        text: anything with a string form.

    Returns:
        HTML.
    """
    return html.escape(str(text), quote=True)


def estimate(entry: dict[str, float]) -> str:
    """Writes an estimate with its interval.

    Args:
        entry: `value`, `low` and `high`, shares.

    Returns:
        HTML, in per cent.
    """
    return (
        f"<b>{percent(entry['value'])}</b> "
        f"<small>{percent(entry['low'])}–{percent(entry['high'])}</small>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> str:
    """Builds a table that scrolls sideways where it must.

    Args:
        head: HTML of the head's cells.
        rows: HTML of each row's cells.
        text_columns: how many columns from the left hold text; the others are numbers.

    Returns:
        HTML.
    """

    def cells(tag: str, row: Sequence[str]) -> str:
        parts = []
        for column, cell in enumerate(row):
            kind = "" if column < text_columns else " class=n"
            parts.append(f"<{tag}{kind}>{cell}</{tag}>")
        return "<tr>" + "".join(parts) + "</tr>"

    lines = "".join(cells("td", row) for row in rows)
    return (
        f"<div class=wide><table><thead>{cells('th', head)}</thead>"
        f"<tbody>{lines}</tbody></table></div>"
    )


def figure(svg: str, caption: str, label: str) -> str:
    """Puts a caption under a figure.

    Args:
        svg: the figure's element.
        caption: text under it.
        label: what it shows, for those who do not see it.

    Returns:
        HTML.
    """
    return (
        f'<figure role=img aria-label="{escape(label)}">{svg}'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def section(title: str, text: str, *parts: str) -> str:
    """Builds a section.

    Args:
        title: text of its heading.
        text: an introduction, may be empty.
        *parts: HTML.

    Returns:
        HTML.
    """
    lead = f"<p>{escape(text)}</p>" if text else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{''.join(parts)}</section>"


def method_label(results: Results, method: dict[str, str]) -> str:
    """Writes a method's title with a dot of its colour.

    Args:
        results: the results.
        method: an entry of `methods`.

    Returns:
        HTML.
    """
    colour = method_colour(results, method["name"])
    return (
        f'<span class=method><span class=dot style="background:{colour}"></span>'
        f"{escape(method['title'])}</span>"
    )
