"""`talos eval`: measure accuracy before and after an edit."""

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from talos.app.cli.console import (
    Bars,
    command,
    merge_command,
    next_step,
    on_interrupt,
    print_line,
    stdout,
    table,
)
from talos.app.cli.options import Batch, Length, Model, Seed, check_input
from talos.app.cli.tables import interval
from talos.errors import TalosValueError
from talos.options import integer

__all__ = ["EXAMPLES", "evaluate"]

EXAMPLES = (
    "talos eval --data docstring_topic --data code_package",
    "talos eval --data docstring_topic --vector edit.safetensors --scale 0.5",
    "talos eval --data reviews.csv --data code_package --vector edit.safetensors --scale grid",
)


def evaluate(
    data: Annotated[
        list[str],
        typer.Option("--data", help="A task, as `talos train` takes it; may be repeated."),
    ],
    model: Model = "minilm",
    vector: Annotated[
        Path | None, typer.Option("--vector", help="The task vector to apply; no file is changed.")
    ] = None,
    scale: Annotated[
        str,
        typer.Option("--scale", help="The scaling coefficient, or grid: try 21 and take the best."),
    ] = "1",
    linearized: Annotated[
        bool,
        typer.Option(
            "--linearized",
            metavar="",
            help="Evaluate the model's first-order expansion; for vectors of --method linearized.",
        ),
    ] = False,
    batch_size: Batch = 128,
    max_length: Length = 48,
    seed: Seed = 0,
) -> None:
    """Measure test accuracy with and without a task vector, with 95 % bootstrap intervals.

    --scale grid tries the coefficients 0, 0.05, ..., 1 on the validation examples, takes the one
    with the highest mean accuracy, and evaluates it once on the test examples.
    """
    coef = _parse_scale(scale)
    integer("--batch-size", batch_size, 1)
    integer("--max-length", max_length, 3)
    if len(set(data)) < len(data):
        raise TalosValueError(f"--data must differ, got {' '.join(data)}")
    if vector is not None:
        check_input("--vector", vector)
    elif coef != 1:
        raise TalosValueError(
            f"--vector must be given with --scale {scale}, got none; leave --scale out to "
            "evaluate the pretrained model"
        )
    from talos.app.cli.loading import load_data, load_encoder
    from talos.app.demo.judge import TaskModels
    from talos.evaluation import scaling_coefs
    from talos.task_vectors import TaskVector

    console = stdout()
    with on_interrupt("there was nothing to write"), Bars() as bars:
        edit = TaskVector.load(vector) if vector is not None else None
        if edit is not None:
            _check_expansion(edit.metadata, linearized)
        tasks = [load_data(each) for each in data]
        names = [task.name for task in tasks]
        if twice := {name for name in names if names.count(name) > 1}:
            raise TalosValueError(
                f"--data must have different names, got {', '.join(sorted(twice))} twice; "
                "rename a file"
            )
        encoder = load_encoder(model, *tasks)
        models = TaskModels(encoder, tasks)
        outcomes = models.outcomes(max_length=max_length, batch_size=batch_size, seed=seed)
        if linearized:
            outcomes = outcomes.through(models.linearized())
        before: dict[str, Tensor] = {}
        after: dict[str, Tensor] = {}
        for name in bars.each("pretrained", names):
            before |= outcomes.of("test", tasks=[name])
        if edit is not None:
            with outcomes.resident(edit):
                if coef is None:
                    grid, points = scaling_coefs(21), []
                    for each in bars.each("grid", grid):
                        found = outcomes.figures(outcomes.of("validation", edit, each))
                        points.append(fmean(found.values()))
                    coef = grid[points.index(max(points))]
                    _show_grid(console, grid, points, coef)
                for name in bars.each("edited", names):
                    after |= outcomes.of("test", edit, coef, [name])
    bootstrap = outcomes.bootstrap
    shown = table(
        ["task"], ["examples", "pretrained", *(["edited", "difference"] if after else [])]
    )
    for name in names:
        accuracy = interval(bootstrap.mean({name: before[name]}))
        row = [escape(name), f"{len(before[name]):,}", accuracy]
        if after:
            row.append(interval(bootstrap.mean({name: after[name]})))
            gain = bootstrap.gain({name: after[name]}, {name: before[name]})
            row.append(interval(gain, signed=True))
        shown.add_row(*row)
    console.print(shown)
    edited = f"; {vector} at {coef:.2f}" if after else ""
    print_line(console, f"accuracy in % with 95 % intervals{edited}")
    if vector is None:
        same = [word for each in data for word in ("--data", each)]
        new = ("--vector", "vector.safetensors", "--scale", "grid")
        next_step(console, command("eval", "--model", model, *same, *new))
    else:
        next_step(console, merge_command(vector, coef) if coef else command("inspect", vector))


def _parse_scale(scale: str) -> float | None:
    """Read --scale: a finite number, or None for the grid."""
    if scale == "grid":
        return None
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise TalosValueError(f"--scale must be a finite number or grid, got {scale}")
    return value


def _check_expansion(metadata: Mapping[str, Any], linearized: bool) -> None:
    """Warn if a vector's method, or one in its sum, does not fit --linearized."""
    from talos.task_vectors.sums import sources

    origins = [source["of"] for source in sources([(1.0, metadata)])]
    methods = {str(of["method"]) for of in origins if isinstance(of, dict) and "method" in of}
    wrong = sorted(name for name in methods if (name == "linearized") != linearized)
    if wrong:
        where = "without --linearized, got it" if linearized else "with --linearized, got none"
        print_line(
            Console(stderr=True, highlight=False),
            f"warning: a vector of the method {', '.join(wrong)} must be evaluated {where}; the "
            "accuracy below is that of another function than was trained",
        )


def _show_grid(console: Console, grid: list[float], points: list[float], chosen: float) -> None:
    console.print("[bold]mean validation accuracy, %[/bold]")
    shown = table([], ["scale", "accuracy"])
    for coef, point in zip(grid, points, strict=True):
        mark = " ◂" if coef == chosen else ""
        shown.add_row(f"{coef:.2f}", f"{100 * point:.1f}{mark}")
    console.print(shown)
    if chosen == 0:
        print_line(console, "no coefficient beats the pretrained model on the validation examples")
