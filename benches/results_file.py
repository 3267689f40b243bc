"""Result files: one JSON an op, rewritten whole after each measurement; a cut run keeps its own."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from talos.app.costs.figure import memory_bars, time_bars
from talos.app.costs.results import ratios

KEY = ("op", "shape", "form")


def read_results(path: Path) -> list[dict[str, object]]:
    """The records of a file; none where there is no file."""
    return json.loads(path.read_text())["records"] if path.exists() else []


def add_result(folder: Path, record: Mapping[str, object]) -> Path:
    """Puts a record in its op's file, in place of one of the same op, shape and form."""
    path = folder / f"{str(record['op']).strip('_')}.json"
    same = tuple(record[key] for key in KEY)
    kept = [old for old in read_results(path) if tuple(old[key] for key in KEY) != same]
    write_json(path, {"records": [*kept, dict(record)]})
    return path


def draw_costs(folder: Path, model: str, label: str, forms: Sequence[Mapping[str, Any]]) -> None:
    """Two pictures of one workload's forms, the time and the peak memory of an iteration.

    Where matplotlib is missing, or non-linear fine-tuning was not measured, there are none.
    """
    if find_spec("matplotlib") is None or ratios(forms, forms[0]) is None:
        return
    pictures = {"time": time_bars, "memory": memory_bars}
    for name, bars in pictures.items():
        path = folder / f"{label.replace(', ', '-').replace(' ', '-')}-{name}.svg"
        path.write_text(bars({"settings": {"model": model}, "forms": forms}), encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Writes whole or not at all: a reader, or a run killed now, finds the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    with temporary.open("w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def all_results(folder: Path) -> Iterator[dict[str, object]]:
    """The records of every op's file in a folder."""
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        yield from content.get("records", ())
