"""`talos compare`: several edits in one table."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from talos.app.cli.console import command, next_step, note, print_line, stdout
from talos.app.cli.options import Json, Overwrite, Seed, check_input
from talos.app.cli.records import check_json, write_record
from talos.app.cli.suggestions import data_options

if TYPE_CHECKING:
    from talos.app.report.runs import Run

__all__ = ["EXAMPLES", "compare"]

EXAMPLES = (
    "talos compare sum.json ties.json",
    "talos compare sum.json ties.json demo/results.json",
)


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Files of `talos eval --json`, or results.json of an experiment; at least two "
            "edits.",
        ),
    ],
    json: Json = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Compare edits with the first one: accuracies and differences with 95 % intervals.

    Differences are paired: all edits are resampled on the same test examples. They need the
    answers to each example, which the results.json of an experiment does not hold.
    """
    for path in runs:
        check_input("RUN", path)
    check_json(json, overwrite)
    from talos.app.cli.figures import comparison
    from talos.app.report.runs import compare as compared
    from talos.app.report.runs import load_runs

    loaded = [run for path in runs for run in load_runs(path)]
    console, rows = stdout(json), compared(loaded, seed=seed)
    console.print(comparison(rows))
    print_line(console, "% with 95 % intervals; differences are from the first edit, paired")
    write_record(json, "compare", {"seed": seed, "rows": [asdict(row) for row in rows]})
    for line in _differences(loaded):
        note(f"warning: {line}")
    without = [run.name for run in loaded if run.outcomes is None]
    if without:
        note(f"without answers, so without differences: {', '.join(without)}")
    first = next((run for run in loaded if run.model is not None), loaded[0])
    same = [] if first.model in (None, "minilm") else ["--model", first.model]
    data = [word for each in first.data for word in ("--data", each)]
    same += data or data_options(first.tasks)
    same += ["--linearized"] if first.linearized else []
    other = ("--vector", "OTHER.safetensors", "--scale", "grid", "--json", "other.json")
    next_step(command("eval", *same, *other))


def _differences(runs: "Sequence[Run]") -> list[str]:
    """Return what differs between runs beside their edits: the model, the tokens of a text."""
    found = []
    models = {run.model: run.name for run in runs if run.model is not None}
    if len(models) > 1:
        listed = ", ".join(f"{model} in {name}" for model, name in models.items())
        found.append(f"the runs are of different models: {listed}")
    for task in runs[0].tasks:
        lengths = {run.max_length[task]: run.name for run in runs if task in run.max_length}
        if len(lengths) > 1:
            listed = ", ".join(f"{tokens} tokens in {name}" for tokens, name in lengths.items())
            found.append(f"the texts of {task} were cut at different lengths: {listed}")
    return found
