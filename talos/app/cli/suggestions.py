"""What to run next with a file, and which model it belongs to: from its metadata."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from talos.app.cli.console import command
from talos.app.tasks.files import SUFFIXES
from talos.app.tasks.load import built_in
from talos.errors import TalosError

__all__ = [
    "after_vector",
    "data_options",
    "expansion",
    "merge_command",
    "methods_of",
    "model_option",
    "of_model",
    "subtracts",
    "train_longer",
]


def merge_command(
    vector: Path, coefficient: float, others: Sequence[str] = ("SECOND.safetensors:0.5",)
) -> str:
    """Return a command that merges a vector with other terms, into a new file."""
    return command("merge", f"{vector}:{coefficient:g}", *others, "--out", "edit.safetensors")


def after_vector(file: Path, metadata: Mapping[str, Any], model: tuple[str, ...]) -> str:
    """Return the command that a user would run next with a task vector.

    Args:
        file: the vector.
        metadata: of the vector.
        model: --model with its value, or nothing.
    """
    from talos.task_vectors.sums import origins

    made = origins(metadata)
    if made and all("extracted" in of for of in made):
        bases = {str(of["extracted"].get("base", "BASE")) for of in made}
        base = bases.pop() if len(bases) == 1 else "BASE"
        return command("export", file, "--base", base, "--out", "edited")
    scale = "1" if subtracts(metadata) else "grid"
    return command(
        *("eval", *model, *data_options(of.get("task") for of in made)),
        *("--vector", file, "--scale", scale),
        *expansion(metadata),
    )


def data_options(tasks: Iterable[object]) -> list[str]:
    """Return --data of each task: built in, or a file of its name here; others only have names."""
    known = built_in()
    found = []
    for task in filter(None, tasks):
        files = [f"{task}{end}" for end in SUFFIXES]
        found.append(str(task) if task in known else next(filter(os.path.isfile, files), "TASK"))
    return [word for each in dict.fromkeys(found) or ["TASK"] for word in ("--data", each)]


def train_longer(model: str, data: str, metadata: Mapping[str, Any]) -> str | None:
    """Return the command that trains a vector with twice the steps; None: it was not trained."""
    from talos.task_vectors.sums import origins

    if origins(metadata) != [metadata] or "extracted" in metadata:
        return None
    mask = ("--mask", "MASK.safetensors") if metadata.get("method", "talos") == "talos" else ()
    method = () if mask else ("--method", metadata["method"])
    steps = metadata.get("steps")
    steps = 2 * steps if isinstance(steps, int) else 200
    words = ("--model", model, "--data", data, *mask, *method, "--steps", steps)
    return command("train", *words, "--out", "longer.safetensors")


def expansion(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Return --linearized for a vector of this metadata if all behind it were trained so."""
    return ("--linearized",) if methods_of(metadata) == {"linearized"} else ()


def methods_of(metadata: Mapping[str, Any]) -> set[str]:
    """Return the methods by which the vectors behind a vector were trained, where it tells."""
    from talos.task_vectors.sums import origins

    return {str(of["method"]) for of in origins(metadata) if "method" in of}


def model_option(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Return --model of the one model behind a file, if it is known and not the default."""
    model = _model(metadata)
    return () if model in (None, "minilm") else ("--model", str(model))


@contextmanager
def of_model(file: Path, metadata: Mapping[str, Any], model: str) -> Iterator[None]:
    """Let an error of a file that does not fit lead with the file, and with its model if known.

    Args:
        file: the file.
        metadata: of the file.
        model: the name of the model that was loaded.
    """
    try:
        yield
    except TalosError as error:
        made = _model(metadata)
        lead = f"{file} was made with --model {made}, got --model {model}"
        raise type(error)(f"{file if made in (None, model) else lead}: {error}") from error


def _model(metadata: Mapping[str, Any]) -> str | None:
    from talos.task_vectors.sums import origins

    names = {of.get("model") for of in origins(metadata)}
    name = names.pop() if len(names) == 1 else None
    return name if isinstance(name, str) else None


def subtracts(metadata: Mapping[str, Any]) -> bool:
    """Return whether a vector in a sum, merge or trim has a negative coefficient."""
    from talos.task_vectors.sums import is_merge, is_sum

    merged = is_sum(metadata) or is_merge(metadata)
    if is_merge(metadata) and metadata.get("merge", {}).get("scaling_coef", 1.0) < 0:
        return True
    parts = metadata["sum" if is_sum(metadata) else "sources"] if merged else [metadata]
    for part in parts:
        scale = part["scale"] if merged else 1.0
        if any(each < 0 for each in (scale.values() if isinstance(scale, Mapping) else [scale])):
            return True
        if isinstance(part.get("of"), Mapping) and subtracts(part["of"]):
            return True
    return False
