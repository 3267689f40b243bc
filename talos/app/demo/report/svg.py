"""Inline SVG made by matplotlib: text stays text, and nothing is loaded from elsewhere."""

import io
import re
from collections.abc import Callable
from typing import Any

from talos.app.demo.report.results import Results
from talos.app.demo.report.style import EDGE, INK, LINE, METHODS
from talos.app.extras import import_package

__all__ = ["draw", "method_colour"]

_WIDTH = 4.5  # inches: a phone scales the figure to 380 px, and text of 9 points to 11 px


def method_colour(results: Results, method: str) -> str:
    """Return a method's colour, the same in every figure and table."""
    names = [entry["name"] for entry in results["methods"]]
    return METHODS[names.index(method) % len(METHODS)]


def draw(name: str, height: float, paint: Callable[[Any], None]) -> str:
    """Draw one figure.

    Args:
        name: makes the figure's ids unique on the page.
        height: inches.
        paint: draws on the axes that it is given.

    Returns:
        An SVG element, the same bytes in every run.

    Raises:
        TalosRuntimeError: matplotlib is missing.
    """
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", name)
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
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return _inline(buffer.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    """Return the SVG element alone, without prolog, metadata and namespaces.

    Ids without a reference are removed; the others are made unique on the page.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
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
