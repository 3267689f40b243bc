"""Matrices over tasks, and the density of a mask over layers and types."""

from collections.abc import Sequence
from typing import Any

from talos.app.demo.report.results import Results
from talos.app.demo.report.style import GREY, LINE
from talos.app.demo.report.svg import draw
from talos.architecture.layers import KINDS

__all__ = ["mask_structure", "matrix"]

_ON_LIGHT = "#111827"  # on a cell, whose colour no theme changes
_SHORT = {"query": "q", "key": "k", "value": "v", "attention out": "attn\nout"}


def mask_structure(results: Results) -> str:
    """Draw the density in per cent of each layer and type, the mean over all tasks."""
    nnz: dict[tuple[str, str], int] = {}
    numel: dict[tuple[str, str], int] = {}
    for mask in results["masks"].values():
        for entry in mask["structure"]:
            key = (str(entry["layer"]), str(entry["kind"]))
            nnz[key] = nnz.get(key, 0) + entry["nnz"]
            numel[key] = numel.get(key, 0) + entry["numel"]
    layers = sorted({layer for layer, _ in numel}, key=_layer_order)
    present = {kind for _, kind in numel}
    kinds = [kind for kind in KINDS if kind in present] + sorted(present - set(KINDS))
    values = [
        [
            100 * nnz[layer, kind] / numel[layer, kind] if numel.get((layer, kind)) else None
            for kind in kinds
        ]
        for layer in layers
    ]

    def paint(axes: Any) -> None:
        labels = [_SHORT.get(kind, kind.replace(" ", "\n")) for kind in kinds]
        _heat(axes, values, layers, labels, low=0, high=100, colours="YlGnBu", form="{:.1f}")
        axes.set_ylabel("layer")

    return draw("structure-mean", 0.9 + 0.34 * len(layers), paint)


def matrix(
    name: str,
    values: Sequence[Sequence[float]],
    labels: Sequence[str],
    *,
    low: float,
    high: float,
    colours: str = "YlGnBu",
    row_label: str = "",
    column_label: str = "",
) -> str:
    """Draw a square matrix over the tasks.

    Args:
        name: the figure's name, for its ids.
        values: rows.
        labels: the tasks' names, for rows and columns.
        low: the value of one end of the colour map.
        high: the value of its other end.
        colours: a matplotlib colour map.
        row_label: the label of the rows.
        column_label: the label of the columns.
    """

    def paint(axes: Any) -> None:
        short = [_folded(label) for label in labels]
        _heat(axes, values, short, short, low=low, high=high, colours=colours, form="{:.2f}")
        axes.tick_params(axis="x", labelsize=9 if len(labels) < 5 else 8)
        axes.set_ylabel(row_label)
        axes.set_xlabel(column_label)

    return draw(name, 1.1 + 0.46 * len(labels), paint)


def _heat(
    axes: Any,
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    low: float,
    high: float,
    colours: str,
    form: str,
) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    scale = Normalize(low, high)
    palette = colormaps[colours]
    filled = [[float("nan") if v is None else v for v in row] for row in values]
    axes.pcolormesh(filled, cmap=palette, norm=scale, edgecolors=LINE, linewidth=1.0)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value is None:
                axes.text(j + 0.5, i + 0.5, "·", ha="center", va="center", color=GREY)
                continue
            red, green, blue, _ = palette(scale(value))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.55
            axes.text(
                j + 0.5,
                i + 0.5,
                form.format(value),
                ha="center",
                va="center",
                fontsize=9.5,
                color="white" if dark else _ON_LIGHT,
            )
    axes.set_xticks([j + 0.5 for j in range(len(columns))], columns)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)


def _layer_order(layer: str) -> tuple[int, str]:
    return (int(layer), "") if layer.isdigit() else (-1, layer)


def _folded(label: str) -> str:
    """Break a name into lines at its underscores, and cut lines that are still too long."""
    lines = [""]
    for part in label.replace("_", "_\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > 11:
            lines.append("")
        lines[-1] += part
    return "\n".join(line if len(line) <= 12 else line[:11] + "…" for line in lines)
