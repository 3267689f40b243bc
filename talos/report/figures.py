"""The report's figures: inline SVG made by matplotlib, text kept as text, no outside reference."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from talos.errors import TalosRuntimeError
from talos.report.results import Results

__all__ = [
    "KINDS",
    "accuracy_curve",
    "mask_structure",
    "matrix",
    "method_colour",
    "negation_curve",
    "phase_bars",
    "size_bars",
]

KINDS = ("q", "k", "v", "o", "mlp-in", "mlp-out", "norm", "bias")
_COLOURS = ("#0f766e", "#c2410c", "#4f46e5", "#a16207")
_GREY = "#64748b"
_INK = "#1f2937"
_WIDTH = 4.9  # inches: the text stays readable when a phone scales the figure to 380 px


def method_colour(results: Results, method: str) -> str:
    """Gives a method its colour.

    Args:
        results: the results.
        method: the method's name.

    Returns:
        A CSS colour, the same in every figure and table.
    """
    names = [entry["name"] for entry in results["methods"]]
    return _COLOURS[names.index(method) % len(_COLOURS)]


def _draw(name: str, height: float, paint: Callable[[Any], None]) -> str:
    """Runs `paint(axes)` on a new figure and returns the SVG element."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", name)
    try:
        import matplotlib
    except ImportError as error:
        raise TalosRuntimeError(
            "the report must have matplotlib for its figures, got no such module; "
            "pip install 'talos-sparse[report]'"
        ) from error
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,  # the same ids in every run
        "font.family": "DejaVu Sans",
        "font.size": 9.0,
        "axes.edgecolor": "#cbd5e1",
        "axes.labelcolor": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "text.color": _INK,
        "grid.color": "#e2e8f0",
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
    """Cuts an SVG document down to the element that HTML wants.

    No prolog, metadata or namespaces; only ids that something refers to, made unique on the page.
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
    axes.pcolormesh(filled, cmap=palette, norm=scale, edgecolors="white", linewidth=1.5)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value is None:
                axes.text(j + 0.5, i + 0.5, "·", ha="center", va="center", color=_GREY)
                continue
            red, green, blue, _ = palette(scale(value))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.55
            axes.text(
                j + 0.5,
                i + 0.5,
                form.format(value),
                ha="center",
                va="center",
                fontsize=8.5,
                color="white" if dark else _INK,
            )
    axes.set_xticks([j + 0.5 for j in range(len(columns))], columns)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)


def mask_structure(results: Results, task: str | None = None) -> str:
    """Draws the density of each layer's projections, norms and biases.

    Args:
        results: the results.
        task: one task's mask; by default the mean over all tasks.

    Returns:
        An SVG element: layers down, `KINDS` across, shade and number the density in per cent.
    """
    names = [task] if task is not None else list(results["masks"])
    nnz: dict[tuple[str, str], int] = {}
    numel: dict[tuple[str, str], int] = {}
    for name in names:
        for entry in results["masks"][name]["structure"]:
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
        _heat(axes, values, layers, kinds, low=0, high=100, colours="YlGnBu", form="{:.1f}")
        axes.set_ylabel("layer")

    return _draw(f"structure-{task or 'mean'}", 0.9 + 0.33 * len(layers), paint)


def _layer_order(layer: str) -> tuple[int, str]:
    return (int(layer), "") if layer.isdigit() else (-1, layer)


def accuracy_curve(results: Results) -> str:
    """Draws the merged model's accuracy on validation data against the scaling coefficient.

    Args:
        results: the results.

    Returns:
        An SVG element: one line a method, a dot at the chosen coefficient.
    """

    def paint(axes: Any) -> None:
        for method in results["methods"]:
            entry = results["addition"][method["name"]]
            colour = method_colour(results, method["name"])
            x = [point["scaling_coef"] for point in entry["grid"]]
            y = [100 * point["absolute"] for point in entry["grid"]]
            axes.plot(x, y, color=colour, linewidth=2, label=method["title"])
            chosen = min(range(len(x)), key=lambda i: abs(x[i] - entry["scaling_coef"]))
            axes.plot([x[chosen]], [y[chosen]], "o", color=colour, markersize=7)
        axes.set_xlabel("scaling coefficient")
        axes.set_ylabel("mean accuracy, %")
        axes.grid(True)
        axes.legend(loc="lower center", fontsize=8.5)

    return _draw("addition", 3.0, paint)


def negation_curve(results: Results, task: str) -> str:
    """Draws target and control accuracy on validation data against the scaling coefficient.

    Args:
        results: the results.
        task: the task whose vector is subtracted.

    Returns:
        An SVG element: solid lines the target, dashed ones the control, a dot where it was chosen.
    """

    def paint(axes: Any) -> None:
        for method in results["methods"]:
            entry = results["negation"][method["name"]][task]
            colour = method_colour(results, method["name"])
            for key, line in (("target", "-"), ("control", "--")):
                points = [p for p in entry["grid"] if p[key] is not None]
                x = [p["scaling_coef"] for p in points]
                y = [100 * p[key] for p in points]
                label = f"{method['title']}: {key}"
                axes.plot(x, y, line, color=colour, linewidth=1.8, label=label)
                if key == "target":
                    at = min(range(len(x)), key=lambda i: abs(x[i] - entry["scaling_coef"]))
                    axes.plot([x[at]], [y[at]], "o", color=colour, markersize=7)
        axes.set_xlabel("scaling coefficient")
        axes.set_ylabel("accuracy, %")
        axes.set_ylim(bottom=0, top=100)
        axes.grid(True)
        axes.legend(loc="lower left", fontsize=7.5)

    return _draw(f"negation-{task}", 2.9, paint)


def matrix(
    name: str,
    values: Sequence[Sequence[float]],
    labels: Sequence[str],
    *,
    low: float,
    high: float,
    colours: str = "YlGnBu",
    form: str = "{:.2f}",
    row_label: str = "",
    column_label: str = "",
) -> str:
    """Draws a square matrix over the tasks.

    Args:
        name: the figure's name, for its ids.
        values: rows.
        labels: the tasks' names, for rows and columns.
        low: the value of the lightest shade.
        high: the value of the darkest.
        colours: a matplotlib colour map.
        form: how a value is written.
        row_label: what the rows are.
        column_label: what the columns are.

    Returns:
        An SVG element.
    """

    def paint(axes: Any) -> None:
        short = [label if len(label) <= 14 else label[:13] + "…" for label in labels]
        _heat(axes, values, short, short, low=low, high=high, colours=colours, form=form)
        if len(labels) > 4 or max(map(len, short)) > 9:
            axes.tick_params(axis="x", labelrotation=25)
        axes.set_ylabel(row_label)
        axes.set_xlabel(column_label)

    return _draw(name, 1.3 + 0.42 * len(labels), paint)


def size_bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """Draws file sizes as bars.

    Args:
        rows: label, megabytes and colour of each.

    Returns:
        An SVG element.
    """

    def paint(axes: Any) -> None:
        places = range(len(rows))
        axes.barh(places, [size for _, size, _ in rows], color=[c for _, _, c in rows])
        for place, (_, size, _) in zip(places, rows, strict=True):
            axes.text(size, place, f" {size:.1f} MB", va="center", fontsize=8.5)
        axes.set_yticks(places, [label for label, _, _ in rows])
        axes.tick_params(length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.22 * max((size for _, size, _ in rows), default=1.0))
        axes.set_xlabel("megabytes")
        axes.spines["left"].set_visible(False)

    return _draw("sizes", 0.8 + 0.36 * len(rows), paint)


def phase_bars(results: Results) -> str:
    """Draws the seconds of each phase, a colour for each method.

    Args:
        results: the results.

    Returns:
        An SVG element.
    """
    titles = {method["name"]: method["title"] for method in results["methods"]}
    phases: dict[str, dict[str, float]] = {}
    for entry in results["timings"]["phases"]:
        parts = phases.setdefault(entry["phase"], {})
        method = entry["method"] or ""
        parts[method] = parts.get(method, 0.0) + entry["seconds"]

    def paint(axes: Any) -> None:
        seen: set[str] = set()
        names = list(phases)
        for place, name in enumerate(names):
            left = 0.0
            for method, seconds in phases[name].items():
                colour = method_colour(results, method) if method else _GREY
                label = titles.get(method, "both") if method not in seen else None
                seen.add(method)
                axes.barh([place], [seconds], left=left, color=colour, label=label)
                left += seconds
            axes.text(left, place, f" {left:.0f} s", va="center", fontsize=8.5)
        longest = max((sum(parts.values()) for parts in phases.values()), default=1.0)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.18 * longest)
        axes.set_xlabel("seconds")
        axes.spines["left"].set_visible(False)
        axes.legend(fontsize=8.5, loc="lower right")

    return _draw("phases", 0.9 + 0.34 * len(phases), paint)
