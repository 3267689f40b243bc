"""`talos experiment`: a whole study from a recipe."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from talos.app.cli.console import command, next_step, note
from talos.app.cli.options import Anew, as_options
from talos.errors import TalosValueError

__all__ = ["EXAMPLES", "experiment", "facts"]

EXAMPLES = (
    "talos experiment demo --out demo",
    "talos experiment study.toml --dry-run",
    "talos experiment study.toml --out study --only 'talos*' --only addition",
)
# What messages name otherwise than a recipe and the command do.
_WORDS = {"data": "tasks", "path": "tasks", "out": "--out"}


def experiment(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="A TOML file, or a recipe of the package: {recipes}."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The folder to write; it is made if missing. Not needed with --dry-run."
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            help="Run a part: a model, a row (method), a task or a measure by its name, with * and "
            "? as wildcards; may be given several times. results.json and report.html are of this "
            "part until the whole is run.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            metavar="",
            help="Show the cells, and about how much time, memory and disk they take; write "
            "nothing.",
        ),
    ] = False,
    overwrite: Anew = False,
) -> None:
    """Compare methods on models and tasks, as a recipe says, over several seeds.

    A recipe is a TOML file, see docs/experiments.md. Each step (a mask, a trained vector, an
    evaluation) is a cell, which is written once. The same command again goes on where it was
    stopped; after a change of the recipe it makes only what the change concerns.

    Writes results.json, report.html (open it in a browser), and the folders cells/, vectors/ and
    masks/.
    """
    if out is None and not dry_run:
        raise TalosValueError("--out must be a folder to write, got none; or pass --dry-run")
    from talos.app.cli.experiments import after_run, run, show_plan
    from talos.app.experiments.plan import is_done, select
    from talos.app.experiments.recipe import read_recipe

    with as_options({"only": "--only"}):
        whole = read_recipe(recipe)
        chosen = select(whole, only or ())
    if chosen.rows[0] is not whole.rows[0]:
        note(f"{whole.rows[0].title} is left out: rows are compared with {chosen.rows[0].title}")
    if out is None or dry_run:
        folder = out or Path(Path(recipe).stem)
        with as_options(_WORDS):
            show_plan(chosen, folder, overwrite=overwrite)
        parts = [word for each in only or () for word in ("--only", each)]
        parts += ["--overwrite"] if overwrite else []
        next_step(f"{command('experiment', recipe, *parts)} --out {shlex.quote(str(folder))}")
        return
    if chosen != whole and not overwrite and is_done(whole, out):
        raise TalosValueError(
            f"--only must be left out where the whole recipe is done, got the folder {out}; its "
            "tables hold this part, or take another --out for tables of the part alone"
        )
    after_run(run(chosen, out, overwrite=overwrite, words=_WORDS), out)


def facts() -> dict[str, str]:
    """Return what the help says of the recipes."""
    from talos.app.experiments.recipe import recipe_names

    return {"recipes": ", ".join(recipe_names())}
