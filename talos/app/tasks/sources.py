"""Read the texts of the Python standard library: docstrings, comments, functions, messages.

Files are parsed with `ast`, never imported or executed. Everything read is kept for the life of the
process, because six tasks read the same few hundred files.
"""

import ast
import functools
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Longer than the 48 to 64 tokens a batch holds; only the display in a report sees the rest.
MAX_CHARS = 320
MIN_CHARS = 24

# Not the standard library's own text, or data that differs from machine to machine.
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "lib-dynload"})
TEST_FOLDERS = frozenset({"test", "tests", "testmock"})


@dataclass(frozen=True)
class Function:
    """One top-level function or method: its name and its source without docstring and comments."""

    name: str
    header: str
    body: str


@dataclass(frozen=True)
class SourceFile:
    """The texts of one file, each list in the order of the file.

    Attributes:
        path: path below the library's folder, with `/` on every system.
        docstrings: the beginnings of function and class docstrings.
        comments: blocks of full-line comments, joined.
        functions: functions and methods that are not inside another function.
        messages: texts of raised exceptions.
    """

    path: str
    docstrings: tuple[str, ...]
    comments: tuple[str, ...]
    functions: tuple[Function, ...]
    messages: tuple[str, ...]


def library_folder() -> Path:
    """Return the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib")).resolve()


@functools.cache
def list_files(folder: Path, tests: bool) -> tuple[str, ...]:
    """List the paths of the library's modules, or of its test modules, sorted."""
    found = []
    for path in _walk(folder):
        parts = path.parts[:-1]
        is_test = not TEST_FOLDERS.isdisjoint(parts)
        if tests:
            wanted = is_test and path.name.startswith("test_")
        else:
            # `_sysconfigdata_*` and `sitecustomize` hold settings of one machine.
            wanted = not is_test and not path.name.startswith(("_sysconfigdata", "sitecustomize"))
        if wanted:
            found.append(path.as_posix())
    return tuple(sorted(found))


def _walk(folder: Path, below: Path = Path()) -> Iterator[Path]:
    try:
        entries = sorted((folder / below).iterdir())
    except OSError:
        return
    for entry in entries:
        relative = below / entry.name
        if entry.name.endswith(".py"):
            yield relative
        elif entry.name not in SKIPPED_FOLDERS and entry.is_dir() and not entry.is_symlink():
            yield from _walk(folder, relative)


@functools.cache
def read_source(folder: Path, path: str) -> SourceFile:
    """Parse one file; a file that this Python cannot parse or decode gives no text."""
    empty = SourceFile(path, (), (), (), ())
    try:
        data = (folder / path).read_bytes()
        with warnings.catch_warnings():
            # Python warns of invalid escapes in the library's own string literals.
            warnings.simplefilter("ignore")
            tree = ast.parse(data)
        lines = data.decode("utf-8").splitlines()
    except (OSError, SyntaxError, ValueError, RecursionError):
        return empty
    return _Reader(lines).read(path, tree)


class _Reader:
    """Collect the texts of one parsed file."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.docstrings: list[str] = []
        self.functions: list[Function] = []
        self.messages: list[str] = []
        self.in_string: set[int] = set()

    def read(self, path: str, tree: ast.Module) -> SourceFile:
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant | ast.JoinedStr):
                if node.end_lineno != node.lineno:
                    self.in_string.update(range(node.lineno, (node.end_lineno or 0) + 1))
            elif isinstance(node, ast.Raise):
                self._raise(node)
        self._body(tree.body)
        return SourceFile(
            path,
            tuple(self.docstrings),
            tuple(self._comments()),
            tuple(self.functions),
            tuple(self.messages),
        )

    def _body(self, body: Sequence[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                self._docstring(node)
                self._body(node.body)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self._docstring(node)
                self._function(node)
            elif isinstance(node, ast.If):
                self._body(node.body)
                self._body(node.orelse)
            elif isinstance(node, ast.Try):
                self._body(node.body)
                for handler in node.handlers:
                    self._body(handler.body)
                self._body(node.orelse)

    def _docstring(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        text = ast.get_docstring(node)
        if text:
            # Examples in it are code.
            folded = prose(re.split(r"\n\s*>>>", text, maxsplit=1)[0])
            if folded:
                self.docstrings.append(folded)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        body = node.body
        if ast.get_docstring(node, clean=False) is not None:
            body = body[1:]
        if not body or body[0].lineno == node.lineno:
            return
        header = []
        for line in self.lines[node.lineno - 1 : node.body[0].lineno - 1]:
            if not line.lstrip().startswith("#"):
                header.append(line.strip())
            if line.endswith(":"):
                break
        kept = [
            line
            for number, line in enumerate(
                self.lines[body[0].lineno - 1 : body[-1].end_lineno], body[0].lineno
            )
            if line.strip() and (number in self.in_string or not line.lstrip().startswith("#"))
        ]
        text = textwrap.dedent("\n".join(kept))
        self.functions.append(Function(node.name, " ".join(header), text))

    def _raise(self, node: ast.Raise) -> None:
        if isinstance(node.exc, ast.Call) and node.exc.args:
            text = _message(node.exc.args[0])
            folded = prose(text) if text else None
            if folded:
                self.messages.append(folded)

    def _comments(self) -> Iterator[str]:
        block: list[str] = []
        for number, line in enumerate([*self.lines, ""], 1):
            text = line.strip()
            if text.startswith("#") and number not in self.in_string:
                block.append(text.lstrip("#! ").rstrip("#-=* "))
            elif block:
                joined = prose(" ".join(block))
                if joined:
                    yield joined
                block = []


def _message(node: ast.expr) -> str | None:
    """Return the text of a string expression, with `%s` for its formatted parts."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.BinOp):
        return _message(node.left)
    if isinstance(node, ast.JoinedStr):
        parts = [
            str(part.value) if isinstance(part, ast.Constant) else "%s" for part in node.values
        ]
        return "".join(parts)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return _message(node.func.value) if node.func.attr == "format" else None
    return None


def prose(text: str) -> str | None:
    """Fold white space and cut at a word; None for a text that is too short or has few words."""
    text = " ".join(text.split())
    if len(text) > MAX_CHARS:
        text = text[:MAX_CHARS].rsplit(" ", 1)[0]
    letters = sum(character.isalpha() for character in text)
    if len(text) < MIN_CHARS or letters < 0.6 * len(text) or len(text.split()) < 4:
        return None
    return text


def cut_lines(lines: Sequence[str]) -> str:
    """Join as many whole lines as fit into MAX_CHARS characters."""
    kept: list[str] = []
    length = 0
    for line in lines:
        length += len(line) + 1
        if kept and length > MAX_CHARS:
            break
        kept.append(line[:MAX_CHARS])
    return "\n".join(kept)
