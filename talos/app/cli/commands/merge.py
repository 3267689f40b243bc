"""`talos merge`: a weighted sum of task vectors."""

import math
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Annotated

import typer

from talos.app.cli.console import command, next_step, on_interrupt, print_line, stdout
from talos.app.cli.options import Out, Overwrite, check_input, check_output
from talos.errors import TalosValueError

__all__ = ["EXAMPLES", "merge", "parse_term"]

EXAMPLES = (
    "talos merge a.safetensors:0.4 b.safetensors:0.4 --out both.safetensors",
    "talos merge a.safetensors:0.4 c.safetensors:-0.6 --out edit.safetensors",
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


def merge(
    terms: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE:COEFFICIENT",
            help="Task vectors, each with its scaling coefficient (1 when left out).",
        ),
    ],
    out: Out,
    overwrite: Overwrite = False,
) -> None:
    """Add, subtract and scale task vectors: one file that holds the edit.

    A negative coefficient makes the model forget a task. The result holds the union of the
    entries, summed in fp32. Vectors of different base weights are refused.
    """
    parsed = [parse_term(term) for term in terms]
    for path, _ in parsed:
        check_input("a term", path)
    check_output(out, overwrite)
    from talos.app.report.results import megabytes
    from talos.task_vectors import TaskVector

    names: list[set[str]] = []

    def loaded() -> Iterator[tuple[float, TaskVector]]:
        for path, scale in parsed:
            vector = TaskVector.load(path)
            names.append(set(vector.mask.names))
            yield scale, vector

    with on_interrupt("nothing was written"):
        edit = TaskVector.combine(loaded())
        edit.save(out, overwrite=overwrite)
    console = stdout()
    if len(names) > 1 and not any(a & b for a, b in combinations(names, 2)):
        print_line(console, "no two vectors have a tensor in common: do they belong to one model?")
    count = f"{len(parsed)} vector{'s' if len(parsed) > 1 else ''}"
    print_line(
        console, f"{out}: {count}, {edit.mask.nnz:,} entries, {megabytes(out.stat().st_size)}"
    )
    next_step(
        console,
        command("inspect", out),
        command("eval", "--data", "TASK", "--vector", out, "--scale", "grid"),
    )
