"""Imports go downward only: talos_kernels knows tensors, talos models, neither the benches."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A part of talos imports only parts of the rows above its own, and itself where it is a package.
# `__init__` stands for `import talos`, which does not load what is below it.
ORDER = (
    {"errors"},
    {"tensors", "options", "files", "architecture", "distributed"},
    {"names"},
    {"params", "masks"},
    {"batches"},
    {"calibration", "task_vectors"},
    {"optim", "merging"},
    {"methods"},
    {"training", "evaluation"},
    {"__init__"},
    {"app"},
)
MOST_ROOMS = 18
FEWEST_LINES = 30
# Rooms that hold one file a method, however short; `METHODS` of their `__init__` imports each.
ROOMS_OF_METHODS = ("talos/merging", "talos/methods")
NOT_LOADED_BY_IMPORT_TALOS = ("open_clip", "transformers", "matplotlib", "typer", "rich")


@dataclass(frozen=True)
class Import:
    """One imported module: where it is written and its absolute dotted name."""

    path: Path
    line: int
    module: str
    relative: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.module}"

    @property
    def top(self) -> str:
        return self.module.split(".")[0]


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(dotted: str) -> bool:
    path = ROOT.joinpath(*dotted.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports_of(path: Path) -> Iterator[Import]:
    """Every import of a file, in functions too; `from a import b` is a.b where that is a module."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name, relative=False)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                dotted = f"{origin}.{alias.name}"
                target = dotted if is_module(dotted) else origin
                yield Import(path, node.lineno, target, relative=node.level > 0)


def part_of(module: str) -> str:
    """The part of talos a module belongs to: talos.app.models.text -> models, talos -> __init__."""
    return module.split(".")[1] if "." in module else "__init__"


def rank_of(part: str) -> int:
    rows = [rank for rank, row in enumerate(ORDER) if part in row]
    assert rows, f"talos.{part} has no place in ORDER of {Path(__file__).name}; give it one"
    return rows[0]


def listed(imports: list[Import]) -> str:
    return "\n".join(map(str, imports))


def test_kernels_import_only_the_standard_library_torch_triton_and_themselves() -> None:
    wrong = [
        found
        for path in sources("talos_kernels")
        for found in imports_of(path)
        if not found.relative and found.top not in {*sys.stdlib_module_names, "torch", "triton"}
    ]
    assert not wrong, listed(wrong)


def test_relative_imports_of_the_kernels_stay_inside() -> None:
    wrong = [
        found
        for path in sources("talos_kernels")
        for found in imports_of(path)
        if found.relative and found.top != "talos_kernels"
    ]
    assert not wrong, listed(wrong)


def test_triton_is_imported_only_by_the_triton_kernels() -> None:
    kernels = ROOT / "talos_kernels" / "triton"
    wrong = [
        found
        for package in ("talos", "talos_kernels")
        for path in sources(package)
        for found in imports_of(path)
        if found.top == "triton" and not path.is_relative_to(kernels)
    ]
    assert not wrong, listed(wrong)


@pytest.mark.parametrize("package", ["talos", "talos_kernels"])
def test_the_library_never_imports_its_benches_or_tests(package: str) -> None:
    wrong = [
        found
        for path in sources(package)
        for found in imports_of(path)
        if found.top in {"benches", "tests", "pytest", "hypothesis"}
    ]
    assert not wrong, listed(wrong)


def test_talos_imports_its_own_parts_one_way() -> None:
    wrong = []
    for path in sources("talos"):
        part = part_of(module_name(path))
        rank = rank_of(part)
        for found in imports_of(path):
            if found.top != "talos":
                continue
            target = part_of(found.module)
            if target != part and rank_of(target) >= rank:
                wrong.append(found)
    assert not wrong, listed(wrong)


@pytest.mark.parametrize("package", ["talos", "talos_kernels", "benches"])
def test_no_import_cycle(package: str) -> None:
    edges: dict[str, set[str]] = {}
    for path in sources(package):
        name = module_name(path)
        found = {each.module for each in imports_of(path) if each.top == package}
        edges[name] = found - {name}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for target in sorted(edges.get(name, set())):
                visit(target, (*above, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())


def test_a_newcomer_sees_few_rooms() -> None:
    rooms = {part_of(module_name(path)) for path in sources("talos")} - {"__init__"}
    assert len(rooms) <= MOST_ROOMS, f"find a place in a room that is there: {sorted(rooms)}"
    assert rooms <= set().union(*ORDER), "give the new room its place in ORDER"


def test_no_small_file_has_one_importer() -> None:
    packages = ("talos", "talos_kernels", "benches")
    importers: dict[str, set[Path]] = {}
    for path in (path for package in packages for path in sources(package)):
        for found in imports_of(path):
            importers.setdefault(found.module, set()).add(path)
    small = [
        str(path.relative_to(ROOT))
        for package in packages
        for path in sources(package)
        if path.name != "__init__.py"
        and str(path.parent.relative_to(ROOT)) not in ROOMS_OF_METHODS
        and len(path.read_text().splitlines()) < FEWEST_LINES
        and len(importers.get(module_name(path), ())) == 1
    ]
    assert not small, f"each belongs into the file that imports it: {small}"


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.slow
def test_import_talos_loads_no_heavy_package() -> None:
    code = f"""
import sys, torch
before = set(sys.modules)
import talos
talos.evaluation.addition, talos.merging.METHODS, talos.methods.METHODS
print([name for name in {NOT_LOADED_BY_IMPORT_TALOS!r} if name in set(sys.modules) - before])
"""
    assert run_python(code).strip() == "[]"


@pytest.mark.slow
def test_everything_imports_where_triton_is_not() -> None:
    code = "import sys; sys.modules['triton'] = None; import talos_kernels, talos; print('ok')"
    assert run_python(code).strip() == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "reference"])
def test_an_op_does_not_load_torchs_compiler(compiled: bool) -> None:
    """It takes seconds to import, at the first call of a process."""
    code = f"""
import importlib.util, pathlib, sys, torch
if not {compiled}:
    pathlib.Path.exists = lambda *_, **__: False  # finds no compiled library
import talos_kernels
assert {compiled} or talos_kernels.compiled_library is None
if importlib.util.find_spec("triton"):
    import talos_kernels.triton
w = torch.zeros(3)
index = talos_kernels.Index.pack([talos_kernels.TensorIndex.encode(torch.ones(3) > 0)])
talos_kernels.scatter_([w], index, torch.arange(3.0))
talos_kernels.select_threshold([w], 2)
print(w.tolist(), "torch._dynamo" in sys.modules)
"""
    assert run_python(code).strip() == "[0.0, 1.0, 2.0] False"
