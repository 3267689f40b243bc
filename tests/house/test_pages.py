"""Every code block of the pages runs, in order, in one folder: a block without a rule fails.

- ``python`` blocks share one namespace. `<!--python ... -->` is such a block that readers do not
  see: it holds what the shown ones need but should not explain.
- ``bash`` blocks go line by line: `make` targets must exist; `talos` commands are run, long ones
  only parsed; `pip install` must name this distribution and extras that it has.
- ``toml`` and ``json`` must parse; ``bibtex`` and ``mermaid`` must have balanced brackets.

Every link to a file of this repository must lead to one.
"""

import functools
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benches import numerics, penalties
from talos.app.cli.app import app, main

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BLOCK = re.compile(
    r"^(?P<fence>```+)(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=fence)[ ]*$"
    r"|^<!--python\n(?P<hidden>.*?)^-->[ ]*$",
    re.MULTILINE | re.DOTALL,
)
BRACKETS = ("{}", "[]", "()")
# Benches that are no tests, by their module: what reads their options.
SCRIPTS = {"benches.numerics": numerics.parser, "benches.penalties": penalties.parser}
# Pages whose blocks no other test runs.
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))
# Pages whose commands tests/app/test_production.py runs, one after the other.
WALKS = ("docs/walk.md",)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# Commands that are only parsed: they train or score a real model. Every other one is run.
ONLY_PARSED = {"demo", "experiment", "calibrate", "train", "eval", "report", "predict"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the page it starts on."""

    language: str
    code: str
    line: int


def blocks_of(text: str) -> list[Block]:
    """All blocks in order; raises if a fence is open or indented, which would never be found."""
    found = []
    for match in BLOCK.finditer(text):
        hidden = match["hidden"] is not None
        first_line = text.count("\n", 0, match.start()) + 2
        language = "python" if hidden else match["language"].strip()
        found.append(Block(language, match["hidden"] if hidden else match["code"], first_line))
    rest = BLOCK.sub("", text)
    assert not re.search(r"^\s*(?:```|~~~|<!--\s*python)", rest, re.MULTILINE), (
        "a page must open and close each fence at the start of a line"
    )
    return found


def commands_of(code: str) -> list[list[str]]:
    """The commands of a shell block as argument lists, without prompts and comments."""
    lines = code.replace("\\\n", " ").splitlines()
    split = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [words for words in split if words]


def check_make(words: list[str]) -> None:
    known = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = [word for word in words[1:] if "=" not in word]
    assert targets, "make must name its target"
    assert set(targets) <= set(known), f"no such target: {set(targets) - set(known)}"


def parser_of(app: typer.Typer) -> typer.Typer:
    """An application with the same commands and options whose commands do nothing."""
    parser = typer.Typer(pretty_exceptions_enable=False)
    parser.callback()(lambda: None)
    for command in app.registered_commands:
        parser.command(command.name)(functools.wraps(command.callback)(lambda **_: None))
    return parser


def check_talos(words: list[str]) -> None:
    arguments = words[1:]
    if not set(arguments[:1]) <= ONLY_PARSED and "--data" not in arguments:
        assert main(arguments) == 0, f"{shlex.join(words)} must succeed"
        return
    result = CliRunner().invoke(parser_of(app), arguments)
    assert result.exit_code == 0, result.output


def check_pip(words: list[str]) -> None:
    assert words[1] == "install"
    wanted = [word for word in words[2:] if not word.startswith("-")]
    assert wanted, "pip install must name what"
    for requirement in wanted:
        match = re.fullmatch(r"(\.|[A-Za-z0-9._-]+)(?:\[([a-z,]+)\])?", requirement)
        assert match is not None, requirement
        assert match[1] in {".", PYPROJECT["name"]}, f"not this project: {match[1]}"
        extras = set(match[2].split(",")) if match[2] else set()
        assert extras <= set(PYPROJECT["optional-dependencies"]), extras


def check_python(words: list[str]) -> None:
    if words[1:3] == ["-m", "pytest"]:
        paths = [word for word in words[3:] if "/" in word]
        assert paths
        assert all((ROOT / path).exists() for path in paths), paths
    elif words[2] in SCRIPTS:
        SCRIPTS[words[2]]().parse_args(words[3:])
    else:
        assert words[1:3] == ["-m", "benches.gpu"], f"no rule for {shlex.join(words)}"
        subprocess.run([sys.executable, *words[1:], "--dry-run"], cwd=ROOT, check=True)


def check_torchrun(words: list[str]) -> None:
    assert "--no-python" in words, "torchrun must start the command as it is"
    check_talos(words[words.index("talos") :])


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "make": check_make,
    "talos": check_talos,
    "pip": check_pip,
    "torchrun": check_torchrun,
    "python": check_python,
    ".venv/bin/python": check_python,
}


def run_block(block: Block, namespace: dict[str, object]) -> None:
    """Execute or check one block by its language's rule; a language without one raises."""
    if block.language == "python":
        # Blank lines in front, so that a traceback's line number is the page's.
        exec(compile("\n" * (block.line - 1) + block.code, "page", "exec"), namespace)
    elif block.language in {"bash", "sh", "console"}:
        commands = commands_of(block.code)
        assert commands, "a shell block must hold a command"
        for words in commands:
            assert words[0] in COMMANDS, f"no rule for the command {words[0]!r}"
            COMMANDS[words[0]](words)
    elif block.language == "toml":
        tomllib.loads(block.code)
    elif block.language == "json":
        json.loads(block.code)
    elif block.language in {"bibtex", "mermaid"}:
        assert all(block.code.count(left) == block.code.count(right) for left, right in BRACKETS)
    else:
        raise AssertionError(f"no rule for the language {block.language!r}")


@pytest.mark.parametrize("page", sorted({*PAGES} - {*WALKS}))
def test_every_block_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = blocks_of((ROOT / page).read_text())
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        try:
            run_block(block, namespace)
        except BaseException as error:
            error.add_note(f"in the block at {page}:{block.line}")
            raise


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "examples/README.md"])
def test_every_link_leads_to_a_file(page: str) -> None:
    links = [link.partition("#")[0] for link in LINK.findall((ROOT / page).read_text())]
    own = [link for link in links if link and "://" not in link]
    assert not [link for link in own if not (ROOT / page).parent.joinpath(link).exists()]


def test_a_model_is_edited_in_ten_lines() -> None:
    first, *_ = blocks_of((ROOT / "docs/edit.md").read_text())
    assert len([line for line in first.code.splitlines() if line]) == 10


def test_blocks_are_found_with_their_lines() -> None:
    text = "# A\n\n```python\nx = 1\n```\ntext\n<!--python\ny = 2\n-->\n```bash\n$ make demo\n```\n"
    assert blocks_of(text) == [
        Block("python", "x = 1\n", 4),
        Block("python", "y = 2\n", 8),
        Block("bash", "$ make demo\n", 11),
    ]


@pytest.mark.parametrize(
    "text", ["```python\nx = 1\n", "- item\n  ```python\n  x\n  ```\n", "~~~\n"]
)
def test_a_fence_that_would_be_passed_over_is_refused(text: str) -> None:
    with pytest.raises(AssertionError, match="each fence"):
        blocks_of(text)


@pytest.mark.parametrize(
    ("language", "code"),
    [
        ("", "plain"),
        ("text", "plain"),
        ("python", "assert False"),
        ("python", "x = "),
        ("bash", "# nothing but a comment"),
        ("bash", "rm -rf x"),
        ("bash", "make coffee"),
        ("bash", "make"),
        ("bash", "talos demo --no-such-option"),
        ("bash", "talos no-such-command"),
        ("bash", "pip install something-else"),
        ("bash", 'pip install "talos-sparse[nothing]"'),
        ("bash", "python -c pass"),
        ("bash", "python -m pytest no/such/folder"),
        ("toml", "a = "),
        ("json", "{"),
        ("bibtex", "@misc{a"),
    ],
)
def test_a_block_that_is_wrong_fails(language: str, code: str) -> None:
    with pytest.raises((AssertionError, SyntaxError, ValueError)):
        run_block(Block(language, code, 1), {})
