"""docs/architecture.md names what exists, and its picture shows the imports."""

import ast
import re
from pathlib import Path

import pytest

from tests.house.test_layering import imports_of, module_name, part_of, sources

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
# `folder/`, `path/file.py`, or `path/file.py::Class.method`.
NAMED = re.findall(r"`([\w./]+(?:\.py|\.h|\.cpp|/))(?:::([\w.]+))?`", PAGE)
SERVE_ALL = {"names", "tensors", "options", "batches", "distributed", "errors"}


def defined(path: Path) -> set[str]:
    """Return the functions and classes of a file, methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
            found |= {f"{node.name}.{each.name}" for each in methods}
    return found


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_what_the_map_names_exists(path: str, name: str) -> None:
    folders = (ROOT, ROOT / "talos", ROOT / "talos_kernels" / "triton", ROOT / "csrc")
    places = [folder / path for folder in folders if (folder / path).exists()]
    assert places, path
    assert not name or name in defined(places[0]), f"{path} defines no {name}"


def test_every_room_is_on_the_map() -> None:
    rooms = {part_of(module_name(path)) for path in sources("talos")} - {"__init__"}
    named = {path for path, _ in NAMED}
    assert not {room for room in rooms if not {f"talos/{room}/", f"talos/{room}.py"} & named}


def imported() -> set[tuple[str, str]]:
    """Return which room imports which, but for those that serve all."""
    found = set()
    for path in sources("talos"):
        room = part_of(module_name(path))
        for each in imports_of(path):
            if each.top in {"talos", "talos_kernels"}:
                found.add((room, part_of(each.module) if each.top == "talos" else each.top))
    hidden = SERVE_ALL | {"__init__"}
    return {(one, other) for one, other in found if one != other and not {one, other} & hidden}


def test_the_picture_shows_the_imports() -> None:
    drawn = set(re.findall(r"^ +(\w+)(?:\[.*?\])? --> (\w+)", PAGE, re.MULTILINE))
    drawn.discard(("talos_kernels", "csrc"))
    assert not drawn - imported(), "drawn, but not imported"
    follows = set(drawn)
    while more := {(a, d) for a, b in follows for c, d in drawn if b == c} - follows:
        follows |= more
    assert not imported() - follows, "imported, but not drawn"
