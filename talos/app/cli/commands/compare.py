"""`talos compare`: several edits in one table."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from talos.app.cli.console import command, next_step, note, print_line, stdout
from talos.app.cli.options import Json, Overwrite, Seed, check_input
from talos.app.cli.records import check_json, write_record

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
            help="Files of `talos eval --json`, or results.json of a demo, at least two edits.",
        ),
    ],
    json: Json = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Compare edits with the first one: accuracies and differences with 95 % intervals.

    Differences are paired: all edits are resampled on the same test examples. They need the
    answers to each example, which the results.json of a demo does not hold.
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
    without = [run.name for run in loaded if run.outcomes is None]
    if without:
        note(f"without answers, so without differences: {', '.join(without)}")
    first = next((run for run in loaded if run.model is not None), loaded[0])
    same = [] if first.model in (None, "minilm") else ["--model", first.model]
    same += [word for each in first.data or ["TASK"] for word in ("--data", each)]
    same += ["--linearized"] if first.linearized else []
    other = ("--vector", "OTHER.safetensors", "--scale", "grid", "--json", "other.json")
    next_step(command("eval", *same, *other))
