"""The documentation site: it has every page and every public name, and each has an example.

`make docs` builds the site and fails at a broken link; the examples run as doctests.
"""

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
from mkdocs.utils import yaml_load

ROOT = Path(__file__).resolve().parents[2]
NEEDS_WEIGHTS = {"load_clip"}  # of open_clip, which no test downloads


def loaded_hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = loaded_hooks()


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text().replace("!!python/name:", "")
    nav = re.findall(r"[\w/-]+\.md", str(yaml_load(text)["nav"]))
    pages = {*HOOKS.PAGES, *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))}
    made = {f"reference/{name}.md" for name in (*HOOKS.REFERENCE, "commands")}
    assert sorted(nav) == sorted(pages | made)


@pytest.mark.parametrize("name", HOOKS.REFERENCE.values())
def test_the_reference_has_every_public_name(name: str) -> None:
    module = importlib.import_module(name)
    shown = re.findall(rf"^::: {re.escape(name)}\.(\w+)$", HOOKS.reference(name), re.MULTILINE)
    own = {each for each in module.__all__ if inspect.ismodule(getattr(module, each))}
    assert {f"{name}.{each}" for each in own} <= set(HOOKS.REFERENCE.values())
    assert shown == [each for each in module.__all__ if each not in own]


@pytest.mark.parametrize("name", HOOKS.REFERENCE.values())
def test_every_public_function_has_an_example(name: str) -> None:
    module = importlib.import_module(name)
    functions = {each: getattr(module, each) for each in module.__all__}
    assert not [
        each
        for each, thing in functions.items()
        if inspect.isfunction(thing) and each not in NEEDS_WEIGHTS
        if ">>> " not in (inspect.getdoc(thing) or "")
    ]


def test_the_help_of_every_command_is_a_section() -> None:
    text = HOOKS.commands()
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    from talos.app.cli.app import app

    assert titles == ["talos", *(f"talos {command.name}" for command in app.registered_commands)]
    assert text.count("Usage: talos") == len(titles)
    assert "--density" in text
