"""An op that was written is imported, public and tested on every backend it has."""

import ast
import importlib
from pathlib import Path

import pytest

import talos_kernels
from talos_kernels import _ops

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "talos_kernels"


def calls(path: Path, function: str) -> list[str]:
    """Return the first argument of each call of a function in a file."""
    return [
        ast.literal_eval(node.args[0])
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == function
        and isinstance(node.args[0], ast.Constant)
    ]


OPS = {path: calls(path, "define") for path in sorted(KERNELS.glob("*.py"))}
OPS = {path: names for path, names in OPS.items() if names}
LAUNCHERS = {path.stem: calls(path, "serve_cuda") for path in (KERNELS / "triton").glob("*.py")}


@pytest.mark.parametrize("path", OPS, ids=lambda path: path.stem)
def test_an_op_is_imported_and_public(path: Path) -> None:
    module = importlib.import_module(f"talos_kernels.{path.stem}")
    public = {name for name in module.__all__ if not name.endswith("_reference")}
    forgotten = public - set(talos_kernels.__all__)
    assert not forgotten, f"talos_kernels/__init__.py must import and list {sorted(forgotten)}"


@pytest.mark.parametrize("path", OPS, ids=lambda path: path.stem)
def test_an_op_has_a_test_and_a_bench(path: Path) -> None:
    assert (ROOT / "benches" / f"bench_{path.stem}.py").exists()
    tests = " ".join(each.read_text() for each in (ROOT / "tests" / "kernels").glob("*.py"))
    assert [name for name in OPS[path] if name not in tests] == []


def test_every_triton_kernel_serves_cuda_once_the_package_is_imported() -> None:
    importlib.import_module("talos_kernels.triton")
    wanted = {name for names in LAUNCHERS.values() for name in names}
    assert wanted
    unserved = {name for name in wanted if "triton" not in _ops.cuda_backends(name)}
    assert not unserved, f"talos_kernels/triton/__init__.py must import what serves {unserved}"
