"""The documentation site: the pages of the repository, the docstrings, and each command's `--help`.

mkdocs calls `on_files`. Pages keep their places, so that a link between them is right both here and
there; what they link to comes with them. `make docs` builds the site.
"""

import importlib
import io
import os
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")
LINK = re.compile(r"\]\(([^)\s#]+)[^)]*\)")
PLAIN = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
# A page of the reference and the module whose public names it holds.
REFERENCE = {
    "talos": "talos",
    "merging": "talos.merging",
    "methods": "talos.methods",
    "evaluation": "talos.evaluation",
    "kernels": "talos_kernels",
    "models": "talos.app.models",
    "tasks": "talos.app.tasks",
}


class Examples(griffe.Extension):
    """Name the section `Example` as griffe knows it, which renders its lines as code then."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of a loaded object."""
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Return the site's files: pages, what they link to, and what is made here."""
    pages = [ROOT / name for name in PAGES] + sorted((ROOT / "docs").glob("*.md"))
    found = [each for each in files if not each.src_uri.endswith((".md", ".py"))]
    for path in [*pages, *sorted(linked(pages))]:
        name = path.relative_to(ROOT).as_posix()
        found.append(File.generated(config, name, abs_src_path=str(path)))
    made = {f"reference/{name}.md": reference(module) for name, module in REFERENCE.items()}
    for name, text in (made | {"reference/commands.md": commands()}).items():
        found.append(File.generated(config, name, content=text))
    return Files(found)


def linked(pages: list[Path]) -> set[Path]:
    """Return the files of the repository that pages link to, without pages."""
    links = {
        (page.parent / link).resolve() for page in pages for link in LINK.findall(page.read_text())
    }
    return {link for link in links if link.is_file()} - set(pages)


def reference(name: str) -> str:
    """Return the page of a module: its docstring, then each of its public names."""
    module = importlib.import_module(name)
    parts = [f"# {name}\n", f"::: {name}", "    options:", "      members: []"]
    parts += ["      show_root_heading: false\n", "Every example below runs as a test.\n"]
    parts += [f"::: {name}.{each}\n" for each in public(module)]
    return "\n".join(parts)


def public(module: Any) -> Iterator[str]:
    """Yield the names that a module exports; modules have a page of their own."""
    for name in module.__all__:
        if f"{module.__name__}.{name}" not in REFERENCE.values():
            yield name


def commands() -> str:
    """Return the page of the commands, with what `--help` prints of each."""
    from talos.app.cli.app import app, main

    parts = ["# The command talos\n"]
    for name in [None, *(command.name for command in app.registered_commands)]:
        given = ["--help"] if name is None else [name, "--help"]
        with mock.patch.dict(os.environ, PLAIN), redirect_stdout(io.StringIO()) as printed:
            main(given)
        title = "talos" if name is None else f"talos {name}"
        lines = [line.rstrip() for line in printed.getvalue().strip().splitlines()]
        parts += [f"## {title}\n", "```text", *lines, "```\n"]
    return "\n".join(parts)
