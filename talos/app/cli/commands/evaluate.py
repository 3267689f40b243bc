"""`talos eval`: measure a model before and after edits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from talos.app.cli.eval_options import (
    check_expansion,
    check_options,
    check_use,
    parse_scale,
)
from talos.app.cli.forgetting import check_forget, check_sign, forgetting
from talos.app.cli.options import (
    Batch,
    Json,
    Length,
    Model,
    Overwrite,
    Seed,
    as_options,
)
from talos.app.cli.records import write_record
from talos.app.cli.suggestions import merge_command, train_longer
from talos.options import integer

if TYPE_CHECKING:
    from talos.app.models import Encoder
    from talos.task_vectors import TaskVector

__all__ = ["EXAMPLES", "evaluate", "facts"]

EXAMPLES = (
    "talos eval --data docstring_topic --data code_package",
    "talos eval --data docstring_topic --vector edit.safetensors --scale 0.5",
    "talos eval --data reviews.csv --data code_package --vector edit.safetensors --scale grid",
    "talos eval --data a.csv --data b.csv --vector a.safetensors --vector b.safetensors "
    "--json sum.json",
    "talos eval --data a.csv --data b.csv --vector a.safetensors --forget a --control b",
    "talos eval --data a.csv --data b.csv --vector a.safetensors --vector b.safetensors "
    "--metric negation --metric disentanglement",
)


def evaluate(
    data: Annotated[
        list[str],
        typer.Option("--data", help="A task, as `talos train` takes it; may be repeated."),
    ],
    model: Model = "minilm",
    vector: Annotated[
        list[Path] | None,
        typer.Option(
            "--vector",
            help="A task vector; no file is changed. One is applied for all tasks. Of several, "
            "each belongs to the task that it was trained on, or to the --data at its place.",
        ),
    ] = None,
    merged: Annotated[
        Path | None,
        typer.Option("--merged", help="A merge of the vectors, to measure instead of their sum."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            help="{metrics}, or all that fit; may be repeated. By default "
            "accuracy, and addition of several vectors.",
        ),
    ] = None,
    forget: Annotated[
        str | None,
        typer.Option(
            "--forget",
            help="A task of --data, by its name or as given there: subtract its vector, with the "
            "coefficient that lowers its accuracy most and keeps that of the control. It is "
            "--metric negation for one task.",
        ),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            "--control",
            help="A task that --forget must keep, of --data or another; may be repeated. By "
            "default all others of --data.",
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            "--keep",
            help="The share of the control's mean validation accuracy that --forget must keep, by "
            "default 0.95.",
        ),
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(
            "--scale",
            help="The scaling coefficient, or grid: try several from 0 to 1 and take the mean of "
            "the best ones of resamples, by mean accuracy, of several vectors normalised. By "
            "default 1 for one vector, grid for several.",
        ),
    ] = None,
    points: Annotated[
        int | None,
        typer.Option(
            "--points",
            help="Coefficients that a search tries, by default 21; for disentanglement 11 a "
            "vector.",
        ),
    ] = None,
    linearized: Annotated[
        bool,
        typer.Option(
            "--linearized",
            metavar="",
            help="Evaluate the model's first-order expansion; for vectors of --method linearized.",
        ),
    ] = False,
    json: Json = None,
    batch_size: Batch = 128,
    max_length: Length = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Measure a model with and without task vectors, with 95 % intervals.

    Scaling coefficients are chosen on the validation examples of the tasks; the figures of the
    chosen one are those of the test examples. `talos compare` compares the files of --json.

    addition merges the vectors into one model. negation forgets the task of each vector and keeps
    the others as its control; --forget does so for one task. interference is what each vector does
    to every task, disentanglement whether two of them act on their own tasks only. linearity
    compares the tuned model with its first-order expansion. iou is the overlap of masks.
    sensitivity sets the weights that a vector selects to 0.
    """
    vector = vector or []
    coef = parse_scale(scale, len(vector))
    check_options(data, vector, merged, metric or [], scale, linearized, json, overwrite)
    replaced = {"--metric": " ".join(metric or []), "--merged": merged, "--scale": scale}
    check_forget(forget, control or [], keep, vector, replaced)
    integer("--batch-size", batch_size, 1)
    if max_length is not None:
        integer("--max-length", max_length, 3)
    if points is not None:
        integer("--points", points, 2)
    if forget is None:
        check_use(scale, coef is None, points, len(vector), metric or [])
    from talos.app.cli.evaluations import Evaluation, pair
    from talos.app.cli.figures import NOTES, TABLES
    from talos.app.cli.loading import check_names, load_data, load_encoder
    from talos.app.cli.reading import show_data, show_other_tasks, tokens_for
    from talos.task_vectors import TaskVector

    with on_interrupt("nothing was written"), Bars() as bars:
        with as_options({"path": "--vector"}):
            loaded = [TaskVector.load(path) for path in vector]
        with as_options({"path": "--merged"}):
            edit = TaskVector.load(merged) if merged is not None else None
        given = dict(zip(vector, loaded, strict=True))
        if merged is not None and edit is not None:
            given[merged] = edit
        negates = forget is not None or "negation" in (metric or [])
        search = "--forget" if negates else "--scale" if coef is None else None
        for path, each in given.items():
            check_expansion(each.metadata, linearized)
            check_sign(path, each.metadata, search)
        tasks = [load_data(each) for each in data]
        one = None
        if forget is not None:
            one = forgetting(forget, control or [], keep, data, tasks, load_data)
        names = check_names(tasks)
        vectors = pair(names, loaded, None if one is None else one.target)
        encoder = load_encoder(model, *tasks)
        made = {path: each.metadata for path, each in given.items()}
        tokens = {task.name: tokens_for(task, encoder, max_length, made.values()) for task in tasks}
        evaluation = Evaluation(
            encoder,
            tasks,
            vectors,
            edit if edit is not None else loaded[0] if len(loaded) == 1 else None,
            coef,
            points=points,
            linearized=linearized,
            batch_size=batch_size,
            max_length=tokens,
            seed=seed,
            bars=bars,
            forgetting=one,
        )
        for path, each in given.items():
            evaluation.check(path, each)
        chosen = evaluation.choose(metric or [] if one is None else ["negation"])
        for task in tasks:
            show_data(task, encoder, tokens[task.name], made)
        show_other_tasks(tasks, made)
        found = evaluation.run(chosen)
        files = dict(zip(vectors, vector, strict=True))
        record = None if json is None else evaluation.record(found, model, data, files, merged)
    console = stdout(json)
    above = ""
    for name, figures in found.items():
        for title, shown in TABLES[name](figures):
            console.print(f"{above}[bold]{title}[/bold]")
            console.print(shown)
            above = "\n"
        if name in NOTES:
            for line in NOTES[name](figures):
                print_line(console, line)
    for line in evaluation.doubts(found):
        note(line)
    for name, lack in evaluation.left_out.items():
        note(f"{name} was left out: {lack}")
    if record is not None:
        write_record(json, "eval", record)
    if one is None and json not in (None, "-"):
        next_step(command("compare", json, "OTHER.json"))
    else:
        sources = dict(zip(names, data, strict=True))
        edits = list(files.values()) if merged is None else [merged]
        next_step(*_next(encoder, model, sources, vectors, edits, evaluation.chosen, linearized))


def facts() -> dict[str, str]:
    """Return what the help says of the metrics."""
    from talos.app.cli.measurements import MEASUREMENTS

    return {"metrics": ", ".join(MEASUREMENTS)}


def _next(
    encoder: "Encoder",
    model: str,
    data: Mapping[str, str],
    vectors: "Mapping[str, TaskVector]",
    files: Sequence[Path],
    coef: float | None,
    linearized: bool,
) -> list[str]:
    """Return the commands that make the edit with the coefficient, or look for a better one.

    Args:
        encoder: the model.
        model: --model.
        data: --data of each task.
        vectors: of the tasks.
        files: that make the edit: one, or those of the vectors that are added.
        coef: the coefficient of the edit; None: none was measured.
        linearized: whether the expansion was measured.
    """
    if not vectors:
        task, first = next(iter(data.items()))
        same = ("--model", model, "--data", first)
        if task in encoder.heads:
            return [command("predict", *same, "--task", task)]
        return [command("calibrate", *same, "--out", "mask.safetensors")]
    if coef:
        one, *others = files
        terms = [f"{file}:{coef:g}" for file in files]
        words = [word for each in data.values() for word in ("--data", each)]
        export = command("export", *terms, "--base", model, *words, "--out", "edited")
        alone = not others and coef > 0
        merge = merge_command(one, coef) if alone else merge_command(one, coef, terms[1:])
        return [merge, *([] if linearized else [export])]
    if coef == 0 and len(vectors) == 1:
        ((task, vector),) = vectors.items()
        line = train_longer(model, data[task], vector.metadata)
        return [line or command("inspect", *files)]
    return [command("inspect", *files)]
