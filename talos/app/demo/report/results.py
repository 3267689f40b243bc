"""The results of one demo: schema, loading, saving, and a summary in a few sentences.

Version 1. An *estimate* is `{"value", "low", "high", "n"}`: an accuracy in [0, 1] (or a ratio of
two), its 95 % bootstrap interval and the number of examples. Matrices are lists of rows in the
order of `tasks`.

schema, schema_version  "talos-demo", 1
created, machine, versions, settings  when, where and how it was made
model      source, parameters and maskable (numbers of entries), dense_bytes (an fp32 checkpoint)
tasks      list of name, description, classes, examples {train, validation, test: how many used}
methods    list of name, title, trainable (mean number of entries trained), settings
zero_shot  task -> estimate of the pretrained model
single     method -> task -> estimate of the model tuned on that task
training   method -> task -> steps, first_loss, last_loss
addition   method -> grid (list of scaling_coef, absolute, normalised; validation data),
           scaling_coef, why_zero (a sentence, or null), absolute and normalised (estimates on test
           data), tasks (task -> estimate)
addition_difference  estimate of normalised(first method) - normalised(second), paired, or null
negation   method -> task -> grid (list of scaling_coef, target, control; validation data),
           scaling_coef, why_zero, target, control, target_zero_shot, control_zero_shot (on test
           data)
interference  method -> matrix of acc_j(base + vector_i) / acc_j(base), row i, column j
masks      task -> nnz, numel, tensors, tensors_touched, structure (list of layer, kind, nnz, numel)
mask_iou   matrix
files      list of path, kind (mask, vector), method, task, bytes, entries
timings    total (seconds), phases: list of phase, method, task, seconds

A sweep, schema "talos-demo-sweep", version 1, is a run of the demo for each density and seed; each
is whole in a folder of its own. It has created, machine, versions, settings, tasks, methods (name,
title) as above, and

zero_shot  mean accuracy of the pretrained model over the tasks, on test data
cells      list of density, seed, folder, figures: method -> `FIGURES`, means over the tasks;
           unedited: the methods whose merged model is the pretrained one
summary    list of density (null for a method without one), method, seeds (how many), and for each
           of `FIGURES` mean, low (the lowest seed), high
timings    total (seconds)

Everything but `created`, `machine` and `timings` repeats exactly for the same seed on the same
machine.
"""

import json
import os
from pathlib import Path
from typing import Any

from talos.errors import TalosOSError, TalosValueError
from talos.files import atomic_write
from talos.tensors import readable_size

__all__ = [
    "FIGURES",
    "SCHEMA",
    "SCHEMA_VERSION",
    "SWEEP_SCHEMA",
    "Results",
    "check_results",
    "headline",
    "json_text",
    "load_results",
    "read_json",
    "save_results",
    "write_json",
]

SCHEMA = "talos-demo"
SWEEP_SCHEMA = "talos-demo-sweep"
SCHEMA_VERSION = 1
FIGURES = ("alone", "added", "normalised", "target", "control")
"""The figures of a cell: single tasks, merged, merged over single, and two of the negations."""

Results = dict[str, Any]

_KEYS = (
    "created",
    "machine",
    "versions",
    "settings",
    "model",
    "tasks",
    "methods",
    "zero_shot",
    "single",
    "training",
    "addition",
    "addition_difference",
    "negation",
    "interference",
    "masks",
    "mask_iou",
    "files",
    "timings",
)
_SWEEP_KEYS = (
    *("created", "machine", "versions", "settings", "tasks", "methods"),
    *("zero_shot", "cells", "summary", "timings"),
)


def load_results(path: str | os.PathLike[str]) -> Results:
    """Read and check a `results.json`.

    Returns:
        The results, a plain dict; the module's docstring lists its keys.

    Raises:
        TalosOSError: the file cannot be read.
        TalosValueError: it is not JSON, of another schema or version, or lacks a key.
    """
    results = read_json(path, "a results.json of `talos demo`")
    check_results(results, str(path))
    return dict(results)


def read_json(path: str | os.PathLike[str], what: str) -> Any:
    """Read a JSON file; errors say `what` it must be.

    Raises:
        TalosOSError: the file cannot be read.
        TalosValueError: it is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise TalosOSError(f"{path} must be readable, got {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TalosValueError(f"{path} must be {what}, got binary data") from error
    except (ValueError, RecursionError) as error:
        raise TalosValueError(f"{path} must be {what}, got no JSON ({error})") from error


def write_json(results: Results, path: str | os.PathLike[str]) -> None:
    """Write JSON in one atomic step; an existing file is replaced.

    Raises:
        TalosValueError: the results hold NaN or infinity.
        TalosOSError: the file cannot be written.
    """
    text = json_text(results)
    atomic_write(path, lambda new: new.write_bytes(text.encode()))


def json_text(results: Results) -> str:
    """Return results as JSON, one line a value.

    Raises:
        TalosValueError: the results hold NaN or infinity.
    """
    try:
        return json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise TalosValueError(f"results must hold finite numbers only, got {error}") from error


def check_results(results: Any, where: str = "results") -> None:
    """Check schema, version and keys; errors name the results as `where`.

    Raises:
        TalosValueError: another schema or version, or a missing key.
    """
    keys = {SCHEMA: _KEYS, SWEEP_SCHEMA: _SWEEP_KEYS}
    schema = results.get("schema") if isinstance(results, dict) else None
    if schema not in keys:
        raise TalosValueError(
            f"{where} must be a results.json of `talos demo` (schema {SCHEMA!r}), got another file"
        )
    if results.get("schema_version") != SCHEMA_VERSION:
        raise TalosValueError(
            f"{where} must have schema_version {SCHEMA_VERSION}, got "
            f"{results.get('schema_version')!r}; make it again with this version's `talos demo`"
        )
    missing = [key for key in keys[schema] if key not in results]
    if missing:
        raise TalosValueError(
            f"{where} must hold {', '.join(missing)}, got a file without; run `talos demo` again"
        )


def save_results(results: Results, path: str | os.PathLike[str]) -> None:
    """Write results as JSON in one atomic step; an existing file is replaced.

    Raises:
        TalosValueError: the results lack a key, or hold NaN or infinity.
        TalosOSError: the file cannot be written.
    """
    check_results(results)
    write_json(results, path)


def percent(value: float) -> str:
    """Format a share as a percentage with one decimal, for example `93.1`."""
    return f"{100 * value:.1f}"


def files_of(results: Results, kind: str, method: str | None) -> list[dict[str, Any]]:
    """Return the files of a kind, "vector" or "mask", that a method wrote."""
    return [f for f in results["files"] if (f["kind"], f["method"]) == (kind, method)]


def vector_bytes(results: Results, method: str) -> float:
    """Return the mean size of a method's task-vector files in bytes, 0 without any."""
    sizes = [file["bytes"] for file in files_of(results, "vector", method)]
    return sum(sizes) / len(sizes) if sizes else 0.0


def seconds_by_phase(results: Results) -> dict[str, dict[str | None, float]]:
    """Return the seconds of each phase by method; None stands for all methods together."""
    phases: dict[str, dict[str | None, float]] = {}
    for entry in results["timings"]["phases"]:
        parts = phases.setdefault(entry["phase"], {})
        parts[entry["method"]] = parts.get(entry["method"], 0.0) + entry["seconds"]
    return phases


def shared_label(results: Results) -> str:
    """Return the label of the time that belongs to all methods together."""
    return "both" if len(results["methods"]) < 3 else "all"


def headline(results: Results) -> list[str]:
    """Summarise the results, whichever method is better.

    Returns:
        Two sentences or more: addition with its paired difference, what ended in no edit,
        accuracies, negation, sizes.
    """
    methods = results["methods"]
    first = methods[0]
    added = results["addition"][first["name"]]
    tasks = len(results["tasks"])
    text = (
        f"Adding the task vectors of {tasks} tasks gives one model that keeps "
        f"{percent(added['normalised']['value'])} % of the single-task accuracy with "
        f"{first['title']}"
    )
    sentences = []
    if len(methods) > 1:
        other = methods[1]
        rival = results["addition"][other["name"]]
        gap = results["addition_difference"]
        spread = f"[{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]"
        text += (
            f", {percent(rival['normalised']['value'])} % with {other['title']}: a difference of "
            f"{100 * gap['value']:+.1f} points, 95 % interval {spread}"
        )
        if gap["low"] > 0:
            text += f", in favour of {first['title']}."
        elif gap["high"] < 0:
            text += f", in favour of {other['title']}."
        else:
            text += ", not distinguishable from zero on these test sets."
        sentences += [text, *_no_edits(results)]
        alone = [_mean(results["single"][method["name"]]) for method in (first, other)]
        sentences.append(
            f"The single-task models reach {percent(alone[0])} % and {percent(alone[1])} % on "
            f"average, the merged ones {percent(added['absolute']['value'])} % and "
            f"{percent(rival['absolute']['value'])} %, the pretrained one "
            f"{percent(_mean(results['zero_shot']))} %."
        )
        names = [method["name"] for method in (first, other)]
        target, control = (
            [_mean_change(results, name, which) for name in names]
            for which in ("target", "control")
        )
        sentences.append(
            f"Negation changes the accuracy on the task to forget by {target[0]:+.1f} points "
            f"on average with {first['title']}, by {target[1]:+.1f} with {other['title']}, "
            f"that on the other tasks by {control[0]:+.1f} and {control[1]:+.1f}."
        )
    else:
        sentences += [text + ".", *_no_edits(results)]
    size = vector_bytes(results, first["name"])
    if size:
        dense = results["model"]["dense_bytes"]
        sentences.append(
            f"A task vector of {first['title']} takes {readable_size(size)}, a dense checkpoint "
            f"{readable_size(dense)}: {dense / size:.0f} times as much."
        )
    return sentences


def _no_edits(results: Results) -> list[str]:
    """Say which searches chose the coefficient 0."""
    found = []
    for method in results["methods"]:
        name, title = method["name"], method["title"]
        left = [task for task, e in results["negation"][name].items() if e["scaling_coef"] == 0]
        if results["addition"][name]["scaling_coef"] == 0:
            found.append(
                f"With {title} no sum of the vectors was better on validation data: its merged "
                "model is the pretrained one."
            )
        if left:
            found.append(f"With {title} nothing was subtracted to forget {', '.join(left)}.")
    return found


def _mean_change(results: Results, method: str, which: str) -> float:
    entries = results["negation"][method].values()
    found = [entry[which]["value"] - entry[f"{which}_zero_shot"]["value"] for entry in entries]
    return 100 * float(sum(found) / len(found))


def _mean(estimates: dict[str, dict[str, float]]) -> float:
    return sum(estimate["value"] for estimate in estimates.values()) / len(estimates)
