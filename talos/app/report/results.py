"""The results of an experiment: schema, loading and saving.

Version 1. An *estimate* is `{"value", "low", "high", "n"}`: an accuracy in [0, 1] (or a ratio of
two), its 95 % bootstrap interval and the number of examples. Matrices are lists of rows in the
order of `tasks`. `model`, `row` and `task` stand for names; a *row* is a method with its settings,
and the first one is what the others are compared with.

schema, schema_version  "talos-experiment", 1
created, title, machine, versions  when, where and how it was made; the machine's `device` and the
           versions are those of all cells, separated by commas
recipe     the recipe in plain values
models     list of name, source, parameters and maskable (numbers of entries), dense_bytes (an fp32
           checkpoint)
tasks      list of name, description, reads ("texts" or "images"), classes, chance, examples
           {train, validation, test: how many used}
rows       list of row, title, method, settings, lr (the rates that were tried)
zero_shot  model -> task -> estimate of the pretrained model
rates      model -> row -> list of lr, alone, added, normalised (on validation data, means over the
           tasks, first seed), scaling_coef, chosen
runs       list of model, row, seed, lr, trainable, bytes (of one vector's file), and
           single      task -> estimate of the model tuned on that task
           training    task -> steps, first_loss, last_loss
           addition    grid (list of scaling_coef, absolute, normalised; validation data),
                       scaling_coef, why_zero (a sentence, or null), absolute and normalised
                       (estimates on test data), tasks (task -> estimate)
           negation    task -> null (only the first seed is negated), or grid (list of
                       scaling_coef, target, control; validation data), scaling_coef, why_zero,
                       target, control, target_zero_shot, control_zero_shot (on test data)
summary    list of model, row, lr, seeds (how many), figures: alone, added, normalised, target and
           control, each null or an estimate (over test examples and seeds; target and control:
           the first seed's, over test examples) with by_seed;
           against_first: added and normalised, estimates of the paired difference from the first
           row; against_best: added, the paired difference of the model's best row (by added) from
           this one; null for the first or best row itself
masks      model -> row -> task -> nnz, numel, tensors, tensors_touched, stability, structure (list
           of layer, kind, nnz, numel); first seed
mask_iou   model -> row -> matrix
interference     model -> row -> matrix of acc_j(base + vector_i) / acc_j(base), row i, column j
disentanglement  model -> row -> tasks (two), coefs, error (matrix)
linearity        model -> row -> task -> tuned and expansion (estimates), equal (share of examples)
sensitivity      model -> row -> matrix: accuracy on task j without the entries that the mask of
                 task i selects, divided by that of the pretrained model
drift            model -> row -> task -> list of step, squared, ratio
files      list of path, kind (mask, vector), model, row, task, seed, lr (null of a mask), bytes,
           entries; a vector for each rate that was tried, a shared one with its first row alone
timings    total (seconds), by_kind (kind of cell -> seconds), by_row: model -> row -> calibrate,
           train, step (seconds, the median), peak_bytes

A measure that the recipe does not ask for is {}. Everything but `created`, `machine` and `timings`
repeats exactly for the same recipe on the same machine.
"""

import json
import os
from pathlib import Path
from typing import Any

from talos.errors import TalosOSError, TalosValueError
from talos.files import atomic_write

__all__ = [
    "SCHEMA",
    "SCHEMA_VERSION",
    "Results",
    "check_results",
    "json_text",
    "load_results",
    "read_json",
    "save_results",
    "write_json",
]

SCHEMA = "talos-experiment"
SCHEMA_VERSION = 1

Results = dict[str, Any]

_KEYS = (
    *("created", "title", "machine", "versions", "recipe", "models", "tasks", "rows", "zero_shot"),
    *("rates", "runs", "summary", "masks", "mask_iou", "interference", "disentanglement"),
    *("linearity", "sensitivity", "drift", "files", "timings"),
)


def load_results(path: str | os.PathLike[str]) -> Results:
    """Read and check a `results.json`.

    Returns:
        The results, a plain dict; the module's docstring lists its keys.

    Raises:
        TalosOSError: the file cannot be read.
        TalosValueError: it is not JSON, of another schema or version, or lacks a key.
    """
    results = read_json(path, "a results.json of `talos experiment`")
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
    schema = results.get("schema") if isinstance(results, dict) else None
    if schema != SCHEMA:
        raise TalosValueError(
            f"{where} must be a results.json of `talos experiment` (schema {SCHEMA!r}), got "
            "another file"
        )
    if results.get("schema_version") != SCHEMA_VERSION:
        raise TalosValueError(
            f"{where} must have schema_version {SCHEMA_VERSION}, got "
            f"{results.get('schema_version')!r}; run this version's `talos experiment`"
        )
    missing = [key for key in _KEYS if key not in results]
    if missing:
        raise TalosValueError(
            f"{where} must hold {', '.join(missing)}, got a file without; run `talos experiment` "
            "again"
        )


def save_results(results: Results, path: str | os.PathLike[str]) -> None:
    """Write results as JSON in one atomic step; an existing file is replaced.

    Raises:
        TalosValueError: the results lack a key, or hold NaN or infinity.
        TalosOSError: the file cannot be written.
    """
    check_results(results)
    write_json(results, path)
