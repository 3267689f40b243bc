"""The page's tables of how it was made: training, files, settings, the next steps."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from talos.app.report.headline import summaries
from talos.app.report.html import details, escape, row_label, table
from talos.app.report.results import Results
from talos.app.report.rows import runs_of
from talos.tensors import readable_size

__all__ = ["commands", "made", "next_steps", "trained"]


def trained(results: Results, model: str) -> str:
    """Return the table of what was trained: entries, losses, files; means over tasks and seeds."""
    [dense] = [each["dense_bytes"] for each in results["models"] if each["name"] == model]
    lines = []
    for row, runs in runs_of(results, model).items():
        training = [each for run in runs for each in run["training"].values()]
        size = fmean(run["bytes"] for run in runs)
        masks = [f["bytes"] for f in _files(results, "mask", model, row)]
        lines.append(
            (
                row_label(results, row),
                f"{fmean(run['trainable'] for run in runs):,.0f}",
                f"{fmean(each['steps'] for each in training):g}",
                *(f"{fmean(t[key] for t in training):.3f}" for key in ("first_loss", "last_loss")),
                readable_size(size),
                f"{dense / size:.1f}×",
                readable_size(fmean(masks)) if masks else "",
            )
        )
    head = ("", "trained entries", "steps", "first loss", "last loss", "task vector")
    return table((*head, f"smaller than {readable_size(dense)}", "mask"), lines)


def commands(results: Results, folder: Path) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Return what to do with the files of the first model's first row: labels and command lines.

    Args:
        results: of an experiment.
        folder: where its files are.
    """
    found: list[tuple[str, list[tuple[str, ...]]]] = []
    for first in results["summary"][:1]:
        model, row = first["model"], first["row"]
        paths = {
            kind: {f["task"]: str(folder / f["path"]) for f in _files(results, kind, model, row)}
            for kind in ("vector", "mask")
        }
        for kind, name in (("vector", "a task vector"), ("mask", "a mask")):
            for path in list(paths[kind].values())[:1]:
                found.append((f"inspect {name}", [("inspect", path)]))
        pairs = zip(results["tasks"], results["recipe"]["tasks"], strict=False)
        data = {task["name"]: entry for task, entry in pairs}
        # A command line takes no further keys of a recipe: no name, no columns.
        named = {t for t, entry in data.items() if entry["name"] or entry["settings"]}
        vectors = [(t, path) for t, path in paths["vector"].items() if t not in named]
        edited = any(
            run["addition"]["scaling_coef"]
            for run in results["runs"]
            if (run["model"], run["row"]) == (model, row)
        )
        if len(vectors) > 1 and edited:
            (one, plus), *_, (two, minus) = vectors
            [source] = [each["source"] for each in results["models"] if each["name"] == model]
            asked = [word for task in (one, two) for word in ("--data", data[task]["data"])]
            edit = ("merge", f"{plus}:0.6", f"{minus}:-0.4", "--out", "edit.safetensors")
            judge = ("eval", "--model", source, *asked, "--vector", "edit.safetensors")
            found.append((f"add {one}, forget {two}, and measure the edit", [edit, judge]))
    return found


def next_steps(results: Results) -> str:
    """Return commands that continue from here."""
    data, label = "mine.csv", "texts: a CSV or JSON Lines file with the columns text and label"
    if results["tasks"][0]["reads"] == "images":
        data, label = "mine", "images: a folder with a folder of images for each class"
    label = f"train on your own {label}"
    own = ("--model", results["models"][0]["source"], "--data", data)
    mask, vector = "mine-mask.safetensors", "mine.safetensors"
    train = [("calibrate", *own, "--out", mask), ("train", *own, "--mask", mask, "--out", vector)]
    return "".join(
        f"<p class=step>{escape(label)}</p><pre><code>"
        + escape("\n".join(shlex.join(["talos", *each]) for each in lines))
        + "</code></pre>"
        for label, lines in [*commands(results, Path()), (label, train)]
    )


def made(results: Results) -> str:
    """Return tables of the models, rows, settings, versions, machine and time."""
    recipe = results["recipe"]
    facts: list[tuple[str, object]] = [("seeds", recipe["seeds"])]
    for model in results["models"]:
        sizes = f"{model['parameters']:,} entries, {model['maskable']:,} may be selected"
        facts.append((f"model {model['name']}", f"{model['source']}, {sizes}"))
    own = {each["row"]: dict(_flat(each["settings"])) for each in results["rows"]}
    found: dict[str, list[object]] = {}
    for settings in own.values():
        for key, value in settings.items():
            found.setdefault(key, []).append(value)
    shared = {k: each[0] for k, each in found.items() if all(v == each[0] for v in each)}
    for part in ("training", "evaluation"):
        shared = dict(_flat(recipe[part])) | shared
    facts += shared.items()
    timings = results["timings"]
    facts += results["versions"].items()
    facts += _flat(results["machine"], "machine: ")
    facts += [
        (f"time of {kind}", f"{seconds / 60:.1f} min")
        for kind, seconds in timings["by_kind"].items()
    ]
    facts += [("time in all", f"{timings['total'] / 60:.1f} min"), ("made", results["created"])]
    rows = []
    for each in results["rows"]:
        name = each["row"]
        differ = (f"{key} {_plain(v)}" for key, v in own[name].items() if key not in shared)
        cells = (each["method"], ", ".join(differ), _plain(each["lr"]))
        rows.append((row_label(results, name), *map(escape, cells)))
    lines = [(escape(key), escape(_plain(value))) for key, value in facts]
    head = ("", "method", "settings that differ", "rates tried")
    every = table(("setting", "value"), lines, text_columns=2)
    return table(head, rows, text_columns=4) + details("All settings, versions and times", every)


def _files(results: Results, kind: str, model: str, row: str) -> list[dict[str, Any]]:
    """Return a row's files of a kind, "vector" or "mask": the first seed's, at the chosen rate."""
    seed, lr = results["recipe"]["seeds"][0], summaries(results, model)[row]["lr"]
    about = {"kind": kind, "model": model, "row": row, "seed": seed}
    files = [file for file in results["files"] if about.items() <= file.items()]
    return [file for file in files if kind == "mask" or file["lr"] == lr]


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, object]]:
    """Yield settings, those within settings too, with names in plain words."""
    for key, value in settings.items():
        name = before + key.replace("_", " ")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name} ")
        else:
            yield name, value


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)
