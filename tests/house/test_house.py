"""The habits of the house that a machine can check."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from dataclasses import is_dataclass
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType

import pytest

import talos
import talos_kernels
from tests.conftest import LEFT_OUT

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = PYPROJECT["project"]["version"]
LIBRARY = ("talos", "talos_kernels")
MOST_LINES = 300
MOST_BYTES = 512 * 1024

FOLDERS = (*LIBRARY, "csrc", "benches", "examples", "tests", "docs", ".ci")
SUFFIXES = {".py", ".cpp", ".cu", ".h", ".toml", ".md", ".txt", ".json", ".yaml", ".in"}
# Written so that this file does not match itself.
MACHINE_PATHS = re.compile(r"/(?:r[o]ot|h[o]me|w[o]rk|f[a]rm|U[s]ers)/")
LEFTOVERS = re.compile(r"(?:#|//).*(?:TO[D]O|FIX[M]E|X{3}|type: [i]gnore|no[q]a)")
UNWRITTEN = re.compile(r"raise NotImplemented[E]rror")
EXCUSES = re.compile(r"(?:^|_)(?:naive|simplified|fast|v2|new|old)(?:_|$)")


def files() -> list[Path]:
    """The project's own text files, without the environment and what builds leave behind."""
    top = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
    below = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    return sorted(path for path in top + below if path.suffix in SUFFIXES or not path.suffix)


def library_files() -> list[Path]:
    return sorted(path for package in LIBRARY for path in (ROOT / package).rglob("*.py"))


def found_in(paths: list[Path], pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    parts = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(part) == 2 for part in parts), [part for part in parts if len(part) != 2]
    return {normal(name): version for name, version in parts}


def test_one_version() -> None:
    assert talos.__version__ == VERSION


def test_changelog_knows_the_version() -> None:
    assert f"## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text()


def test_setup_holds_extension_modules_only() -> None:
    lines = (ROOT / "setup.py").read_text().splitlines()
    assert len(lines) < 80
    assert not [line for line in lines if re.match(r"\s*(?:version|install_requires)\s*=", line)]


def code_lines(path: Path) -> int:
    """Lines that hold code: not blank, not a comment, not in a docstring."""
    text = path.read_text()
    lines = {number for number, line in enumerate(text.splitlines(), 1) if line.strip()}
    lines -= {n for n in lines if text.splitlines()[n - 1].lstrip().startswith("#")}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def test_files_have_one_reason_each() -> None:
    counts = {str(path.relative_to(ROOT)): code_lines(path) for path in library_files()}
    long = {name: count for name, count in counts.items() if count > MOST_LINES}
    assert not long, f"more than {MOST_LINES} lines of code; split by meaning: {long}"


def test_no_file_is_heavy() -> None:
    heavy = {
        str(p.relative_to(ROOT)): size for p in files() if (size := p.stat().st_size) > MOST_BYTES
    }
    assert not heavy


def lines_of(*command: str) -> set[Path]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {ROOT / line for line in done.stdout.splitlines() if line.endswith(".py")}


def test_ruff_checks_every_python_file() -> None:
    checked = lines_of(sys.executable, "-m", "ruff", "check", "--show-files")
    tracked = lines_of("git", "ls-files", "--cached", "--others", "--exclude-standard")
    assert checked == {path for path in tracked if path.exists()}


def test_no_path_of_a_machine() -> None:
    assert not found_in(files(), MACHINE_PATHS)


def test_no_leftovers() -> None:
    code = [path for path in files() if path.suffix in {".py", ".cpp", ".cu", ".h"}]
    assert not found_in(code, LEFTOVERS)
    assert not found_in(library_files(), UNWRITTEN)


def test_no_name_excuses_itself() -> None:
    names = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}"
        for path in library_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and EXCUSES.search(node.name.lower())
    ]
    assert not names


def undocumented(name: str, thing: object) -> list[str]:
    """What the docstring of a public function or class lacks."""
    if not callable(thing) or (inspect.isclass(thing) and issubclass(thing, BaseException)):
        return []
    text = inspect.getdoc(thing) or ""
    signature = inspect.signature(thing)
    lacks = [] if ">>> " in text else ["an example"]
    if signature.parameters and not is_dataclass(thing) and "Args:" not in text:
        lacks.append("Args")
    returns = signature.return_annotation not in {None, "None", inspect.Signature.empty}
    if returns and not inspect.isclass(thing) and not re.search(r"^(Returns|Yields):", text, re.M):
        lacks.append("Returns")
    return [f"{name} lacks {lack}" for lack in lacks]


@pytest.mark.parametrize("package", [talos, talos_kernels], ids=lambda package: package.__name__)
def test_public_names_are_documented_with_an_example(package: ModuleType) -> None:
    lacks = [
        each for name in package.__all__ for each in undocumented(name, getattr(package, name))
    ]
    assert not lacks


def test_public_names_exist_once() -> None:
    for package in (talos, talos_kernels):
        assert len(package.__all__) == len(set(package.__all__))
        assert all(hasattr(package, name) for name in package.__all__)


def test_every_requirement_is_pinned() -> None:
    project = PYPROJECT["project"]
    wanted = [*project["dependencies"], *PYPROJECT["build-system"]["requires"]]
    wanted += [name for extra in project["optional-dependencies"].values() for name in extra]
    names = {normal(re.split(r"[<>=\[ ]", each)[0]) for each in wanted}
    assert names <= set(pins()), names - set(pins())


def test_extras_list_only_what_the_code_imports() -> None:
    words = {word for path in library_files() for word in re.findall(r"\w+", path.read_text())}
    provided: dict[str, set[str]] = {}
    for module, distributions in packages_distributions().items():
        for distribution in distributions:
            provided.setdefault(normal(distribution), set()).add(module)
    extras = PYPROJECT["project"]["optional-dependencies"]
    names = {name for extra, names in extras.items() if extra != "dev" for name in names}
    assert not [name for name in names if not provided[normal(name)] & words]


@pytest.mark.parametrize(
    ("hook", "package"),
    [("ruff-pre-commit", "ruff"), ("mirrors-clang-format", "clang-format"), ("typos", "typos")],
)
def test_hooks_run_the_pinned_versions(hook: str, package: str) -> None:
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    revision = re.search(rf"{hook}\n\s+rev: v(\S+)", text)
    assert revision is not None
    assert revision[1] == pins()[package]


def test_types_are_shipped() -> None:
    for package in LIBRARY:
        assert (ROOT / package / "py.typed").is_file()


def test_the_pinned_environment_leaves_no_test_out() -> None:
    assert not LEFT_OUT


FACTORIES = frozenset(
    {
        *("arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones"),
        *("rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
    }
)


def test_factories_state_dtype_and_device() -> None:
    """A program may set other defaults for both."""
    found = []
    for path in library_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner, name = node.func.value, node.func.attr
            if not (isinstance(owner, ast.Name) and owner.id == "torch" and name in FACTORIES):
                continue
            given = {keyword.arg for keyword in node.keywords}
            if None not in given and not {"dtype", "device"} <= given:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: torch.{name}")
    assert not found, found
