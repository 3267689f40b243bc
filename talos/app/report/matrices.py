"""Heat maps: matrices over the tasks, the layers and kinds of a mask, and two coefficients."""

from collections.abc import Callable, Sequence
from typing import Any

from talos.app.report.results import Results
from talos.app.report.rows import Table, number, percent, titles, with_row
from talos.app.report.style import GREY, LINE
from talos.app.report.svg import Panel
from talos.architecture.layers import KINDS

__all__ = [
    "disentanglement",
    "disentanglement_table",
    "interference",
    "over_tasks_table",
    "overlap",
    "sensitivity",
    "structure",
    "structure_table",
]

_ON_LIGHT = "#111827"  # on a cell, whose colour no theme changes
_SHORT = {"query": "q", "key": "k", "value": "v", "attention out": "attn\nout"}
_FEW = 7  # columns whose cells have room for a decimal; more have their labels upright
_MOST = 12  # columns whose cells have room for a number
_LETTERS = 34  # of all columns' labels beside each other
_INCH = 0.34  # the height of a line of cells

Values = Sequence[Sequence[float | None]]


def interference(results: Results, model: str) -> list[Panel]:
    """Return the plots of what each vector does to each task."""
    labels = ("vector of the task", "accuracy on the task,\n% of the pretrained model's")
    return _over_tasks(results, model, "interference", *labels, low=70, high=130, colours="RdBu")


def sensitivity(results: Results, model: str) -> list[Panel]:
    """Return the plots of what is left without the entries that a task's mask selects."""
    labels = ("pruned by the task", "accuracy on the task,\n% of the pretrained model's")
    return _over_tasks(results, model, "sensitivity", *labels, low=70, high=130, colours="RdBu")


def overlap(results: Results, model: str) -> list[Panel]:
    """Return the plots of how far the tasks' masks overlap."""
    labels = ("mask of the task", "overlap with the mask of the task, %")
    return _over_tasks(results, model, "mask_iou", *labels, low=0, high=100, colours="YlGnBu")


def over_tasks_table(part: str) -> Callable[[Results, str], Table]:
    """Return the function that lists the matrices over the tasks of a part of the results."""

    def table(results: Results, model: str) -> Table:
        tasks = [task["name"] for task in results["tasks"]]
        rows = [
            (titles(results)[row], task, *map(percent, line))
            for row, values in with_row(results, part, model).items()
            for task, line in zip(tasks, values, strict=True)
        ]
        return ("row", "task", *tasks), rows

    return table


def structure(results: Results, model: str) -> list[Panel]:
    """Return the plots of the density of each layer and kind, the mean over the tasks."""
    found = _structures(results, model)
    high = max(
        (v for _, _, values in found.values() for line in values for v in line if v), default=1
    )

    def panel(row: str, layers: list[str], kinds: list[str], values: Values) -> Panel:
        def paint(axes: Any) -> None:
            short = [_SHORT.get(kind, kind.replace(" ", "\n")) for kind in kinds]
            _heat(axes, values, layers, short, low=0, high=high, colours="YlGnBu")
            axes.set_ylabel("layer")
            axes.set_xlabel("kind of weights (numbers: density, %)")

        inch = _INCH if len(layers) < 16 else 0.24
        return Panel(0.9 + inch * len(layers), paint, titles(results)[row])

    return [panel(row, *each) for row, each in found.items()]


def structure_table(results: Results, model: str) -> Table:
    """Return a line for each layer of each row, a column for each kind."""
    found = _structures(results, model)
    kinds = _in_order(kind for _, own, _ in found.values() for kind in own)
    rows = []
    for row, (layers, own, values) in found.items():
        for layer, line in zip(layers, values, strict=True):
            of = dict(zip(own, line, strict=True))
            rows.append((titles(results)[row], layer, *(number(of.get(k), ".1f") for k in kinds)))
    return ("row", "layer", *(f"{kind}, %" for kind in kinds)), rows


def disentanglement(results: Results, model: str) -> list[Panel]:
    """Return the maps of how often two vectors together predict otherwise than each alone."""
    found = with_row(results, "disentanglement", model)
    high = max(
        (100 * v for each in found.values() for line in each["error"] for v in line), default=1
    )

    def panel(row: str, tasks: Sequence[str], coefs: list[float], error: Values) -> Panel:
        def paint(axes: Any) -> None:
            labels = [number(coef) for coef in coefs]
            values = [[None if v is None else 100 * v for v in line] for line in error]
            top = max(high, 1.0)
            mesh = _heat(axes, values, labels, labels, low=0, high=top, colours="YlGnBu")
            one, two = (_cut(task, 24) for task in tasks)
            axes.set_ylabel(f"coefficient of\n{one}")
            said = "" if len(coefs) > _MOST else "\n(numbers: other predictions, %)"
            axes.set_xlabel(f"coefficient of {two}{said}")
            if len(coefs) > _MOST:
                label = "other predictions, %"
                axes.figure.colorbar(mesh, ax=axes, label=label).outline.set_visible(False)

        height = 1.0 + min(max(0.3 * len(coefs), 1.6), 3.4)
        return Panel(height, paint, titles(results)[row])

    return [panel(row, each["tasks"], each["coefs"], each["error"]) for row, each in found.items()]


def disentanglement_table(results: Results, model: str) -> Table:
    """Return a line for each coefficient of the first task, a column for each of the second."""
    found = with_row(results, "disentanglement", model)
    first = next(iter(found.values()))
    rows = [
        (titles(results)[row], number(coef), *map(percent, line))
        for row, each in found.items()
        for coef, line in zip(each["coefs"], each["error"], strict=True)
    ]
    one, two = first["tasks"]
    return ("row", f"coefficient of {one}", *(f"{two} {number(c)}" for c in first["coefs"])), rows


def _over_tasks(
    results: Results, model: str, part: str, row_label: str, column_label: str, **scale: Any
) -> list[Panel]:
    tasks = [task["name"] for task in results["tasks"]]

    def panel(row: str, matrix: Values) -> Panel:
        def paint(axes: Any) -> None:
            values = [[None if v is None else 100 * v for v in line] for line in matrix]
            _heat(axes, values, tasks, tasks, **scale)
            axes.set_ylabel(row_label)
            axes.set_xlabel(column_label)

        cells = max(_INCH * len(tasks), 1.3)  # the label beside them is as long as that
        return Panel(0.6 + cells + _foot(tasks), paint, titles(results)[row])

    return [panel(row, each) for row, each in with_row(results, part, model).items()]


def _structures(
    results: Results, model: str
) -> dict[str, tuple[list[str], list[str], list[list[float | None]]]]:
    """Return each row's layers, kinds and densities in per cent, the mean over the tasks."""
    found = {}
    for row, tasks in with_row(results, "masks", model).items():
        nnz: dict[tuple[str, str], int] = {}
        numel: dict[tuple[str, str], int] = {}
        for mask in tasks.values():
            for entry in mask["structure"]:
                key = (str(entry["layer"]), str(entry["kind"]))
                nnz[key] = nnz.get(key, 0) + entry["nnz"]
                numel[key] = numel.get(key, 0) + entry["numel"]
        layers = sorted({layer for layer, _ in numel}, key=_layer_order)
        kinds = _in_order(kind for _, kind in numel)
        found[row] = (
            layers,
            kinds,
            [
                [
                    100 * nnz[layer, k] / numel[layer, k] if numel.get((layer, k)) else None
                    for k in kinds
                ]
                for layer in layers
            ],
        )
    return found


def _in_order(kinds: Any) -> list[str]:
    present = set(kinds)
    return [kind for kind in KINDS if kind in present] + sorted(present - set(KINDS))


def _layer_order(layer: str) -> tuple[int, str]:
    return (int(layer), "") if layer.isdigit() else (-1, layer)


def _heat(
    axes: Any,
    values: Values,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    low: float,
    high: float,
    colours: str,
) -> Any:
    """Draw cells with their numbers, where there is room; return what a colour bar needs."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    scale, palette = Normalize(low, high), colormaps[colours]
    few, numbered = len(columns) <= _FEW, len(columns) <= _MOST
    filled = [[float("nan") if v is None else v for v in row] for row in values]
    edges = {"edgecolors": LINE, "linewidth": 1.0} if numbered else {}
    mesh = axes.pcolormesh(filled, cmap=palette, norm=scale, rasterized=False, **edges)
    for i, row in enumerate(values if numbered else ()):
        for j, value in enumerate(row):
            red, green, blue, _ = palette(scale(low if value is None else value))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.55
            axes.text(
                j + 0.5,
                i + 0.5,
                "·" if value is None else f"{value:.{1 if few else 0}f}",
                ha="center",
                va="center",
                fontsize=9 if len(columns) < 10 else 8,
                color=GREY if value is None else "white" if dark else _ON_LIGHT,
            )
    every = 1 if numbered else -(-len(columns) // 6)
    down = 1 if len(rows) <= _MOST or len(rows) != len(columns) else every
    across, upright = ([_cut(label) for label in labels] for labels in (columns, rows))
    axes.set_xticks([j + 0.5 for j in range(0, len(columns), every)], across[::every])
    axes.set_yticks([i + 0.5 for i in range(0, len(rows), down)], upright[::down])
    axes.tick_params(length=0, labelsize=9)
    axes.tick_params(axis="x", rotation=90 if _upright(across) else 0)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    return mesh


def _upright(labels: Sequence[str]) -> bool:
    """Return whether labels below columns have no room beside each other."""
    longest = max(len(line) for label in labels for line in label.split("\n"))
    return longest > _LETTERS // len(labels)


def _foot(labels: Sequence[str]) -> float:
    """Return the height of labels below columns, in inches."""
    cut = [_cut(label) for label in labels]
    return 0.08 * max(map(len, cut)) if _upright(cut) else 0.2


def _cut(label: str, letters: int = 18) -> str:
    return label if len(label) <= letters else label[: letters - 1] + "…"
