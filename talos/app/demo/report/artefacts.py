"""The sections on masks, files, time, the next steps and the settings."""

from statistics import fmean

from talos.app.demo.report import charts, heatmaps
from talos.app.demo.report.html import escape, figure, method_label, section, table
from talos.app.demo.report.results import (
    Results,
    files_of,
    percent,
    seconds_by_phase,
    shared_label,
)
from talos.app.demo.report.style import GREY, INK
from talos.app.demo.report.svg import method_colour
from talos.tensors import readable_size

__all__ = ["files", "made", "masks", "next_steps", "setting_rows", "timings"]


def masks(results: Results) -> str:
    """Return the section on the masks: what they select, and how far they overlap."""
    rows = []
    for task in results["tasks"]:
        mask = results["masks"][task["name"]]
        share = {"query, key": 0, "mlp": 0}
        for entry in mask["structure"]:
            if entry["kind"] in ("query", "key"):
                share["query, key"] += entry["nnz"]
            elif entry["kind"].startswith("mlp"):
                share["mlp"] += entry["nnz"]
        rows.append(
            (
                escape(task["name"]),
                f"{mask['nnz']:,}",
                percent(mask["nnz"] / mask["numel"]),
                f"{mask['tensors_touched']} of {mask['tensors']}",
                percent(share["query, key"] / mask["nnz"]),
                percent(share["mlp"] / mask["nnz"]),
            )
        )
    names = [task["name"] for task in results["tasks"]]
    return section(
        "The masks",
        "Each task's mask selects the entries with the lowest diagonal Fisher information: the "
        "pretrained model's output depends on them least. Only these are trained. A tensor without "
        "a selected entry is frozen.",
        table(
            (
                "task",
                "entries",
                "density, %",
                "tensors touched",
                "% in queries and keys",
                "% in MLPs",
            ),
            rows,
        ),
        "<div class=pair>",
        figure(
            heatmaps.mask_structure(results),
            "Density in per cent of each layer and type, mean over the tasks.",
            "mask density per layer and type",
        ),
        figure(
            heatmaps.matrix("iou", results["mask_iou"], names, low=0.0, high=1.0),
            "Overlap of the tasks' masks, intersection over union; random masks have about .05.",
            "mask overlap between tasks",
        ),
        "</div>",
    )


def files(results: Results) -> str:
    """Return the section that compares the files with a dense checkpoint."""
    dense = results["model"]["dense_bytes"]
    kinds = [
        (
            f"{method_label(results, method)}: vector",
            f"vector, {method['title']}",
            method_colour(results, method["name"]),
            files_of(results, "vector", method["name"]),
        )
        for method in results["methods"]
    ]
    kinds.append(("mask", "mask", INK, files_of(results, "mask", None)))
    rows = []
    bars = [("dense checkpoint", dense / 1e6, GREY)]
    for label, name, colour, found in kinds:
        if found:
            size = fmean(file["bytes"] for file in found)
            entries = fmean(file["entries"] for file in found)
            bytes_per_entry, smaller = f"{size / entries:.2f}", f"{dense / size:.1f}×"
            rows.append((label, f"{entries:,.0f}", readable_size(size), bytes_per_entry, smaller))
            bars.append((name, size / 1e6, colour))
    parameters = f"{results['model']['parameters']:,}"
    rows.append(("dense checkpoint", parameters, readable_size(dense), "4.00", "1.0×"))
    return section(
        "File sizes",
        "Mean size of a file. Bytes per entry count the whole file: values, index and names.",
        "<div class=pair>",
        table(("", "entries", "size", "bytes per entry", "smaller by"), rows),
        figure(charts.size_bars(bars), "Size of one file of each kind.", "file sizes"),
        "</div>",
    )


def timings(results: Results) -> str:
    """Return the section on the seconds of each phase."""
    machine = results["machine"]
    total = results["timings"]["total"]
    return section(
        "Where the time went",
        f"{total / 60:.1f} minutes in all on {machine['cpu']}, {machine['cores']} cores.",
        "<div class=pair>",
        figure(
            charts.phase_bars(results),
            "Seconds of each phase, summed over the tasks.",
            "seconds of each phase",
        ),
        _seconds(results),
        "</div>",
    )


def next_steps(results: Results) -> str:
    """Return the section with commands that continue from here."""
    names = [task["name"] for task in results["tasks"]]
    first = results["methods"][0]["name"]
    edited = results["addition"][first]["scaling_coef"] != 0
    files = {f["task"]: f["path"] for f in results["files"] if f["method"] == first}
    masks = {f["task"]: f["path"] for f in results["files"] if f["kind"] == "mask"}
    one, two = names[0], names[-1]
    source = results["model"]["source"]
    edit = [
        (
            "combine: add one task, forget another",
            f"talos merge {files.get(one, 'a.safetensors')}:0.6 "
            f"{files.get(two, 'b.safetensors')}:-0.4 --out edit.safetensors",
        ),
        (
            "measure the edit",
            f"talos eval --model {source} --data {one} --data {two} --vector edit.safetensors",
        ),
    ]
    lines = [
        ("inspect a vector", f"talos inspect {files.get(one, 'vector.safetensors')}"),
        ("inspect a mask", f"talos inspect {masks.get(one, 'mask.safetensors')}"),
        *(edit if edited else []),
        (
            "your own texts (a CSV or JSON Lines file with the columns text and label)",
            f"talos calibrate --model {source} --data mine.csv --out mask.safetensors\n"
            f"talos train --model {source} --data mine.csv --mask mask.safetensors "
            "--out mine.safetensors",
        ),
    ]
    parts = [
        f"<p class=step>{escape(label)}</p><pre><code>{escape(command)}</code></pre>"
        for label, command in lines
    ]
    return section("What to do next", "Run these in the folder of this page.", *parts)


def made(results: Results) -> str:
    """Return the section with settings, versions and losses."""
    facts = [
        ("model", f"{results['model']['source']}, {results['model']['parameters']:,} entries"),
        ("maskable", f"{results['model']['maskable']:,} entries may be selected"),
        *(
            (f"{m['title']}", ", ".join(f"{k} {v}" for k, v in m["settings"].items()))
            for m in results["methods"]
        ),
    ]
    rows = [*((escape(key), escape(value)) for key, value in facts), *setting_rows(results)]
    losses = []
    for method in results["methods"]:
        for task in results["tasks"]:
            entry = results["training"][method["name"]][task["name"]]
            losses.append(
                (
                    f"{escape(task['name'])}<br>{method_label(results, method)}",
                    str(entry["steps"]),
                    f"{entry['first_loss']:.3f}",
                    f"{entry['last_loss']:.3f}",
                )
            )
    return section(
        "Settings and losses",
        "The same seed on the same machine gives the same numbers.",
        "<div class=pair>",
        table(("setting", "value"), rows, text_columns=2),
        table(("task and method", "steps", "first loss", "last loss"), losses),
        "</div>",
    )


def setting_rows(results: Results) -> list[tuple[str, str]]:
    """Return rows of a table: settings, versions, machine and time, as HTML.

    The sizes are those asked for of built-in tasks; the table of tasks has what was used.
    """
    shown = {k: each for k, each in results["settings"].items() if k not in ("model", "sizes")}
    facts = [
        *((k.replace("_", " "), each) for k, each in shown.items()),
        *results["versions"].items(),
        *((f"machine: {key}", value) for key, value in results["machine"].items()),
        ("made", results["created"]),
    ]
    return [(escape(key), escape(_plain(value))) for key, value in facts]


def _seconds(results: Results) -> str:
    """Return a table of the phases' seconds: a column for all methods together and for each."""
    columns = [None, *(method["name"] for method in results["methods"])]
    rows = [
        (escape(phase), *(f"{row[c]:.1f}" if row.get(c) else "" for c in columns))
        for phase, row in seconds_by_phase(results).items()
    ]
    labels = (method_label(results, method) for method in results["methods"])
    return table(("seconds", shared_label(results), *labels), rows)


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)
