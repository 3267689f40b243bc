"""The page itself: sections of tables and figures around the same results."""

import html
import os
from collections.abc import Iterable, Sequence

from talos.report import figures
from talos.report.atomic import write_text
from talos.report.results import (
    Results,
    check_results,
    headline,
    megabytes,
    percent,
    vector_bytes,
)
from talos.report.style import CSS

__all__ = ["render", "write_report"]


def write_report(results: Results, path: str | os.PathLike[str]) -> None:
    """Renders the results and writes the page in one atomic step.

    Args:
        results: the results, see `talos.report.results`.
        path: where to; replaced when it exists.

    Raises:
        TalosValueError: the results are of another schema or lack a key.
        TalosRuntimeError: matplotlib is missing.
        TalosOSError: the file cannot be written.
    """
    write_text(path, render(results))


def render(results: Results) -> str:
    """Turns results into one HTML document.

    Args:
        results: the results, see `talos.report.results`.

    Returns:
        The document: styles and figures inline, no script, nothing loaded from elsewhere.

    Raises:
        TalosValueError: the results are of another schema or lack a key.
        TalosRuntimeError: matplotlib is missing.
    """
    check_results(results)
    count = len(results["tasks"])
    body = [
        "<header>",
        "<p class=eyebrow>talos · sparse fine-tuning and task arithmetic</p>",
        f"<h1>{count} tasks, one encoder: edit it with sparse task vectors</h1>",
        f"<p class=lead>{_escape(' '.join(headline(results)))}</p>",
        _tiles(results),
        "</header>",
        _tasks(results),
        _single(results),
        _addition(results),
        _negation(results),
        _masks(results),
        _interference(results),
        _files(results),
        _timings(results),
        _next(results),
        _made(results),
    ]
    return (
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f"<title>talos demo: {count} tasks</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _escape(text: object) -> str:
    return html.escape(str(text), quote=True)


def _estimate(estimate: dict[str, float]) -> str:
    return (
        f"<b>{percent(estimate['value'])}</b> "
        f"<small>{percent(estimate['low'])}–{percent(estimate['high'])}</small>"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> str:
    """Builds a table of ready HTML cells; all columns but the first ones are numbers."""

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


def _figure(svg: str, caption: str, label: str) -> str:
    return (
        f'<figure role=img aria-label="{_escape(label)}">{svg}'
        f"<figcaption>{_escape(caption)}</figcaption></figure>"
    )


def _section(title: str, text: str, *parts: str) -> str:
    lead = f"<p>{_escape(text)}</p>" if text else ""
    return f"<section><h2>{_escape(title)}</h2>{lead}{''.join(parts)}</section>"


def _method(results: Results, method: dict[str, str]) -> str:
    colour = figures.method_colour(results, method["name"])
    return f'<span class=dot style="background:{colour}"></span>{_escape(method["title"])}'


def _tiles(results: Results) -> str:
    tiles = []
    for method in results["methods"]:
        value = results["addition"][method["name"]]["normalised"]["value"]
        tiles.append((f"{percent(value)} %", f"normalised addition, {method['title']}"))
    size = vector_bytes(results, results["methods"][0]["name"])
    tiles.append((megabytes(size), f"a task vector of {results['methods'][0]['title']}"))
    tiles.append((f"{results['timings']['total'] / 60:.1f} min", "for everything on this page"))
    return (
        "<div class=tiles>"
        + "".join(
            f"<div><b>{_escape(big)}</b><span>{_escape(small)}</span></div>" for big, small in tiles
        )
        + "</div>"
    )


def _tasks(results: Results) -> str:
    rows = []
    for task in results["tasks"]:
        used = task["examples"]
        rows.append(
            (
                f"<b>{_escape(task['name'])}</b>",
                _escape(task["description"]),
                str(task["classes"]),
                f"{used['train']:,}",
                f"{used['validation']:,}",
                f"{used['test']:,}",
            )
        )
    return _section(
        "The tasks",
        "Texts are classified by comparing their embedding with the embeddings of the class texts "
        "(a frozen zero-shot head). Scaling coefficients are chosen on validation examples; every "
        "figure in a table below comes from test examples that nothing was chosen on.",
        _table(
            ("task", "what it asks", "classes", "train", "validation", "test"), rows, text_columns=2
        ),
    )


def _single(results: Results) -> str:
    methods = results["methods"]
    rows = []
    for task in results["tasks"]:
        name = task["name"]
        row = [_escape(name), _estimate(results["zero_shot"][name])]
        row += [_estimate(results["single"][m["name"]][name]) for m in methods]
        rows.append(row)
    mean = ["<i>mean</i>", _mean(results["zero_shot"])]
    mean += [_mean(results["single"][m["name"]]) for m in methods]
    rows.append(mean)
    return _section(
        "Single-task accuracy",
        "Test accuracy in per cent with its 95 % bootstrap interval: the pretrained encoder, and "
        "the encoder tuned on that task alone.",
        _table(("task", "zero-shot", *(_method(results, m) for m in methods)), rows),
    )


def _mean(estimates: dict[str, dict[str, float]]) -> str:
    values = [estimate["value"] for estimate in estimates.values()]
    return f"<b>{percent(sum(values) / len(values))}</b>"


def _addition(results: Results) -> str:
    methods = results["methods"]
    added = [results["addition"][m["name"]] for m in methods]
    rows = [
        ["scaling coefficient", *(f"<b>{a['scaling_coef']:.2f}</b>" for a in added)],
        ["absolute", *(_estimate(a["absolute"]) for a in added)],
        ["normalised", *(_estimate(a["normalised"]) for a in added)],
    ]
    for task in results["tasks"]:
        rows.append([_escape(task["name"]), *(_estimate(a["tasks"][task["name"]]) for a in added)])
    return _section(
        "Addition: one model for all tasks",
        "base + scaling coefficient × (sum of all task vectors). Absolute: mean accuracy over the "
        "tasks. Normalised: the mean of each task's accuracy divided by that of its own single-task"
        " model. Task rows: accuracy of the merged model.",
        "<div class=pair>",
        _table(("", *(_method(results, m) for m in methods)), rows),
        _figure(
            figures.accuracy_curve(results),
            "Mean validation accuracy of the merged model; the dot is the coefficient chosen.",
            "accuracy of the merged model against the scaling coefficient",
        ),
        "</div>",
    )


def _negation(results: Results) -> str:
    methods = results["methods"]
    rows = []
    for task in results["tasks"]:
        for method in methods:
            entry = results["negation"][method["name"]][task["name"]]
            rows.append(
                (
                    _escape(task["name"]) if method is methods[0] else "",
                    _method(results, method),
                    f"{entry['scaling_coef']:.2f}",
                    percent(entry["target_zero_shot"]["value"]),
                    _estimate(entry["target"]),
                    percent(entry["control_zero_shot"]["value"]),
                    _estimate(entry["control"]),
                )
            )
    share = percent(results["settings"].get("control_share", 0.95))
    pictures = "".join(
        _figure(
            figures.negation_curve(results, task["name"]),
            f"Forgetting {task['name']}: validation accuracy, target solid, control dashed.",
            f"negation of {task['name']} against the scaling coefficient",
        )
        for task in results["tasks"]
    )
    return _section(
        "Negation: forgetting one task",
        "base − scaling coefficient × task vector. The coefficient is the one with the lowest "
        f"validation accuracy on the target among those that keep {share} % of the pretrained "
        "accuracy on the control, the mean of the other tasks. Target: lower is better. Control: higher is "
        "better. Test accuracy, before and after.",
        _table(
            (
                "task forgotten",
                "method",
                "coef.",
                "target before",
                "target after",
                "control before",
                "control after",
            ),
            rows,
            text_columns=2,
        ),
        f"<div class=grid>{pictures}</div>",
    )


def _masks(results: Results) -> str:
    rows = []
    for task in results["tasks"]:
        mask = results["masks"][task["name"]]
        share = {"attention q, k": 0, "mlp": 0}
        for entry in mask["structure"]:
            if entry["kind"] in ("q", "k"):
                share["attention q, k"] += entry["nnz"]
            elif entry["kind"].startswith("mlp"):
                share["mlp"] += entry["nnz"]
        rows.append(
            (
                _escape(task["name"]),
                f"{mask['nnz']:,}",
                percent(mask["nnz"] / mask["numel"]),
                f"{mask['tensors_touched']} of {mask['tensors']}",
                percent(share["attention q, k"] / mask["nnz"]),
                percent(share["mlp"] / mask["nnz"]),
            )
        )
    names = [task["name"] for task in results["tasks"]]
    return _section(
        "Where the masks lie",
        "Each task's mask holds the entries with the lowest diagonal Fisher information: those "
        "that the pretrained model's output depends on least. Only they are trained; tensors without a "
        "selected entry are frozen whole.",
        _table(
            (
                "task",
                "entries",
                "density, %",
                "tensors touched",
                "% of them in q, k",
                "% of them in the MLP",
            ),
            rows,
        ),
        "<div class=pair>",
        _figure(
            figures.mask_structure(results),
            "Density in per cent of each layer and type, mean over the tasks.",
            "mask density per layer and type",
        ),
        _figure(
            figures.matrix("iou", results["mask_iou"], names, low=0.0, high=1.0),
            "Overlap of the tasks' masks (intersection over union); random masks of 10 % have .05.",
            "mask overlap between tasks",
        ),
        "</div>",
    )


def _interference(results: Results) -> str:
    names = [task["name"] for task in results["tasks"]]
    pictures = "".join(
        _figure(
            figures.matrix(
                f"interference-{method['name']}",
                results["interference"][method["name"]],
                names,
                low=0.7,
                high=1.3,
                colours="RdYlBu",
                row_label="vector of",
                column_label="accuracy on",
            ),
            f"{method['title']}: test accuracy with one vector added, relative to zero-shot.",
            f"interference matrix of {method['title']}",
        )
        for method in results["methods"]
    )
    return _section(
        "Interference",
        "What one task's vector does to the others: acc_j(base + vector_i) / acc_j(base). On the "
        "diagonal a task helps itself; elsewhere 1.00 is no interference, less is harm.",
        f"<div class=grid>{pictures}</div>",
    )


def _files(results: Results) -> str:
    dense = results["model"]["dense_bytes"]
    rows = []
    bars = [("dense checkpoint", dense / 1e6, "#94a3b8")]
    for method in results["methods"]:
        files = [
            f for f in results["files"] if f["kind"] == "vector" and f["method"] == method["name"]
        ]
        if not files:
            continue
        size = vector_bytes(results, method["name"])
        entries = sum(f["entries"] for f in files) / len(files)
        rows.append(
            (
                f"task vector, {_method(results, method)}",
                f"{entries:,.0f}",
                megabytes(size),
                f"{size / entries:.2f}",
                f"{dense / size:.1f}×",
            )
        )
        colour = figures.method_colour(results, method["name"])
        bars.append((f"vector, {method['title']}", size / 1e6, colour))
    masks = [f for f in results["files"] if f["kind"] == "mask"]
    if masks:
        size = sum(f["bytes"] for f in masks) / len(masks)
        entries = sum(f["entries"] for f in masks) / len(masks)
        rows.append(
            (
                "mask",
                f"{entries:,.0f}",
                megabytes(size),
                f"{size / entries:.2f}",
                f"{dense / size:.1f}×",
            )
        )
        bars.append(("mask", size / 1e6, "#334155"))
    rows.append(
        (
            "dense checkpoint",
            f"{results['model']['parameters']:,}",
            megabytes(dense),
            "4.00",
            "1.0×",
        )
    )
    return _section(
        "What lies on disk",
        "Mean size of a file. Bytes an entry counts the whole file: values, index, names, checksum.",
        "<div class=pair>",
        _table(("", "entries", "size", "bytes an entry", "smaller by"), rows),
        _figure(figures.size_bars(bars), "Size of one file of each kind.", "file sizes"),
        "</div>",
    )


def _timings(results: Results) -> str:
    machine = results["machine"]
    total = results["timings"]["total"]
    return _section(
        "Where the time went",
        f"{total / 60:.1f} minutes in all on {machine['cpu']}, {machine['cores']} cores.",
        "<div class=narrow>",
        _figure(
            figures.phase_bars(results),
            "Seconds of each phase, summed over the tasks.",
            "seconds of each phase",
        ),
        "</div>",
    )


def _next(results: Results) -> str:
    names = [task["name"] for task in results["tasks"]]
    first = results["methods"][0]["name"]
    files = {f["task"]: f["path"] for f in results["files"] if f["method"] == first}
    masks = {f["task"]: f["path"] for f in results["files"] if f["kind"] == "mask"}
    one, two = names[0], names[-1]
    source = results["model"]["source"]
    lines = [
        ("look into a vector", f"talos inspect {files.get(one, 'vector.safetensors')}"),
        ("look into a mask", f"talos inspect {masks.get(one, 'mask.safetensors')}"),
        (
            "combine: add one task, forget another",
            f"talos merge {files.get(one, 'a.safetensors')}:0.6 "
            f"{files.get(two, 'b.safetensors')}:-0.4 --out edit.safetensors",
        ),
        (
            "measure the edit",
            f"talos eval --model {source} --data {one} --data {two} --vector edit.safetensors",
        ),
        (
            "your own texts (a CSV or JSON Lines file with the columns text and label)",
            f"talos calibrate --model {source} --data mine.csv --out mask.safetensors\n"
            f"talos train --model {source} --data mine.csv --mask mask.safetensors "
            "--out mine.safetensors",
        ),
    ]
    parts = [
        f"<p class=step>{_escape(label)}</p><pre><code>{_escape(command)}</code></pre>"
        for label, command in lines
    ]
    return _section("What to do next", "Run these in the folder of this page.", *parts)


def _made(results: Results) -> str:
    settings = [(key, value) for key, value in results["settings"].items()]
    facts = [
        ("model", f"{results['model']['source']}, {results['model']['parameters']:,} entries"),
        ("scope", f"{results['model']['maskable']:,} entries may be selected"),
        *(
            (f"{m['title']}", ", ".join(f"{k} {v}" for k, v in m["settings"].items()))
            for m in results["methods"]
        ),
        *((key.replace("_", " "), value) for key, value in settings),
        *((f"{key}", value) for key, value in results["versions"].items()),
        *((f"machine: {key}", value) for key, value in results["machine"].items()),
        ("made", results["created"]),
    ]
    rows = [(_escape(key), _escape(_plain(value))) for key, value in facts]
    losses = []
    for method in results["methods"]:
        for task in results["tasks"]:
            entry = results["training"][method["name"]][task["name"]]
            losses.append(
                (
                    _escape(task["name"]),
                    _method(results, method),
                    str(entry["steps"]),
                    f"{entry['first_loss']:.3f}",
                    f"{entry['last_loss']:.3f}",
                )
            )
    return _section(
        "How it was made",
        "The same seed on the same machine gives the same numbers.",
        "<div class=pair>",
        _table(("setting", "value"), rows, text_columns=2),
        _table(("task", "method", "steps", "first loss", "last loss"), losses, text_columns=2),
        "</div>",
    )


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)
