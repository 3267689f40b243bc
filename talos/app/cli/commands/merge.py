"""`talos merge`: one task vector made of several."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from talos.app.cli.console import (
    Bars,
    command,
    next_step,
    note,
    on_interrupt,
    print_line,
    stdout,
)
from talos.app.cli.options import (
    Json,
    Overwrite,
    as_options,
    check_choice,
    check_input,
    check_output,
)
from talos.app.cli.recipes import Output, Recipe, check_recipe_base, read_recipe
from talos.app.cli.records import check_json, write_record
from talos.app.cli.suggestions import after_vector, methods_of, model_option
from talos.errors import TalosValueError

if TYPE_CHECKING:
    from talos.merging import Merge
    from talos.task_vectors import TaskVector

__all__ = ["EXAMPLES", "facts", "merge", "parse_term"]

EXAMPLES = (
    "talos merge a.safetensors:0.4 b.safetensors:0.4 --out both.safetensors",
    "talos merge a.safetensors:0.4 c.safetensors:-0.6 --out edit.safetensors",
    "talos merge a.safetensors b.safetensors --method ties --density 0.2 --out both.safetensors",
    "talos merge recipe.toml",
)


def parse_term(text: str) -> tuple[Path, float]:
    """Read `file:coefficient`; without a coefficient it is 1.

    Raises:
        TalosValueError: the coefficient is not a finite number.

    Example:
        >>> path, coefficient = parse_term("a.safetensors:-0.6")
        >>> path.name, coefficient
        ('a.safetensors', -0.6)
    """
    path, colon, number = text.rpartition(":")
    if not colon or number.endswith(".safetensors"):
        return Path(text), 1.0
    try:
        coefficient = float(number)
    except ValueError:
        coefficient = math.nan
    if not math.isfinite(coefficient) or not path:
        raise TalosValueError(
            f"a term must be FILE.safetensors:NUMBER, got {text}; for example "
            "vectors/a.safetensors:0.4"
        )
    return Path(path), coefficient


def facts() -> dict[str, Any]:
    """Return what the help says of the methods: their names, and each with its defaults."""
    from talos.merging import METHODS

    return {"methods": ", ".join(METHODS), **{name: each() for name, each in METHODS.items()}}


def merge(
    terms: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE:COEFFICIENT",
            help="Task vectors, each with its scaling coefficient (1 when left out); or one recipe "
            "(.toml) that names vectors, method, settings and outputs.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The file to write (.safetensors); a recipe names its own."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help="{methods}; by default task_arithmetic, a sum."),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            "--density",
            help="The share of the entries to keep: the largest with trim and ties (by default "
            "0.2), random ones with dare (0.1).",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="Seed of dare's draws, by default {dare.seed}."),
    ] = None,
    follow: Annotated[
        str | None,
        typer.Option(
            "--follow", help="The merge after dare: task_arithmetic (the default), mean or ties."
        ),
    ] = None,
    drop_largest: Annotated[
        float | None,
        typer.Option(
            "--drop-largest",
            help="Share of outliers that breadcrumbs drops, by default {breadcrumbs.drop_largest}.",
        ),
    ] = None,
    drop_smallest: Annotated[
        float | None,
        typer.Option(
            "--drop-smallest",
            help="Share of small entries that breadcrumbs drops, "
            "by default {breadcrumbs.drop_smallest}.",
        ),
    ] = None,
    strictness: Annotated[
        float | None,
        typer.Option(
            "--strictness",
            help="Larger values make smaller masks with tall_masks, "
            "by default {tall_masks.strictness}.",
        ),
    ] = None,
    least_tasks: Annotated[
        int | None,
        typer.Option(
            "--least-tasks",
            help="How many tasks must need an entry with tall_masks, "
            "by default {tall_masks.least_tasks}.",
        ),
    ] = None,
    json: Json = None,
    overwrite: Overwrite = False,
) -> None:
    """Merge task vectors into one file that holds the edit.

    By default they are added. A negative coefficient makes the model forget a task. ties averages
    what agrees in sign, dare drops random entries, breadcrumbs drops outliers and noise, and
    tall_masks keeps what several tasks need.

    The result holds the union of the entries that take part, merged in fp32. Vectors of different
    base weights are refused.
    """
    settings = {
        "density": density,
        "seed": seed,
        "follow": follow,
        "drop_largest": drop_largest,
        "drop_smallest": drop_smallest,
        "strictness": strictness,
        "least_tasks": least_tasks,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    recipe = _recipe(terms, out, method, given)
    for path in recipe.files:
        check_input("a term", path)
    for each in recipe.outputs:
        check_output(each.file, overwrite, name="--out" if out is not None else "outputs")
    check_json(json, overwrite)
    import torch

    from talos.task_vectors import TaskVector
    from talos.task_vectors.fingerprints import one_base
    from talos.tensors import readable_size

    with on_interrupt("nothing was written"), Bars() as bars:
        vectors = []
        for done, path in enumerate(recipe.files):
            bars.show("load", done, len(recipe.files))
            with as_options({"path": "a term"}):
                vectors.append(TaskVector.load(path))
        bases = one_base(each.fingerprints for each in vectors)
        if recipe.base is not None:
            with as_options(dict.fromkeys(("--model", "model", "path"), "base")):
                check_recipe_base(recipe.base, Path(terms[0]).parent, bases)
        bars.show("load", len(recipe.files), len(recipe.files))
        with as_options({"density": f"density of {terms[0]}"} if out is None else {}):
            edit = recipe.merge.merge(
                vectors, on_tensor=lambda done, tensors: bars.show("merge", done, tensors)
            )
        for each in recipe.outputs:
            dtype = None if each.dtype is None else getattr(torch, each.dtype)
            edit.save(each.file, dtype, overwrite=overwrite)
    console = stdout(json)
    names = [set(each.mask.names) for each in vectors]
    if len(names) > 1 and not any(a & b for a, b in combinations(names, 2)):
        note("no two vectors have a tensor in common: do they belong to one model?")
    count = f"{len(vectors)} vector{'s' if len(vectors) > 1 else ''}"
    for each in recipe.outputs:
        size = readable_size(each.file.stat().st_size)
        print_line(console, f"{each.file}: {count}, {edit.mask.nnz:,} entries, {size}")
    files = [{"file": str(e.file), "bytes": e.file.stat().st_size} for e in recipe.outputs]
    figures = {"files": files, "entries": edit.mask.nnz, "density": edit.mask.density}
    write_record(json, "merge", figures | {"metadata": edit.metadata})
    written = recipe.outputs[0].file
    base = _model(recipe.base, Path(terms[0]).parent)
    model = model_option(edit.metadata) if base is None else base
    for line in (_keeps_all(recipe.merge, vectors), _mixes(edit.metadata)):
        if line is not None:
            note(line)
    next_step(command("inspect", written), after_vector(written, edit.metadata, model))


def _recipe(
    terms: Sequence[str], out: Path | None, method: str | None, given: dict[str, Any]
) -> Recipe:
    """Return the recipe that the first term names, or that the options make."""
    from talos.merging import METHODS, merge_of

    if terms[0].endswith(".toml"):
        if len(terms) > 1:
            raise TalosValueError(f"a recipe must stand alone, got {' '.join(terms)}")
        for name, value in {"out": out, "method": method, **given}.items():
            if value is not None:
                raise TalosValueError(
                    f"{_option(name)} must be left out with a recipe, got {value}; write it into "
                    f"{terms[0]}"
                )
        check_input("RECIPE", Path(terms[0]))
        return read_recipe(Path(terms[0]))
    if out is None:
        raise TalosValueError("--out must be a file to write, got none")
    parsed = [parse_term(term) for term in terms]
    chosen = "task_arithmetic" if method is None else method
    check_choice("--method", chosen, METHODS)
    for name, value in given.items():
        takers = [
            key for key, each in METHODS.items() if name in {field.name for field in fields(each)}
        ]
        if chosen not in takers:
            raise TalosValueError(
                f"{_option(name)} must be left out with --method {chosen}, got {value}; it is for "
                f"{', '.join(takers)}"
            )
    made = merge_of(chosen, {**given, "scaling_coefs": [coef for _, coef in parsed]})
    return Recipe(tuple(path for path, _ in parsed), made, (Output(out),))


def _option(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"


def _model(base: str | None, folder: Path) -> tuple[str, ...] | None:
    """Return --model of a recipe's base; None: the recipe names no model."""
    if base is None or (folder / base).is_file():
        return None
    return ("--model", str(folder / base) if (folder / base).is_dir() else base)


def _keeps_all(merge: "Merge", vectors: "Sequence[TaskVector]") -> str | None:
    """Return a line if a trim to the largest entries trims nothing."""
    density, most = getattr(merge, "density", 1.0), max(each.mask.density for each in vectors)
    if merge.name not in ("trim", "ties") or most > density:
        return None
    return f"density {density:g} keeps every entry: no vector has more than {most:.2g}"


def _mixes(metadata: Mapping[str, Any]) -> str | None:
    """Return a warning if vectors of the method linearized are merged with others."""
    others = methods_of(metadata)
    if "linearized" not in others or len(others) == 1:
        return None
    return (
        f"warning: vectors of the method linearized must be evaluated with --linearized, those of "
        f"{', '.join(sorted(others - {'linearized'}))} without it; no evaluation fits their merge"
    )
