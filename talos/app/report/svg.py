"""Pictures made by matplotlib: inline SVG whose text stays text, and files of SVG or PNG."""

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from talos.app.extras import import_package
from talos.app.report.style import EDGE, INK, LINE

__all__ = ["Panel", "folded", "picture", "save"]

_WIDTH = 4.5  # inches: a phone scales the picture to 360 px, and text of 9 points to 10 px
_LETTERS = 44  # of the title of a row that fit into a line of the legend
_TITLE = 46  # of a plot's title, which is bold
_PIXELS = 200  # an inch of a PNG


@dataclass(frozen=True)
class Panel:
    """One of the plots that a picture has below each other.

    Attributes:
        height: inches, without the title.
        paint: draws on the axes that it is given; what it labels is in the picture's legend.
        title: above the plot; empty: none.
    """

    height: float
    paint: Callable[[Any], None]
    title: str = ""


def picture(name: str, panels: Sequence[Panel]) -> str:
    """Draw plots below each other, with one legend above them.

    Args:
        name: makes the ids of the picture unique on a page.
        panels: the plots, at least one.

    Returns:
        An SVG element without a background, the same bytes in every run.

    Raises:
        TalosRuntimeError: matplotlib is missing.
    """
    name = _as_id(name)
    return _inline(_drawn(name, panels, "svg", transparent=True).decode(), name)


def save(path: Path, name: str, panels: Sequence[Panel]) -> None:
    """Write a picture on white ground to a file, .svg or .png.

    Raises:
        TalosRuntimeError: matplotlib is missing.
        TalosOSError: the file cannot be written.
    """
    from talos.files import atomic_write

    made = _drawn(_as_id(name), panels, path.suffix[1:], facecolor="white", dpi=_PIXELS)
    if path.suffix == ".svg":  # its first lines name a document type that lies elsewhere
        text = made.decode()
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
        made = text.encode()
    atomic_write(path, lambda new: new.write_bytes(made))


def folded(text: str, letters: int, lines: int = 2) -> str:
    r"""Break a text into lines, and cut what is still too long.

    Example:
        >>> folded("TaLoS, density 0.05, disjoint", 12).split("\n")
        ['TaLoS,', 'density…']
    """
    return "\n".join(
        textwrap.wrap(text, letters, max_lines=lines, placeholder="…") or [text[:letters]]
    )


def _as_id(name: str) -> str:
    """Return an id that no other name has."""
    return re.sub(r"[^A-Za-z0-9_]", lambda odd: "-" if odd[0] == "-" else f"-{ord(odd[0]):x}", name)


def _drawn(name: str, panels: Sequence[Panel], form: str, **how: Any) -> bytes:
    """Return the bytes of a file of matplotlib."""
    matplotlib = import_package("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,  # the same ids in every run
        "font.family": "DejaVu Sans",
        "font.size": 10.0,
        "axes.edgecolor": EDGE,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": INK,
        "ytick.color": INK,
        "text.color": INK,
        "text.parse_math": False,  # names of files may hold dollar signs
        "grid.color": LINE,
        "legend.frameon": False,
    }
    metadata: dict[str, None] = {"Software": None}
    if form == "svg":
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context(style):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        titles = [folded(panel.title, _TITLE) for panel in panels]
        heights = [
            panel.height + (0.2 + 0.18 * title.count("\n") if title else 0.0)
            for panel, title in zip(panels, titles, strict=True)
        ]
        plots = []
        parts = figure.subfigures(len(panels), squeeze=False, height_ratios=heights)[:, 0]
        for part, panel, title in zip(parts, panels, titles, strict=True):
            if title:  # from the left edge: an axis may begin far to the right of its labels
                part.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
            plots.append(part.add_subplot())
            panel.paint(plots[-1])
        figure.set_size_inches(_WIDTH, sum(heights) + _legend(figure, plots))
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, metadata=metadata, **how)
    return buffer.getvalue()


def _legend(figure: Any, plots: Sequence[Any]) -> float:
    """Put one legend above all plots, where no line can run through it; return its height."""
    found: dict[str, Any] = {}
    for axes in plots:
        handles, labels = axes.get_legend_handles_labels()
        found = dict(zip(labels, handles, strict=True)) | found
    if not found:
        return 0.0
    labels = [folded(label, _LETTERS) for label in found]
    columns = 2 if len(found) > 1 and max(map(len, found)) <= _LETTERS // 2 - 2 else 1
    figure.legend(found.values(), labels, loc="outside upper left", ncols=columns, fontsize=9.5)
    lines: int = sum(label.count("\n") + 1 for label in labels)
    return 0.2 + 0.2 * lines / columns


def _inline(svg: str, name: str) -> str:
    """Return the SVG element alone, without prolog, metadata, namespaces and spare digits.

    Ids without a reference are removed; the others are made unique on the page.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r">\s+<", "><", svg)
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), svg)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))

    def keep(match: re.Match[str]) -> str:
        return f' id="{name}-{match[1]}"' if match[1] in used else ""

    svg = re.sub(r'\sid="([^"]*)"', keep, svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    head, rest = svg.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return head + ">" + rest.strip()
