"""`talos eval`: accuracy before and after an edit."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from talos.app.cli.console import Bars, keeping, next_step, say, stdout
from talos.app.cli.options import Batch, Length, Model, Seed, check_at_least, check_input
from talos.app.cli.tables import interval
from talos.errors import TalosValueError

__all__ = ["EXAMPLES", "evaluate"]

EXAMPLES = (
    "talos eval --data docstring_topic --data code_package",
    "talos eval --data docstring_topic --vector edit.safetensors --scale 0.5",
    "talos eval --data reviews.csv --data code_package --vector edit.safetensors --scale grid",
)


def evaluate(
    data: Annotated[
        list[str],
        typer.Option("--data", help="A built-in task or a file; may be given several times."),
    ],
    model: Model = "minilm",
    vector: Annotated[
        Path | None, typer.Option("--vector", help="Apply this edit; the weights stay on disk.")
    ] = None,
    scale: Annotated[
        str,
        typer.Option("--scale", help="The scaling coefficient, or grid: the best on validation."),
    ] = "1",
    linearized: Annotated[
        bool,
        typer.Option(
            "--linearized",
            help="Evaluate the model's first-order expansion, which vectors of the method "
            "linearized belong to.",
        ),
    ] = False,
    batch_size: Batch = 128,
    max_length: Length = 48,
    seed: Seed = 0,
) -> None:
    """Measure test accuracy, with and without an edit, with 95 % bootstrap intervals.

    --scale grid tries linspace(0, 1, 21) on the validation examples, takes the coefficient with the
    highest mean accuracy, and evaluates once on the test examples.
    """
    coef = _parse_scale(scale)
    check_at_least("--batch-size", batch_size, 1)
    check_at_least("--max-length", max_length, 3)
    if len(set(data)) < len(data):
        raise TalosValueError(f"--data must differ, got {' '.join(data)}")
    if vector is not None:
        check_input("--vector", vector)
    from talos.app.cli.loading import load_data, load_encoder
    from talos.app.demo.estimates import Estimator
    from talos.app.demo.judge import Judge
    from talos.app.demo.protocol import scaling_coefs, share
    from talos.task_vectors import ResidentVectors, TaskVector

    console = stdout()
    with keeping("there was nothing to write"), Bars() as bars:
        edit = TaskVector.load(vector) if vector is not None else None
        if edit is not None:
            _check_expansion(edit.metadata, linearized)
        tasks = [load_data(each) for each in data]
        stems = [task.name for task in tasks]
        if twice := {stem for stem in stems if stems.count(stem) > 1}:
            raise TalosValueError(
                f"--data must have different names, got {', '.join(sorted(twice))} twice; "
                "rename a file"
            )
        encoder = load_encoder(model, *tasks)
        judge = Judge(encoder, tasks, max_length=max_length, batch_size=batch_size)
        if linearized:
            judge = judge.linearized()
        names = [task.name for task in tasks]
        bars.show("pretrained", 0, len(names))
        before = {}
        for done, name in enumerate(names, 1):
            before[name] = judge.correct(name, "test")
            bars.show("pretrained", done, len(names))
        after = {}
        if edit is not None:
            with ResidentVectors(judge.model, {"edit": edit}) as resident:
                if coef is None:
                    grid = scaling_coefs(21)
                    points = []
                    bars.show("grid", 0, len(grid))
                    for done, each in enumerate(grid, 1):
                        resident.swap("edit", each)
                        shares = [share(judge.correct(name, "validation")) for name in names]
                        points.append(sum(shares) / len(shares))
                        bars.show("grid", done, len(grid))
                    coef = grid[points.index(max(points))]
                    _show_grid(grid, points, coef)
                    if coef == 0:
                        say(
                            console,
                            "no coefficient beats the pretrained model on the validation examples",
                        )
                resident.swap("edit", coef)
                bars.show("edited", 0, len(names))
                for done, name in enumerate(names, 1):
                    after[name] = judge.correct(name, "test")
                    bars.show("edited", done, len(names))
    estimator = Estimator(judge.examples("test"), resamples=2000, seed=seed)
    table = Table(box=None, header_style="bold")
    table.add_column("task")
    for column in ("examples", "pretrained", *(("edited", "difference") if after else ())):
        table.add_column(column, justify="right")
    for name in names:
        row = [
            escape(name),
            f"{len(before[name]):,}",
            interval(estimator.accuracy(name, before[name])),
        ]
        if after:
            row.append(interval(estimator.accuracy(name, after[name])))
            gap = estimator.gain(name, after[name], before[name])
            row.append(interval(gap, signed=True))
        table.add_row(*row)
    console.print(table)
    if after:
        say(console, f"accuracy in % with 95 % intervals; {vector} at {coef:.2f}")
    else:
        say(console, "accuracy in % with 95 % intervals")
    next_step(
        console,
        f"talos eval --data {data[0]} --vector vector.safetensors --scale grid"
        if vector is None
        else f"talos merge {vector}:{coef:g} SECOND.safetensors:0.5 --out edit.safetensors",
    )


def _parse_scale(scale: str) -> float | None:
    """Reads --scale: a finite number, or None for the grid."""
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
    """Warns where a vector's method, or one in its sum, does not go with --linearized."""
    from talos.task_vectors.sums import sources

    origins = [source["of"] for source in sources([(1.0, metadata)])]
    methods = {str(of["method"]) for of in origins if isinstance(of, dict) and "method" in of}
    wrong = sorted(name for name in methods if (name == "linearized") != linearized)
    if wrong:
        where = "without --linearized, got it" if linearized else "with --linearized, got none"
        say(
            Console(stderr=True, highlight=False),
            f"warning: a vector of the method {', '.join(wrong)} must be evaluated {where}; the "
            "accuracy below is that of another function than was trained",
        )


def _show_grid(grid: list[float], points: list[float], chosen: float) -> None:
    console = stdout()
    console.print("[bold]mean validation accuracy, %[/bold]")
    table = Table(box=None, header_style="bold")
    table.add_column("scale", justify="right")
    table.add_column("accuracy", justify="right")
    for coef, point in zip(grid, points, strict=True):
        mark = " ◂" if coef == chosen else ""
        table.add_row(f"{coef:.2f}", f"{100 * point:.1f}{mark}")
    console.print(table)
