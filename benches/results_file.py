"""Result files: one JSON an op, rewritten whole after each measurement; a cut run keeps its own."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

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
